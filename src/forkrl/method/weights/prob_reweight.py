"""Advantage reweighting, AR (arXiv 2505.12929): unlikely tokens, which have the largest gradients, count less."""

from __future__ import annotations

from torch import Tensor

from forkrl.method.signals import Signals


def prob_reweight(signals: Signals, *, alpha: float = 0.2) -> Tensor:
    """``alpha p + 1 - alpha``, with p the old policy's probability, for either sign of A.

    ``alpha`` = 0 is plain DAPO. Default: the official script for AR alone (0.3 in that for AR with Lopti).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha = {alpha} must lie in [0, 1]")
    return alpha * signals.old_logprobs.exp() + (1 - alpha)
