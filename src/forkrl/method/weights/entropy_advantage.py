"""Entropy-based advantage shaping (arXiv 2506.14758): the advantage of uncertain tokens is raised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forkrl.method.signals import Signals


def entropy_advantage(signals: Signals, *, alpha: float = 0.4, kappa: float = 2.0) -> Tensor:
    """``A + min(alpha H, |A| / kappa)`` as a factor of A; 1 where A = 0.

    Defaults: the paper's for GRPO (0.1 for PPO). ``alpha`` = 0 is plain DAPO. A factor stays above 0 as kappa > 1.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha = {alpha} must be finite and at least 0")
    if not kappa > 1:
        raise ValueError(f"kappa = {kappa} must be above 1, or negative advantages could change their sign")
    advantages_BT = signals.advantages[:, None]
    smallest = torch.finfo(advantages_BT.dtype).tiny
    # Entropies round to just below 0.
    share_BT = (alpha * signals.entropy.clamp(min=0) / advantages_BT.abs().clamp(min=smallest)).clamp(max=1 / kappa)
    return 1 + advantages_BT.sign() * share_BT
