"""From responses and what a policy thinks of them to rows of the table of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forkrl.analysis.measure import TokenDetails
from forkrl.analysis.token_pass import Written, measure_responses
from forkrl.analysis.token_table import TOKEN_SCHEMA, TOP
from forkrl.errors import UserError
from forkrl.model.policy import Policy
from forkrl.model.prompt_tokens import listed, prompt_token_ids, unknown_characters
from forkrl.model.support import require_supported
from forkrl.model.token_texts import TokenTexts
from forkrl.parallel.workers import Workers
from forkrl.types import Prompt

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class SourceResponse(NamedTuple):
    """A response on its way into the tables."""

    prompt_id: str
    prompt: str
    number: int
    sample: int
    text: str
    written: Written
    finished: bool | None
    correct: bool | None
    failure: str = ""


def measure_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    correct: Sequence[bool] | None = None,
    temperature: float = 1.0,
) -> pd.DataFrame:
    """The table of tokens of given responses, for a notebook: what ``forkrl analyze`` writes, in memory.

    Args:
        model: a causal language model, on any device, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: ``[R]`` texts, exactly as the model read them. Equal ones are one prompt.
        responses: ``[R]`` texts.
        correct: ``[R]``; None: nobody knows.
        temperature: divides the logits.

    Returns:
        Rows of ``TOKEN_SCHEMA``, by prompt, sample and position: what every function of this package takes.

    Raises:
        UserError: ForkRL does not support the model (``forkrl.model.support``), or its logits are not finite.
        ValueError: the model is neither in fp32 nor in bf16, lengths differ, there are no responses, one has no tokens,
            does not tokenise back, or is longer than the model has positions for, or the tokenizer does not know a
            character of a prompt.
    """
    known = [None] * len(prompts) if correct is None else list(correct)
    if not prompts:
        raise ValueError("there are no responses to measure")
    if model.dtype not in _PRECISIONS:
        raise ValueError(f"the model is in {model.dtype}; load it with dtype=torch.float32 or torch.bfloat16")
    rows: list[SourceResponse] = []
    seen: dict[str, list[int]] = {}  # of each prompt its number, and how many responses it has so far
    for place, (prompt, text, result) in enumerate(zip(prompts, responses, known, strict=True)):
        written = _tokenised(model, tokenizer, prompt, text, place)
        count = seen.setdefault(prompt, [len(seen), 0])
        rows.append(SourceResponse(str(count[0]), prompt, count[0], count[1], text, written, None, result))
        count[1] += 1
    rows.sort(key=lambda row: (row.number, row.sample))
    attention = model.config._attn_implementation
    try:
        policy = Policy(model, tokenizer, _PRECISIONS[model.dtype])
        require_supported(policy, model.config.name_or_path or type(model).__name__)
        with Workers(policy) as workers:
            details = measure_responses(workers, [row.written for row in rows], temperature=temperature, top=TOP)
    finally:
        model.set_attn_implementation(attention)  # the model is the caller's
    return token_rows(rows, details, TokenTexts(tokenizer)).to_pandas()


def _tokenised(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, place: int
) -> Written:
    try:
        prompt_ids = prompt_token_ids(tokenizer, Prompt("", prompt, "", f"response {place}"))
    except UserError as error:
        raise ValueError(str(error)) from None
    if unknown := unknown_characters(tokenizer, prompt):
        raise ValueError(f"response {place}: the tokenizer does not know {listed(unknown)} of the prompt")
    written = Written(prompt_ids, tuple(tokenizer.encode(text, add_special_tokens=False)))
    if not written.response_ids:
        raise ValueError(f"response {place}: the response has no tokens")
    if tokenizer.decode(list(written.response_ids), clean_up_tokenization_spaces=False) != text:
        raise ValueError(f"response {place}: does not tokenise back; another tokenizer wrote it")
    length = len(written.prompt_ids) + len(written.response_ids)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"response {place}: {length} tokens with its prompt, the model has {positions} positions")
    return written


def token_rows(group: Sequence[SourceResponse], details: Sequence[TokenDetails], texts: TokenTexts) -> pa.Table:
    """Rows of ``TOKEN_SCHEMA`` for the responses, in order, with what was measured of each."""
    lengths = [len(response.written.response_ids) for response in group]
    ids = [token for response in group for token in response.written.response_ids]

    def repeated(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        owner = [row for row, length in enumerate(lengths) for _ in range(length)]
        return pa.array(values, kind).take(pa.array(owner, pa.int32()))

    top_ids = torch.cat([detail.top_ids for detail in details])
    width = top_ids.shape[1]
    flat_ids = top_ids.flatten().tolist()
    offsets = pa.array(range(0, len(flat_ids) + 1, width) if width else [0] * (len(ids) + 1), pa.int32())
    flat_probs = torch.cat([detail.top_probs for detail in details]).flatten().float().numpy()
    columns = {
        "prompt_id": repeated([response.prompt_id for response in group], pa.string()).dictionary_encode(),
        "prompt": repeated([response.number for response in group], pa.int32()),
        "sample": repeated([response.sample for response in group], pa.int32()),
        "position": pa.array([position for length in lengths for position in range(length)], pa.int32()),
        "length": repeated(lengths, pa.int32()),
        "token_id": pa.array(ids, pa.int32()),
        "text": pa.array([texts[token] for token in ids], pa.string()).dictionary_encode(),
        "entropy": torch.cat([detail.entropy for detail in details]).float().numpy(),
        "logprob": torch.cat([detail.logprobs for detail in details]).float().numpy(),
        "rank": torch.cat([detail.ranks for detail in details]).numpy(),
        "top_ids": pa.ListArray.from_arrays(offsets, pa.array(flat_ids, pa.int32())),
        "top_texts": pa.ListArray.from_arrays(offsets, pa.array([texts[token] for token in flat_ids], pa.string())),
        "top_probs": pa.ListArray.from_arrays(offsets, pa.array(flat_probs)),
        "correct": repeated([response.correct for response in group], pa.bool_()),
    }
    return pa.table(columns, schema=TOKEN_SCHEMA)
