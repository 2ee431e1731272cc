"""DPPO with the binary total variation (arXiv 2602.04879): clips by the change of the probability, not by the ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.objectives.options import require_range
from forkrl.method.signals import Terms


def dppo_tv(terms: Terms, *, cap: float = 20.0) -> tuple[Tensor, Tensor]:
    """``-sg(min(r, cap)) A ln p`` where ``p - p_old <= clip_high`` (A > 0) or ``>= -clip_low`` (A < 0), else 0."""
    require_range("cap", cap, 1)
    moved_BT = terms.logprobs.detach().exp() - terms.old_logprobs.exp()
    kept_BT = torch.where(terms.advantages > 0, moved_BT <= terms.clip_high, moved_BT >= -terms.clip_low)
    weight_BT = torch.where(kept_BT, terms.log_ratio.detach().exp().clamp(max=cap), 0.0)
    return -weight_BT * terms.advantages * terms.logprobs, ~kept_BT
