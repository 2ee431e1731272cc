"""Which tokens carry gradient, in the two places of a cluster where that can be decided exactly.

The driver sees a whole rollout batch before its first update: scope "rollout_batch". Every other scope is of one
gradient step, and is decided inside the ranks, which tell each other what they hold.

Axes: ``B`` sequences, ``T`` token positions of responses, ``N`` response tokens in reading order.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from forkrl.config import SelectionConfig
from forkrl.errors import TrainingHalted
from forkrl.method.selection import select_tokens, select_tokens_per_sequence


def select(entropy: Tensor, mask: Tensor, config: SelectionConfig, generator: torch.Generator) -> Tensor:
    """The configured rule over all tokens given; within each row of ``[B, T]`` where the scope is the sequence."""
    function = select_tokens_per_sequence if config.scope == "sequence" else select_tokens
    try:
        return function(entropy, mask, config.rule, config.ratio, threshold=config.threshold, generator=generator)
    except ValueError as error:
        raise TrainingHalted(f"{error}; the model's weights have diverged") from error


def select_over_ranks(
    entropy_BT: Tensor, mask_BT: Tensor, config: SelectionConfig, seed: str, group: dist.ProcessGroup | None
) -> Tensor:
    """The rule over the tokens of all ranks of ``group`` together: this rank's part of it, ``[B, T]`` bool.

    Every rank makes the same choice from the same tokens, in the order of the ranks, so that none has to be told.
    """
    own_N = entropy_BT[mask_BT].float().cpu()
    parts = _gather(own_N, group)
    together_N = torch.cat(parts)
    chosen_N = select(together_N, torch.ones_like(together_N, dtype=torch.bool), config, seeded(seed))
    start = sum(len(part) for part in parts[: dist.get_rank(group) if group is not None else 0])
    selected_BT = torch.zeros_like(mask_BT)
    selected_BT[mask_BT] = chosen_N[start : start + len(own_N)].to(mask_BT.device)
    return selected_BT


def sum_over_ranks(count: int, device: torch.device | str, group: dist.ProcessGroup | None) -> int:
    """A count of all ranks of ``group`` together."""
    total = torch.tensor(count, dtype=torch.int64, device=device)
    if group is not None:
        dist.all_reduce(total, group=group)
    return int(total)


def seeded(seed: str) -> torch.Generator:
    """A generator on the CPU that any process can make anew."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _gather(own_N: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    if group is None:
        return [own_N]
    parts: list[Tensor | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, own_N, group)
    return [part for part in parts if part is not None]
