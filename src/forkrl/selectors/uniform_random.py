"""Rule "random": the control that keeps as many tokens but asks nothing of them (cf. arXiv 2605.07660)."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.selectors.candidates import Candidates


def select_uniform_random(candidates: Candidates) -> Tensor:
    """Keep a uniformly random subset of the fraction's exact size."""
    generator, home = candidates.generator, candidates.entropy.device
    order_N = torch.randperm(
        len(candidates.entropy), generator=generator, device=home if generator is None else generator.device
    )
    selected_N = torch.zeros(len(order_N), dtype=torch.bool, device=home)
    selected_N[order_N[: candidates.num_kept].to(home)] = True
    return selected_N
