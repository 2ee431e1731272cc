"""GSPO (arXiv 2507.18071): one ratio for a whole response, the geometric mean of those of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.signals import MAX_LOG_RATIO, Terms


def gspo(terms: Terms) -> tuple[Tensor, Tensor]:
    """``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` with ``s = sg(exp(mean ln r)) p / sg(p)`` (eq. 14).

    The mean is over the whole response, whatever the mask selects.
    """
    lengths_B1 = terms.read.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = terms.exact_log_ratio.detach().sum(1, keepdim=True) / lengths_B1
    exact_BT = mean_B1 + terms.logprobs - terms.logprobs.detach()
    log_BT = exact_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BT, advantages_BT = log_BT.exp(), terms.advantages
    unclipped_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - terms.clip_low, 1 + terms.clip_high) * advantages_BT
    objective_BT = torch.minimum(unclipped_BT, clipped_BT)
    return -objective_BT, (objective_BT != unclipped_BT) | (log_BT != exact_BT)
