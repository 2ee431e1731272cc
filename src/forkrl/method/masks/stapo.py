"""STAPO (arXiv 2602.15620): drops unlikely tokens of good responses where the policy was sure."""

from __future__ import annotations

from torch import Tensor

from forkrl.method.signals import Signals


def stapo(signals: Signals, *, probability: float = 0.002, quantile: float = 0.8) -> Tensor:
    """All but tokens with A > 0, p < ``probability`` and an entropy below its ``quantile`` over the given tokens.

    The paper says a quantile of 80% in one place and of 20% in another.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile = {quantile} must lie in [0, 1]")
    entropy_N = signals.entropy[signals.response_mask].sort().values
    # torch.quantile takes at most 16 million values.
    bound = entropy_N[round(quantile * (len(entropy_N) - 1))] if len(entropy_N) else entropy_N.new_zeros(())
    spurious_BT = signals.logprobs.exp() < probability
    return ~(spurious_BT & (signals.entropy < bound) & (signals.advantages[:, None] > 0))
