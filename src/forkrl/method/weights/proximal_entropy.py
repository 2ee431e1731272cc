"""PEPO's weights (arXiv 2609.39402): tokens of good responses by their entropy relative to their neighbours'."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.masks import proximal_entropy as mask
from forkrl.method.signals import Signals


def proximal_entropy(signals: Signals, *, window: int = 101) -> Tensor:
    """``T e_t / sum of e`` where A > 0, with e the score of the mask of this name; else 1. The mean of a response is 1.

    ``window`` = 1 is plain DAPO. The paper weights responses with a positive reward.
    """
    share_BT = mask.proximal_entropy(signals, window=window).double()
    share_BT = share_BT / share_BT.sum(1, keepdim=True).clamp(min=1e-300)
    return torch.where(signals.advantages[:, None] > 0, share_BT * signals.lengths[:, None], 1.0)
