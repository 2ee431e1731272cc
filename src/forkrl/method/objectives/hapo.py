"""HAPO's clip (arXiv 2509.16591): wider below 1 for tokens of low entropy, wider above 1 for those of high entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.objectives.dapo import clipped_loss
from forkrl.method.objectives.options import require_range
from forkrl.method.signals import Terms

_LEAST = 1e-8
"""Entropies and spans are at least this, as in the official code."""


def hapo(terms: Terms, *, quantile: float = 0.8, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """DAPO's loss with clip widths ``clip_low (1 - strength min(h, 0))`` and ``clip_high (1 + strength max(h, 0))``.

    h is ``ln H`` minus its ``quantile``, each side divided by its largest magnitude, so that h lies in [-1, 1].
    Quantile and magnitudes are over all response tokens of the micro-batch, as in the official code.
    """
    require_range("quantile", quantile, 0, 1)
    require_range("strength", strength, 0)
    h_BT = _relative_entropy(terms, quantile)
    ratio_BT = terms.log_ratio.exp()
    # In this order, a strength of 0 gives DAPO's bounds to the bit.
    least_BT = (1 - terms.clip_low) + terms.clip_low * strength * h_BT.clamp(max=0)
    most_BT = (1 + terms.clip_high) + terms.clip_high * strength * h_BT.clamp(min=0)
    return clipped_loss(terms, ratio_BT, ratio_BT.clamp(least_BT, most_BT))


def _relative_entropy(terms: Terms, quantile: float) -> Tensor:
    """h, ``[B, T]``; 0 outside ``terms.read``."""
    if not terms.read.any():
        return torch.zeros_like(terms.entropy)
    log_BT = terms.entropy.clamp(min=_LEAST).log()
    sorted_N = log_BT[terms.read].sort().values
    pivot = sorted_N[round(quantile * (len(sorted_N) - 1))]
    above, below = ((sorted_N[-1] - pivot).clamp(min=_LEAST), (pivot - sorted_N[0]).clamp(min=_LEAST))
    h_BT = log_BT - pivot
    return torch.where(terms.read, torch.where(h_BT > 0, h_BT / above, h_BT / below), 0.0)
