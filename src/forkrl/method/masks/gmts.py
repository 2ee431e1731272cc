"""GMTS (arXiv 2608.30632): the tokens with the largest |H w|, w = ratio times advantage where it is not clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.signals import Signals


def gmts(signals: Signals) -> Tensor:
    """Without the paper's term for a KL penalty, which ForkRL adds over all tokens."""
    low, high = signals.clip
    ratio_BT, advantages_BT = signals.ratio, signals.advantages[:, None]
    clipped_BT = torch.where(advantages_BT > 0, ratio_BT > 1 + high, ratio_BT < 1 - low)
    return (signals.entropy * ratio_BT * advantages_BT).abs().masked_fill(clipped_BT, 0.0)
