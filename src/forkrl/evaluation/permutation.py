"""How surprising a difference is if it does not matter which evaluation is called which.

Axes: ``P`` questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

DRAWS = 20_000
_BATCH = 500
_ROUNDING = 1e-9
"""Sums that are equal but for rounding count as equal: at least as extreme as what was seen."""


def exact_sign_flip_p(differences: Sequence[int]) -> float:
    """Two-sided p-value of a sum of differences of questions, over all 2^P assignments of signs.

    Under the null hypothesis the two evaluations of a question are exchangeable, so each difference might as well
    have had the other sign. The sums are not gone through one by one: as the differences are whole numbers, the
    distribution of their sum is a product of polynomials.

    Args:
        differences: ``[P]``, in any unit in which all are whole.
    """
    common = math.gcd(*differences)
    sizes = [abs(difference) // common for difference in differences if difference]
    if not sizes:
        return 1.0
    top = sum(sizes)
    flipped = np.zeros(top + 1)  # probability that the differences that turn negative sum up to the index
    flipped[0] = 1.0
    reached = 0
    for size in sorted(sizes):
        flipped[size : reached + size + 1] += flipped[: reached + 1].copy()
        flipped /= 2
        reached += size
    seen = abs(sum(differences)) // common
    return min(1.0, float(flipped[np.abs(top - 2 * np.arange(top + 1)) >= seen].sum()))


def drawn_sign_flip_p(differences: npt.NDArray[np.float64], seed: int) -> float:
    """As ``exact_sign_flip_p`` for differences of any kind, from ``DRAWS`` draws of the signs.

    What was seen counts as one draw more, so the p-value is never 0 and its test keeps its level.

    Args:
        differences: ``[P]``, each with the weight that it has in the statistic.
        seed: of the signs.
    """
    varying = differences[differences != 0]
    if not len(varying):
        return 1.0
    generator = np.random.default_rng(seed)
    seen = abs(float(varying.sum())) - _ROUNDING * float(np.abs(varying).sum())
    extreme = 0
    for _ in range(DRAWS // _BATCH):
        signs = 2.0 * generator.integers(0, 2, (_BATCH, len(varying))) - 1
        extreme += int((np.abs(signs @ varying) >= seen).sum())
    return (extreme + 1) / (DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those below 5% errs in any of the tests at most 5% of the time."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
