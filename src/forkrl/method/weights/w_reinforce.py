"""W-REINFORCE (arXiv 2506.01347): what succeeded counts less than what failed."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.signals import Signals


def w_reinforce(signals: Signals, *, scale: float = 0.1) -> Tensor:
    """``scale`` where A > 0, else 1; 0 is negative-sample reinforcement.

    The paper's advantage is the reward of +1 or -1 without a baseline; this weights the advantage of the group.
    """
    if not scale >= 0:
        raise ValueError(f"scale = {scale} must be at least 0")
    weights_B = torch.where(signals.advantages > 0, scale, 1.0)
    return weights_B[:, None].expand(signals.response_mask.shape)
