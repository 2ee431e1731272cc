"""Collate rollouts; cut mini-batches (one gradient step) and micro-batches (one pass through the model).

Axes: ``B`` sequences, ``T`` token positions, ``P`` prompts, ``G`` rollouts per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from forkrl.types import RolloutGroup, TokenBatch

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import TrainConfig


class MicroBatch(NamedTuple):
    """``batch.selected`` is set unless the selection is made inside the micro-batch."""

    number: int
    batch: TokenBatch
    sampled_BT: Tensor | None
    """Positions drawn by ``forks_only.sampled`` to run with gradients; None: that setting is 0."""


def collate(
    groups: Sequence[RolloutGroup], advantages_PG: Tensor, pad_id: int, rewards_PG: Tensor | None = None
) -> TokenBatch:
    """All rollouts as right-padded next-token predictions, in group order. Padding (``pad_id``) is never read."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    width = max(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts) - 1
    shape = (len(rollouts), width)
    input_ids, targets = torch.full(shape, pad_id), torch.full(shape, pad_id)
    attention_mask, response_mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    old_logprobs, entropy = torch.zeros(shape), torch.zeros(shape)
    for row, rollout in enumerate(rollouts):
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        end, start = len(ids) - 1, len(rollout.prompt_ids) - 1
        input_ids[row, :end], targets[row, :end] = ids[:-1], ids[1:]
        attention_mask[row, :end] = True
        written = torch.tensor(rollout.written or (True,) * len(rollout.response_ids), dtype=torch.bool)
        response_mask[row, start:end] = written
        old_logprobs[row, start:end][written], entropy[row, start:end][written] = rollout.logprobs, rollout.entropy
    return TokenBatch(
        input_ids,
        targets,
        attention_mask,
        response_mask,
        old_logprobs,
        entropy,
        advantages_PG.flatten().float(),
        rewards=None if rewards_PG is None else rewards_PG.flatten().float(),
        groups=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group.rollouts) for group in groups])),
    )


def mini_batches(batch: TokenBatch, sequences: int) -> list[TokenBatch]:
    """Consecutive mini-batches of ``sequences`` rows; the last may be smaller."""
    return [
        batch.rows(torch.arange(len(batch))[start : start + sequences]) for start in range(0, len(batch), sequences)
    ]


def cut_micro_batches(batch: TokenBatch, max_tokens: int, *, packed: bool) -> list[Tensor]:
    """Row indices of micro-batches of at most ``max_tokens`` (see :func:`count_tokens`), or of one longer sequence."""
    lengths_B = batch.attention_mask.sum(1)
    if packed:
        return _cut_packed(batch, lengths_B.tolist(), max_tokens)
    cuts: list[list[int]] = []
    for row in lengths_B.argsort(descending=True, stable=True).tolist():
        if cuts and (len(cuts[-1]) + 1) * int(lengths_B[cuts[-1][0]]) <= max_tokens:
            cuts[-1].append(row)
        else:
            cuts.append([row])
    return [torch.tensor(cut) for cut in cuts]


def _cut_packed(batch: TokenBatch, lengths: list[int], max_tokens: int) -> list[Tensor]:
    """Sequences of a prompt stay together as far as possible, and prompts with similar longest sequences."""
    groups = sorted(batch.rows_by_prompt().items(), key=lambda group: -max(lengths[row] for row in group[1]))
    cuts: list[list[int]] = []
    size = max_tokens
    for prompt, rows in groups:
        shared = len(prompt)  # not in the micro-batch yet
        for row in rows:
            own = lengths[row] - len(prompt)
            if size + shared + own > max_tokens:
                cuts.append([])
                size, shared = 0, len(prompt)
            cuts[-1].append(row)
            size, shared = size + shared + own, 0
    return [torch.tensor(cut) for cut in cuts]


def count_tokens(batch: TokenBatch, *, packed: bool) -> int:
    """Tokens of a pass through the model, with padding; packed: without it, and each prompt once."""
    if not packed:
        return batch.input_ids.numel()
    repeated = sum(len(prompt) * (len(rows) - 1) for prompt, rows in batch.rows_by_prompt().items())
    return int(batch.attention_mask.sum()) - repeated


def sample_positions(mini_batch: TokenBatch, config: TrainConfig, generator: torch.Generator) -> Tensor | None:
    """Draw each position with probability ``forks_only.sampled``; None if that is 0."""
    if not config.forks_only.sampled:
        return None
    shape, device = mini_batch.attention_mask.shape, mini_batch.attention_mask.device
    chance_BT = torch.rand(shape, device=device, generator=generator)
    return (chance_BT < config.forks_only.sampled) & mini_batch.attention_mask


def make_micro_batches(mini_batch: TokenBatch, cuts: list[Tensor], sampled_BT: Tensor | None) -> list[MicroBatch]:
    """The rows of each cut as a micro-batch, padded to its longest sequence."""
    parts = [mini_batch.rows(rows_B) for rows_B in cuts]
    return [
        MicroBatch(number, part, None if sampled_BT is None else sampled_BT[rows_B, : part.input_ids.shape[1]])
        for number, (rows_B, part) in enumerate(zip(cuts, parts, strict=True))
    ]


def assemble(like_BT: Tensor, cuts: list[Tensor], parts: list[Tensor]) -> Tensor:
    """The mini-batch's tensor from those of its micro-batches."""
    whole_BT = torch.zeros_like(like_BT)
    for rows_B, part_BT in zip(cuts, parts, strict=True):
        whole_BT[rows_B, : part_BT.shape[1]] = part_BT
    return whole_BT
