"""Clip-Cov and KL-Cov (arXiv 2505.22617): treat the tokens that lower the entropy most.

These have a high covariance ``(A - mean A) (ln p - mean ln p)``. Means and fractions are over the selected tokens of
one micro-batch, as in verl, so these objectives depend on ``training.micro_batch_tokens``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.objectives.dapo import dapo
from forkrl.method.objectives.options import require_range
from forkrl.method.signals import Terms
from forkrl.method.top_k import keep_highest


def clip_cov(
    terms: Terms, *, fraction: float = 2e-4, lowest: float = 1.0, highest: float = 5.0
) -> tuple[Tensor, Tensor]:
    """DAPO's loss, without a random ``fraction`` of the tokens among those with ``lowest < covariance < highest``."""
    require_range("fraction", fraction, 0, 1)
    require_range("highest", highest, lowest)
    loss_BT, cut_BT = dapo(terms)
    covariance_BT = _covariance(terms)
    inside_BT = (covariance_BT > lowest) & (covariance_BT < highest)
    candidates_BT = terms.selected & ~cut_BT & inside_BT
    order_N = _scrambled(terms.old_logprobs[candidates_BT]).argsort(stable=True)
    drawn_N = torch.zeros_like(order_N, dtype=torch.bool)
    drawn_N[order_N[: _count(fraction, terms)]] = True
    dropped_BT = torch.zeros_like(candidates_BT).masked_scatter_(candidates_BT, drawn_N)
    return torch.where(dropped_BT, 0.0, loss_BT), cut_BT | dropped_BT


def kl_cov(terms: Terms, *, fraction: float = 2e-4, kl_coef: float = 1.0) -> tuple[Tensor, Tensor]:
    """``-r A`` without a clip, plus ``kl_coef |ln r|`` on the ``fraction`` of tokens with the highest covariance."""
    require_range("fraction", fraction, 0, 1)
    require_range("kl_coef", kl_coef, 0)
    log_ratio_BT, highest_BT = terms.log_ratio, torch.zeros_like(terms.selected)
    if num_highest := _count(fraction, terms):
        highest_BT.masked_scatter_(terms.selected, keep_highest(_covariance(terms)[terms.selected], num_highest))
    penalty_BT = torch.where(highest_BT, kl_coef * log_ratio_BT.abs(), 0.0)
    return penalty_BT - log_ratio_BT.exp() * terms.advantages, log_ratio_BT != terms.exact_log_ratio


def _covariance(terms: Terms) -> Tensor:
    """Each selected token's term of the covariance, ``[B, T]``; other positions are undefined."""
    num_selected = terms.selected.sum().clamp(min=1)

    def centred(values_BT: Tensor) -> Tensor:
        return values_BT - torch.where(terms.selected, values_BT, 0.0).sum() / num_selected

    return centred(terms.advantages) * centred(terms.logprobs.detach())


def _count(fraction: float, terms: Terms) -> int:
    """At least one of the selected tokens, unless there is none or the fraction is 0."""
    num_selected = int(terms.selected.sum())
    return max(1, int(fraction * num_selected)) if fraction and num_selected else 0


def _scrambled(values_N: Tensor) -> Tensor:
    """Integers without a visible relation to the values.

    They replace random numbers: workers would have to share a generator, and its draws would depend on the order of
    the micro-batches. The same token of the same rollout always gets the same number.
    """
    bits_N = values_N.float().view(torch.int32).long() & 0xFFFFFFFF
    for factor in (0x9E3779B1, 0x85EBCA77):  # odd, with mixed bits
        bits_N = ((bits_N ^ (bits_N >> 15)) * factor) & 0xFFFFFFFF
    return bits_N ^ (bits_N >> 16)
