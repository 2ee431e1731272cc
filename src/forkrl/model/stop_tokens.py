"""Stop tokens, and the response text that verifiers read; the same for all engines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from forkrl.errors import UserError

_TAG = re.compile(r"<(/?)([A-Za-z_]\w*)>")


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, stop: Sequence[str] = ()
) -> tuple[int, ...]:
    """Ids of all tokens that end a response: the tokenizer's EOS, the model's own list, and ``stop`` (as text)."""
    eos = None if generation is None else generation.eos_token_id
    own = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    extra = []
    for text in stop:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise UserError(f"rollout.stop: {text!r} is {len(encoded)} tokens of this tokenizer, not one")
        extra.append(encoded[0])
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *own, *extra]))


def load_generation_config(model: str, revision: str | None = None) -> GenerationConfig:
    """The generation config of a folder or hub id, as read by transformers and vLLM."""
    try:
        return GenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:  # without generation_config.json, config.json has the EOS
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, revision=revision))


def response_text(tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int], *, finished: bool) -> str:
    """The text that a verifier reads: without the final stop token and special tokens.

    A special token between words becomes a line break, so that "1<pad>7" is not read as 17. ``<unk>`` and paired tags
    (``<think>`` and ``</think>``) stay.
    """
    written = response_ids[:-1] if finished else response_ids
    hidden = _hidden_ids(tokenizer)
    runs = [list(run) for is_hidden, run in groupby(written, hidden.__contains__) if not is_hidden]
    return "\n".join(str(tokenizer.decode(run, skip_special_tokens=False)) for run in runs)


@lru_cache(maxsize=8)
def _hidden_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens that are not text."""
    special = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts, ends = set(special.values()), {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return frozenset(
        id_
        for id_, text in special.items()
        if id_ in ends or (id_ != tokenizer.unk_token_id and not _is_half_of_a_pair(text, texts))
    )


def _is_half_of_a_pair(text: str, texts: set[str]) -> bool:
    tag = _TAG.fullmatch(text)
    return tag is not None and f"<{'' if tag[1] else '/'}{tag[2]}>" in texts
