"""STEER (arXiv 2510.10150): tokens whose update changes the policy's entropy most count less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forkrl.method.signals import Signals

_LOWEST_LOGPROB = math.log(1e-8)
_SMALLEST_MAXIMUM = 0.02
"""Of |Omega|: below it, weights stay above ``w_min``. Both constants are those of the official code."""


def steer(signals: Signals, *, w_min: float = 0.8) -> Tensor:
    """``w_min ** (|Omega| / max(max |Omega|, 0.02))``, Omega = A / p_old * p (1 - p) (ln p + H).

    The inner maximum is over the given tokens. ``w_min`` = 1 is plain DAPO.
    """
    if not 0 < w_min <= 1:
        raise ValueError(f"w_min = {w_min} must lie in (0, 1]")
    logprobs_BT, old_BT = (each.clamp(_LOWEST_LOGPROB, 0.0) for each in (signals.logprobs, signals.old_logprobs))
    change_BT = (logprobs_BT - old_BT).exp() * -logprobs_BT.expm1() * (logprobs_BT + signals.entropy)
    omega_BT = torch.where(signals.response_mask, signals.advantages[:, None] * change_BT, 0.0).abs()
    largest = omega_BT.amax() if omega_BT.numel() else omega_BT.new_zeros(())
    rate = -math.log(w_min) / largest.clamp(min=_SMALLEST_MAXIMUM)
    return (-rate * omega_BT).exp().clamp(w_min, 1.0)
