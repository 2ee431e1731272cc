"""The text of single tokens, for tables and pages."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """The text of each token, decoded once; bytes of incomplete characters are written ``<0xE6>``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        if token_id not in self._known:
            text = str(self._tokenizer.decode([token_id]))
            if "\ufffd" in text and (raw := self._bytes(token_id)) is not None:
                text = raw.decode("utf-8", "surrogateescape")
                text = "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)
            self._known[token_id] = text.encode("utf-8", "backslashreplace").decode("utf-8")
        return self._known[token_id]

    def _bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token; None if its spelling does not determine them."""
        spelling = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if found := _BYTE_TOKEN.fullmatch(spelling):  # SentencePiece byte fallback
            return bytes.fromhex(found[1])
        if all(character in _BYTE_OF for character in spelling):  # byte-level BPE
            return bytes(_BYTE_OF[character] for character in spelling)
        return None


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte (GPT-2, Llama 3, Qwen)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
