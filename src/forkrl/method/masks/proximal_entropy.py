"""Proximal entropy (PEPO, arXiv 2609.39402): exp(H) over its sum in a window of the same response."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.signals import Signals


def proximal_entropy(signals: Signals, *, window: int = 101) -> Tensor:
    """``exp(H_t) / sum of exp(H_k) over |k - t| <= window / 2``; windows end with the response."""
    if window < 1:
        raise ValueError(f"window = {window} must be at least 1")
    weight_BT = signals.entropy.double().exp().masked_fill(~signals.response_mask, 0.0)
    half, width = window // 2, weight_BT.shape[1]
    # Sums up to and including each position, with a 0 in front. Tokens of other roles may lie between: they count as
    # positions of weight 0.
    sums_BT = torch.nn.functional.pad(weight_BT.cumsum(1), (1, 0))
    position_T = torch.arange(width, device=weight_BT.device)
    first_T, after_T = (position_T - half).clamp(min=0), (position_T + half + 1).clamp(max=width)
    # A window of one token is exactly that token; a difference of sums is rounded.
    around_BT = sums_BT[:, after_T] - sums_BT[:, first_T] if half else weight_BT
    return (weight_BT / around_BT.clamp(min=1e-300)).to(signals.entropy.dtype)
