"""GMPO (arXiv 2507.20673): the geometric mean of a response's clipped ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.signals import MAX_LOG_RATIO, Terms


def gmpo(terms: Terms) -> tuple[Tensor, Tensor]:
    """``-A exp(mean m)`` with ``m = min(ln r, clip_high)`` where A > 0, ``max(ln r, -clip_low)`` where A < 0.

    The mean is over the whole response. Each token carries its own part of the gradient, so a mask selects parts.
    """
    exact_BT, advantages_BT = terms.exact_log_ratio, terms.advantages
    # A token whose weight is 0 is clipped like the rest of its response.
    signs_BT = torch.where(advantages_BT != 0, advantages_BT, advantages_BT.sum(1, keepdim=True))
    kept_BT = torch.where(signs_BT > 0, exact_BT.clamp(max=terms.clip_high), exact_BT.clamp(min=-terms.clip_low))
    lengths_B1 = terms.read.sum(1, keepdim=True).clamp(min=1)
    mean_BT = kept_BT.detach().sum(1, keepdim=True) / lengths_B1 + kept_BT - kept_BT.detach()
    log_BT = mean_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return -advantages_BT * log_BT.exp(), (kept_BT != exact_BT) | (log_BT != mean_BT)
