"""Collate and cut batches. Axes: ``B`` sequences, ``T`` token positions, ``P`` prompts, ``G`` rollouts per prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forkrl.types import RolloutGroup, TokenBatch


def collate(groups: Sequence[RolloutGroup], advantages_PG: Tensor, pad_id: int) -> TokenBatch:
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
        response_mask[row, start:end] = True
        old_logprobs[row, start:end], entropy[row, start:end] = rollout.logprobs, rollout.entropy
    return TokenBatch(
        input_ids, targets, attention_mask, response_mask, old_logprobs, entropy, advantages_PG.flatten().float()
    )


def mini_batches(batch: TokenBatch, sequences: int) -> list[TokenBatch]:
    """Consecutive mini-batches of ``sequences`` rows; the last may be smaller."""
    return [
        batch.rows(torch.arange(len(batch))[start : start + sequences]) for start in range(0, len(batch), sequences)
    ]


def cut_micro_batches(batch: TokenBatch, max_tokens: int) -> list[Tensor]:
    """Row indices of micro-batches of at most ``max_tokens`` padded tokens, or of one longer sequence."""
    lengths_B = batch.attention_mask.sum(1)
    cuts: list[list[int]] = []
    for row in lengths_B.argsort(descending=True, stable=True).tolist():
        if cuts and (len(cuts[-1]) + 1) * int(lengths_B[cuts[-1][0]]) <= max_tokens:
            cuts[-1].append(row)
        else:
            cuts.append([row])
    return [torch.tensor(cut) for cut in cuts]
