"""A teacher-forced pass: what a policy thinks at every token of given responses.

Axes: ``B`` sequences of a batch, ``T`` token positions, ``N`` response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from forkrl.analysis.measure import TokenDetails, token_details
from forkrl.errors import UserError
from forkrl.parallel.workers import Worker, Workers

BATCH_TOKENS = 16_384
"""Padded tokens run through the model at once; a longer sequence forms a batch of its own."""


class Written(NamedTuple):
    """A response as token ids, after its prompt."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def measure_responses(
    workers: Workers, responses: Sequence[Written], *, temperature: float = 1.0, top: int
) -> list[TokenDetails]:
    """Entropy, log-prob, rank and the ``top`` likeliest tokens at every response token, under the policy given.

    The entropy is that of the policy itself, whoever wrote the response (arXiv 2506.01939v2, eq. 1). Sequences are
    batched by length; a batch holds one tile of logits at a time.

    Returns:
        For each response details ``[N]`` on the CPU, in the order given.

    Raises:
        UserError: the model's logits are NaN or infinite.
    """
    batches = _batches(responses)
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


def _batches(responses: Sequence[Written]) -> list[list[int]]:
    """Row indices, longest first, cut so that a padded batch holds at most ``BATCH_TOKENS``."""
    batches: list[list[int]] = []
    for row in sorted(range(len(responses)), key=lambda row: -_length(responses[row])):
        if batches and (len(batches[-1]) + 1) * _length(responses[batches[-1][0]]) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _length(response: Written) -> int:
    return len(response.prompt_ids) + len(response.response_ids)


@torch.no_grad()
def _measure_batch(worker: Worker, batch: Sequence[Written], temperature: float, top: int) -> list[TokenDetails]:
    policy = worker.policy
    width = max(map(_length, batch)) - 1
    ids_BT = torch.zeros(len(batch), width, dtype=torch.int64)
    response_BT = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, response in enumerate(batch):
        ids = torch.tensor(response.prompt_ids + response.response_ids)
        ids_BT[row, : len(ids) - 1] = ids[:-1]
        response_BT[row, len(response.prompt_ids) - 1 : len(ids) - 1] = True
    # Padding stands on the right, where causal attention never looks: no mask.
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
    return [TokenDetails(*parts) for parts in zip(*columns, strict=True)]
