"""What every selection rule is given, and the exact, position-stable top-k that the entropy rules share.

Axes: ``N`` response tokens, flattened in reading order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """The response tokens a rule chooses among."""

    entropy: Tensor
    """``[N]`` nats, any floating dtype; finite for rules that read it."""
    num_kept: int
    """How many to keep, for rules that keep a fraction."""
    threshold: float | None
    """Nats, for the rule that has one."""
    generator: torch.Generator | None
    """For rules that draw; None draws from torch's default."""


def num_selected(num_tokens: int, ratio: float) -> int:
    """``max(1, ceil(ratio * num_tokens))``, the size of a selection; 0 of no tokens.

    The ceiling is that of the decimal product: 0.1 x 30 is 3, although the nearest doubles multiply to slightly more.

    Args:
        num_tokens: response tokens to choose among.
        ratio: fraction to keep, in (0, 1].

    Raises:
        ValueError: ``ratio`` is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio = {ratio} must lie in (0, 1]")
    if num_tokens == 0:
        return 0
    # The slack is relative, because so is the rounding of the product: right for ten tokens and for ten billion.
    return max(1, math.ceil(ratio * num_tokens * (1 - 1e-12)))


def keep_highest(scores_N: Tensor, num_kept: int) -> Tensor:
    """True at exactly ``num_kept`` of the highest scores; of equal ones the earliest.

    Linear time, and no limit at 2^24 elements, unlike ``torch.quantile``; stable, unlike ``torch.topk``.
    """
    num_tokens = len(scores_N)
    threshold = scores_N.kthvalue(num_tokens - num_kept + 1).values
    above_N, tied_N = scores_N > threshold, scores_N == threshold
    return above_N | (tied_N & (tied_N.cumsum(0) <= num_kept - above_N.sum()))
