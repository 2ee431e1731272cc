"""CISPO (MiniMax-M1, arXiv 2506.13585): every token has a gradient, weighted by a clipped ratio."""

from __future__ import annotations

from torch import Tensor

from forkrl.method.signals import Terms


def cispo(terms: Terms) -> tuple[Tensor, Tensor]:
    """``-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p``."""
    ratio_BT = terms.log_ratio.detach().exp()
    weight_BT = ratio_BT.clamp(1 - terms.clip_low, 1 + terms.clip_high)
    return -weight_BT * terms.advantages * terms.logprobs, weight_BT != ratio_BT
