"""Micro-batches: parts of a mini-batch that run through the model. Axes: ``B`` sequences, ``T`` token positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from forkrl.types import TokenBatch

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import TrainConfig


class MicroBatch(NamedTuple):
    """``batch.selected`` is set unless the selection is made inside the micro-batch."""

    number: int
    batch: TokenBatch
    sampled_BT: Tensor | None
    """Positions drawn by ``forks_only.sampled`` to run with gradients; None if it is 0."""


def sample_positions(mini_batch: TokenBatch, config: TrainConfig, generator: torch.Generator) -> Tensor | None:
    if not config.forks_only.sampled:
        return None
    shape, device = mini_batch.attention_mask.shape, mini_batch.attention_mask.device
    chance_BT = torch.rand(shape, device=device, generator=generator)
    return (chance_BT < config.forks_only.sampled) & mini_batch.attention_mask


def make_micro_batches(mini_batch: TokenBatch, cuts: list[Tensor], sampled_BT: Tensor | None) -> list[MicroBatch]:
    parts = [mini_batch.rows(rows_B) for rows_B in cuts]
    return [
        MicroBatch(number, part, None if sampled_BT is None else sampled_BT[rows_B, : part.input_ids.shape[1]])
        for number, (rows_B, part) in enumerate(zip(cuts, parts, strict=True))
    ]


def padded_sizes(micro_batches: list[MicroBatch]) -> list[int]:
    """Padded tokens in each, to balance the work."""
    return [micro.batch.input_ids.numel() for micro in micro_batches]


def assemble(like_BT: Tensor, cuts: list[Tensor], parts: list[Tensor]) -> Tensor:
    """Combine micro-batch tensors into the mini-batch's."""
    whole_BT = torch.zeros_like(like_BT)
    for rows_B, part_BT in zip(cuts, parts, strict=True):
        whole_BT[rows_B, : part_BT.shape[1]] = part_BT
    return whole_BT
