"""DAPO's clipped surrogate (arXiv 2503.14476; arXiv 2506.01939v2, eq. 4).

An objective takes ``Terms`` and returns each token's loss, ``[B, T]``, and optionally where its clip removed the
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.signals import Terms


def dapo(terms: Terms) -> tuple[Tensor, Tensor]:
    """``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``; where A < 0 at most ``dual_clip |A|``."""
    ratio_BT = terms.log_ratio.exp()
    return clipped_loss(terms, ratio_BT, ratio_BT.clamp(1 - terms.clip_low, 1 + terms.clip_high))


def clipped_loss(terms: Terms, ratio_BT: Tensor, clipped_ratio_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of :func:`dapo` with other clip ranges; ``ratio_BT``: ``exp`` of ``terms.log_ratio``."""
    advantages_BT = terms.advantages
    unclipped_BT = ratio_BT * advantages_BT
    objective_BT = torch.minimum(unclipped_BT, clipped_ratio_BT * advantages_BT)
    if terms.dual_clip is not None:
        bounded_BT = torch.maximum(objective_BT, terms.dual_clip * advantages_BT)
        objective_BT = torch.where(advantages_BT < 0, bounded_BT, objective_BT)
    return -objective_BT, (objective_BT != unclipped_BT) | (terms.log_ratio != terms.exact_log_ratio)
