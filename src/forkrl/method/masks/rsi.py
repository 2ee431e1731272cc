"""Relative surprisal index (arXiv 2606.31575): tokens whose surprisal over entropy lies in a band."""

from __future__ import annotations

from torch import Tensor

from forkrl.method.signals import Signals

_LEAST_ENTROPY = 1e-8


def rsi(signals: Signals, *, low: float = 0.1, high: float = 3.0) -> Tensor:
    """``low <= -log p / H <= high``. The band is that of third-party code; the paper's was not available."""
    if not 0 <= low < high:
        raise ValueError(f"low = {low} and high = {high} must be a band above 0")
    index_BT = -signals.logprobs / signals.entropy.clamp(min=_LEAST_ENTROPY)
    return (index_BT >= low) & (index_BT <= high)
