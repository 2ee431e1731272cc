"""GSPO (arXiv 2507.18071): one ratio for a whole response, the geometric mean of those of its tokens."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from forkrl.method.objectives.dapo import dapo
from forkrl.method.signals import Terms


def gspo(terms: Terms) -> tuple[Tensor, Tensor]:
    """``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` with ``s = sg(exp(mean ln r)) p / sg(p)`` (eq. 14).

    The mean is over the whole response, whatever the mask selects.
    """
    lengths_B1 = terms.read.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = terms.exact_log_ratio.detach().sum(1, keepdim=True) / lengths_B1
    return dapo(replace(terms, old_logprobs=terms.logprobs.detach() - mean_B1))
