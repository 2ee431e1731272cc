"""Archer (arXiv 2507.15778): a wide clip and no KL for a response's most uncertain tokens, the reverse for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.objectives.dapo import clipped_loss
from forkrl.method.objectives.options import require_range
from forkrl.method.signals import MAX_LOG_RATIO, Terms


def archer(
    terms: Terms,
    *,
    quantile: float = 0.8,
    clip_above: float = 0.5,
    clip_below: float = 0.2,
    kl_coef: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """DAPO's loss, clipped to ``1 +- clip_above`` where H is above its ``quantile`` over the response, without KL.

    Other tokens are clipped to ``1 +- clip_below`` and have ``kl_coef`` times the k3 estimate of KL(policy ||
    reference). The official code calls the mask of the latter ``high_entropy_mask``.
    """
    require_range("quantile", quantile, 0, 1)
    require_range("clip_above", clip_above, 0, 1)
    require_range("clip_below", clip_below, 0, 1)
    require_range("kl_coef", kl_coef, 0)
    assert terms.ref_logprobs is not None, "methods.py says that it reads the reference policy"
    above_BT = terms.entropy > _quantiles(terms, quantile)
    ratio_BT = terms.log_ratio.exp()
    wide_BT, narrow_BT = (ratio_BT.clamp(1 - width, 1 + width) for width in (clip_above, clip_below))
    loss_BT, cut_BT = clipped_loss(terms, ratio_BT, torch.where(above_BT, wide_BT, narrow_BT))
    difference_BT = (terms.ref_logprobs - terms.logprobs).clamp(max=MAX_LOG_RATIO)
    kl_BT = difference_BT.expm1() - difference_BT
    return loss_BT + torch.where(above_BT, 0.0, kl_coef * kl_BT), cut_BT


def _quantiles(terms: Terms, quantile: float) -> Tensor:
    """The quantile of each response's entropies, ``[B, 1]``, interpolated linearly; NaN of empty responses."""
    sorted_BT = torch.where(terms.read, terms.entropy, torch.inf).sort(1).values
    # In fp64 a rank such as 0.8 x 10 is a whole number.
    rank_B1 = quantile * (terms.read.sum(1, keepdim=True) - 1).clamp(min=0).double()
    below_B1, above_B1 = (sorted_BT.gather(1, place.long()) for place in (rank_B1.floor(), rank_B1.ceil()))
    return below_B1 + (rank_B1 - rank_B1.floor()).to(below_B1.dtype) * (above_B1 - below_B1)
