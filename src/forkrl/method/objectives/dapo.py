"""DAPO's clipped surrogate (arXiv 2503.14476; arXiv 2506.01939v2, eq. 4).

An objective takes ``Terms`` and returns each token's loss, ``[B, T]``, and optionally where a clip cut its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.signals import Terms


def dapo(terms: Terms) -> tuple[Tensor, Tensor]:
    """``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``; where A < 0 at most ``dual_clip |A|``."""
    log_ratio_BT, advantages_BT = terms.log_ratio, terms.advantages
    ratio_BT = log_ratio_BT.exp()
    unclipped_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - terms.clip_low, 1 + terms.clip_high) * advantages_BT
    objective_BT = torch.minimum(unclipped_BT, clipped_BT)
    if terms.dual_clip is not None:
        bounded_BT = torch.maximum(objective_BT, terms.dual_clip * advantages_BT)
        objective_BT = torch.where(advantages_BT < 0, bounded_BT, objective_BT)
    return -objective_BT, (objective_BT != unclipped_BT) | (log_ratio_BT != terms.exact_log_ratio)
