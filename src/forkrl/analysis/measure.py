"""Entropy, log-prob, rank and most likely alternatives at each token of given responses.

Axes: ``B`` sequences, ``T`` token positions, ``N`` response tokens, ``R`` rows of a tile, ``D`` hidden, ``V``
vocabulary, ``K`` alternatives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forkrl.analysis.token_table import TOKEN_SCHEMA, TOP
from forkrl.errors import UserError
from forkrl.model.policy import Policy
from forkrl.model.prompt_tokens import listed, prompt_token_ids, unknown_characters
from forkrl.model.support import require_supported
from forkrl.model.token_texts import TokenTexts
from forkrl.parallel.workers import Worker, Workers
from forkrl.types import Prompt

TILE_ELEMENTS_CPU = 1 << 22
"""Logits per tile on a CPU: 16 MiB in fp32, 27 rows of a vocabulary of 150,000. Two or three tiles coexist."""
TILE_ELEMENTS = 1 << 25
"""Logits per tile elsewhere: 128 MiB in fp32, for few and large kernels."""
BATCH_TOKENS_CPU = 2048
"""Maximum padded tokens per forward pass on a CPU, which gains nothing from more; a longer sequence is a batch."""
BATCH_TOKENS = 16_384
"""The same elsewhere."""
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class TokenDetails(NamedTuple):
    """Per position; floats are fp32 in nats, except probabilities."""

    entropy: Tensor  # [N]
    logprobs: Tensor  # [N], of the target
    ranks: Tensor  # [N] int32: 1 + the number of tokens more likely than the target
    top_ids: Tensor  # [N, K] int32, most likely first
    top_probs: Tensor  # [N, K]


@torch.no_grad()
def token_details(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    top: int = 5,
) -> TokenDetails:
    """Entropy (arXiv 2506.01939v2, eq. 1), log-prob and rank of each target, and the ``top`` most likely tokens.

    Holds a tile of complete logit rows at a time, so memory does not grow with N x V. The matrix product runs in the
    input dtype, the rest in fp32 (fp64 for fp64 inputs).

    Args:
        hidden: ``[N, D]``, last hidden states.
        weight: ``[V, D]``, head weights, same dtype.
        targets: ``[N]`` int64 in ``[0, V)``.
        bias: ``[V]`` or None.
        temperature: divides the logits; positive.
        top: number of alternatives, at most the vocabulary size.

    Raises:
        ValueError: shapes disagree, or the temperature is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} must be "
            f"[N, D], [V, D] and [N]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} must be positive")
    num_rows, num_top = len(hidden), min(top, len(weight))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # Allocate results before the first tile: small results between large temporaries fragment the allocator's memory
    # (15 GB for 8,000 rows of a vocabulary of 150,000).
    found = TokenDetails(
        entropy=hidden.new_empty(num_rows, dtype=dtype),
        logprobs=hidden.new_empty(num_rows, dtype=dtype),
        ranks=hidden.new_empty(num_rows, dtype=torch.int32),
        top_ids=hidden.new_empty(num_rows, num_top, dtype=torch.int32),
        top_probs=hidden.new_empty(num_rows, num_top, dtype=dtype),
    )
    tile = max((TILE_ELEMENTS_CPU if hidden.device.type == "cpu" else TILE_ELEMENTS) // len(weight), 1)
    for start in range(0, num_rows, tile):
        rows = slice(start, start + tile)
        details = _tile_details(hidden[rows], weight, targets[rows], bias, temperature, num_top)
        for column, part in zip(found, details, strict=True):
            column[rows] = part
    return found


def _tile_details(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, bias_V: Tensor | None, temperature: float, top: int
) -> TokenDetails:
    logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD, bias_V)
    log_p_RV = torch.log_softmax(logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) / temperature, -1)
    logprobs_R1 = log_p_RV.gather(1, targets_R[:, None])
    top_RK, ids_RK = log_p_RV.topk(top, dim=1)
    return TokenDetails(
        entropy=(log_p_RV.exp() * log_p_RV).sum(1).neg_().clamp_min_(0),
        logprobs=logprobs_R1[:, 0],
        ranks=((log_p_RV > logprobs_R1).sum(1) + 1).int(),
        top_ids=ids_RK.int(),
        top_probs=top_RK.exp(),
    )


class Written(NamedTuple):
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def measure_responses(
    workers: Workers, responses: Sequence[Written], *, temperature: float = 1.0, top: int
) -> list[TokenDetails]:
    """What ``token_details`` gives at every response token, on the CPU, per response in input order.

    Entropy is the current policy's own, whichever model wrote the response (arXiv 2506.01939v2, eq. 1).
    """
    batches = _batches(responses, BATCH_TOKENS_CPU if workers.policy.device.type == "cpu" else BATCH_TOKENS)
    measured = workers.map(
        _measure_batch,
        [[responses[row] for row in batch] for batch in batches],
        temperature,
        top,
        sizes=[len(batch) * _length(responses[batch[0]]) for batch in batches],
    )
    found: dict[int, TokenDetails] = {}
    for batch, details in zip(batches, measured, strict=True):
        found.update(zip(batch, details, strict=True))
    ordered = [found[row] for row in range(len(responses))]
    if not all(bool(details.entropy.isfinite().all()) for details in ordered):
        raise UserError("the model's logits are NaN or infinite on these responses; its weights have diverged")
    return ordered


def _batches(responses: Sequence[Written], max_tokens: int) -> list[list[int]]:
    """Row indices, longest first, in batches of at most ``max_tokens`` padded tokens."""
    batches: list[list[int]] = []
    for row in sorted(range(len(responses)), key=lambda row: -_length(responses[row])):
        if batches and (len(batches[-1]) + 1) * _length(responses[batches[-1][0]]) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def num_tokens(responses: Iterable[Written]) -> int:
    """Tokens of prompts and responses."""
    return sum(map(_length, responses))


def _length(response: Written) -> int:
    return len(response.prompt_ids) + len(response.response_ids)


@torch.no_grad()
def _measure_batch(worker: Worker, batch: Sequence[Written], temperature: float, top: int) -> list[TokenDetails]:
    policy, began = worker.policy, time.monotonic_ns()
    width = max(map(_length, batch)) - 1
    ids_BT = torch.zeros(len(batch), width, dtype=torch.int64)
    response_BT = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, response in enumerate(batch):
        ids = torch.tensor(response.prompt_ids + response.response_ids)
        ids_BT[row, : len(ids) - 1] = ids[:-1]
        response_BT[row, len(response.prompt_ids) - 1 : len(ids) - 1] = True
    # Right padding needs no mask under causal attention.
    hidden_BTD = policy.hidden_states(ids_BT.to(policy.device), use_cache=False)
    targets_N = torch.tensor([token for response in batch for token in response.response_ids], device=policy.device)
    with policy.autocast():
        details = token_details(
            hidden_BTD[response_BT.to(policy.device)].to(policy.head_weight.dtype),
            policy.head_weight,
            targets_N,
            bias=policy.head_bias,
            temperature=temperature,
            top=top,
        )
    lengths = [len(response.response_ids) for response in batch]
    columns: list[tuple[Tensor, ...]] = [column.cpu().split(lengths) for column in details]
    worker.add_counts(finished=len(batch), tokens=num_tokens(batch), working_ns=time.monotonic_ns() - began)
    return [TokenDetails(*parts) for parts in zip(*columns, strict=True)]


class SourceResponse(NamedTuple):
    prompt_id: str
    prompt: int
    prompt_text: str
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
    """The token table of given responses, in memory, as ``forkrl analyze`` writes it.

    Args:
        model: a causal language model, on any device, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: ``[R]`` texts, exactly as the model read them. Equal texts count as one prompt.
        responses: ``[R]`` texts.
        correct: ``[R]``; None: unknown.
        temperature: divides the logits.

    Returns:
        Rows of ``TOKEN_SCHEMA``, sorted by prompt, sample and position.

    Raises:
        UserError: ForkRL does not support the model (``forkrl.model.support``), or its logits are not finite.
        ValueError: the model is neither fp32 nor bf16, lengths differ, there are no responses, a prompt has a character
            unknown to the tokenizer, or a response is empty, does not tokenise back or is too long for the model.
    """
    known = [None] * len(prompts) if correct is None else list(correct)
    if not prompts:
        raise ValueError("there are no responses to measure")
    if model.dtype not in _PRECISIONS:
        raise ValueError(f"the model is in {model.dtype}; load it with dtype=torch.float32 or torch.bfloat16")
    rows: list[SourceResponse] = []
    seen: dict[str, list[int]] = {}  # by prompt: its number, and its responses so far
    for place, (prompt, text, result) in enumerate(zip(prompts, responses, known, strict=True)):
        try:
            written = _tokenised(model, tokenizer, prompt, text, f"response {place}")
        except UserError as error:
            raise ValueError(str(error)) from None
        count = seen.setdefault(prompt, [len(seen), 0])
        rows.append(SourceResponse(str(count[0]), count[0], prompt, count[1], text, written, None, result))
        count[1] += 1
    rows.sort(key=lambda row: (row.prompt, row.sample))
    attention = model.config._attn_implementation
    try:
        policy = Policy(model, tokenizer, _PRECISIONS[model.dtype])
        require_supported(policy, model.config.name_or_path or type(model).__name__)
        with Workers(policy) as workers:
            details = measure_responses(workers, [row.written for row in rows], temperature=temperature, top=TOP)
    finally:
        model.set_attn_implementation(attention)  # restore the caller's model
    return token_rows(rows, details, TokenTexts(tokenizer)).to_pandas()


def _tokenised(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, place: str
) -> Written:
    prompt_ids = prompt_token_ids(tokenizer, Prompt("", prompt, "", place))
    if unknown := unknown_characters(tokenizer, prompt):
        raise UserError(f"{place}: the tokenizer does not know {listed(unknown)} of the prompt")
    written = Written(prompt_ids, response_token_ids(tokenizer, text, place))
    require_positions(model, written, place)
    return written


def response_token_ids(tokenizer: PreTrainedTokenizerBase, text: str, place: str) -> tuple[int, ...]:
    """Tokens of a response text, which must decode to the same text; ``place`` names it in errors."""
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise UserError(f"{place}: the response has no tokens")
    back = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    if back == text:
        return ids
    remedy = "use the tokenizer of the model that wrote it, or give its token_ids"
    if unknown := unknown_characters(tokenizer, text):
        raise UserError(f"{place}: the tokenizer does not know {listed(unknown)} of the response; {remedy}")
    differs = (at for at, (a, b) in enumerate(zip(back, text, strict=False)) if a != b)
    at = next(differs, min(len(back), len(text)))
    raise UserError(
        f"{place}: response does not tokenise back: from character {at + 1} on {text[at : at + 12]!r} becomes "
        f"{back[at : at + 12]!r}; {remedy}"
    )


def require_positions(model: PreTrainedModel, written: Written, place: str) -> None:
    """Reject a prompt with response longer than the model's positions."""
    length = len(written.prompt_ids) + len(written.response_ids)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(f"{place}: prompt and response have {length} tokens, the model has {positions} positions")


def token_rows(group: Sequence[SourceResponse], details: Sequence[TokenDetails], texts: TokenTexts) -> pa.Table:
    """Rows of ``TOKEN_SCHEMA`` for the responses and their measurements, in order."""
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
        "prompt": repeated([response.prompt for response in group], pa.int32()),
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
