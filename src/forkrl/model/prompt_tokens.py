"""Converts prompts to token ids and checks that the tokenizer can represent them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from forkrl.errors import UserError, notice
from forkrl.types import Prompt

_SHOWN_CHARACTERS = 10
_MAY_VANISH = ("C", "M", "Z")
"""Unicode categories (control, mark, separator) that many tokenizers remove intentionally."""


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, max_tokens: int | None = None
) -> tuple[int, ...]:
    """Token ids of a prompt, for all engines; adds special tokens unless ``Prompt.templated``, never a second BOS."""
    ids, _ = _encode(tokenizer, prompt)
    place = prompt.place or f"prompt {prompt.id}"
    if not ids:
        raise UserError(f"{place}: no tokens; an empty prompt cannot be continued")
    if max_tokens is not None and len(ids) > max_tokens:
        raise UserError(
            f"{place}: {len(ids)} tokens, over rollout.max_prompt_tokens = {max_tokens}; raise the limit or remove the "
            f"row"
        )
    return tuple(ids)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[Sequence[int], bool]:
    """Token ids with at most one BOS, and whether the tokenizer had added a second one."""
    ids: Sequence[int] = tokenizer.encode(prompt.text, add_special_tokens=not prompt.templated)
    bos = tokenizer.bos_token_id
    if prompt.templated or bos is None or list(ids[:2]) != [bos, bos]:
        return ids, False
    written: Sequence[int] = tokenizer.encode(prompt.text, add_special_tokens=False)
    repeated = list(written) == list(ids[1 : 1 + len(written)])
    return (ids[1:], True) if repeated else (ids, False)


class PromptCheck:
    """Checks prompts before a run starts; prints one notice if a prompt already starts with BOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._vocabulary = _Vocabulary(tokenizer)
        self._noticed = False

    def __call__(self, prompt: Prompt, *, allow_unknown: bool) -> tuple[int, ...]:
        ids = prompt_token_ids(self.tokenizer, prompt, max_tokens=self.max_tokens)
        if not allow_unknown and (unknown := self._vocabulary.unknown_in(prompt.text)):
            raise UserError(
                f"{prompt.place or f'prompt {prompt.id}'}: the tokenizer does not know {listed(unknown)} and would "
                f"replace or drop them; remove them, use another model, or set task.allow_unknown_tokens = true"
            )
        starts_with_bos = not self._noticed and ids[0] == self.tokenizer.bos_token_id
        if starts_with_bos and _encode(self.tokenizer, prompt)[1]:
            self._noticed = True
            notice(
                f"prompts already start with {self.tokenizer.bos_token!r}, which the tokenizer adds as well; it is "
                f"added once"
            )
        return ids


def unknown_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The distinct parts of a text that the tokenizer drops or replaces by its unknown token."""
    return _Vocabulary(tokenizer).unknown_in(text)


def listed(parts: Sequence[str]) -> str:
    """The first ten, for messages: ``'W', 'h' and 3 more``."""
    more = len(parts) - _SHOWN_CHARACTERS
    return ", ".join(repr(part) for part in parts[:_SHOWN_CHARACTERS]) + (f" and {more} more" if more > 0 else "")


class _Vocabulary:
    """Finds text that a tokenizer cannot represent; looks up every character once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._unknown_tokens = _unknown_tokens(tokenizer)
        self._unknown_ids = {tokenizer.convert_tokens_to_ids(token) for token in self._unknown_tokens}
        self._vanishes: dict[str, bool] = {}

    def unknown_in(self, text: str) -> list[str]:
        ids: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = [] if self._unknown_ids.isdisjoint(ids) else self._replaced(text)
        dropped = [character for character in dict.fromkeys(text) if self._is_dropped(character)]
        return list(dict.fromkeys([*unknown, *dropped]))

    def _replaced(self, text: str) -> list[str]:
        """Parts that become the unknown token, except where the text spells that token."""
        if not self._tokenizer.is_fast:
            return [character for character in dict.fromkeys(text) if self._is_replaced(character)]
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces = [
            text[start:end]
            for token_id, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            if token_id in self._unknown_ids
        ]
        return [piece.strip() or piece for piece in pieces if piece.strip() not in self._unknown_tokens]

    def _is_replaced(self, character: str) -> bool:
        return not self._unknown_ids.isdisjoint(self._tokenizer.encode(character, add_special_tokens=False))

    def _is_dropped(self, character: str) -> bool:
        if character not in self._vanishes:
            visible = not unicodedata.category(character).startswith(_MAY_VANISH)
            self._vanishes[character] = visible and not self._tokenizer.encode(character, add_special_tokens=False)
        return self._vanishes[character]


def _unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The declared unknown token and the one that the tokenizer's model uses, which may differ."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    used = getattr(getattr(backend, "model", None), "unk_token", None)
    return {str(token) for token in (tokenizer.unk_token, used) if token is not None}
