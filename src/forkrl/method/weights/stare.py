"""STARE (arXiv 2606.19236): surprising tokens of good responses count more while the entropy is low."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forkrl.method.selection import num_selected
from forkrl.method.signals import Signals
from forkrl.method.top_k import keep_highest


def stare(
    signals: Signals,
    *,
    ratio: float = 0.1,
    positive: float = 1.1,
    negative: float = 1.0,
    target_entropy: float = 0.3,
) -> Tensor:
    """``positive`` on the ``ratio`` least likely of the tokens with A > 0, ``negative`` on that of A < 0, else 1.

    1 everywhere if the mean entropy of the given tokens is not below ``target_entropy``. Defaults: variant O1 of the
    official code; ``negative`` = 0.9 is C2. ``positive`` = ``negative`` = 1 is plain DAPO.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio = {ratio} must lie in (0, 1]")
    for name, factor in (("positive", positive), ("negative", negative)):
        if not 0 < factor < math.inf:
            raise ValueError(f"{name} = {factor} must be finite and above 0")
    if not target_entropy >= 0:
        raise ValueError(f"target_entropy = {target_entropy} must be at least 0 nats")
    mask_BT, advantages_BT = signals.response_mask, signals.advantages[:, None]
    weights_BT = torch.ones(mask_BT.shape, device=mask_BT.device)
    if signals.entropy[mask_BT].mean() >= target_entropy:
        return weights_BT
    for side_BT, factor in ((advantages_BT > 0, positive), (advantages_BT < 0, negative)):
        candidates_BT = mask_BT & side_BT
        surprisal_N = -signals.logprobs[candidates_BT]
        if factor != 1 and len(surprisal_N):
            kept_N = keep_highest(surprisal_N, num_selected(len(surprisal_N), ratio))
            weights_BT[candidates_BT] = torch.where(kept_N, factor, 1.0)
    return weights_BT
