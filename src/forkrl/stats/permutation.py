"""Permutation test of whether two evaluations of the same questions differ, with a consistent interval.

Axes: ``P`` questions, ``K`` samples of each (``K_a`` and ``K_b`` may differ), ``D`` draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forkrl.stats.intervals import Z95, Estimate, mean_of_estimates, paired_difference

DRAWS = 20_000
LEVEL = 0.05
_BATCH = 500
_ROUNDING = 1e-9
"""Tolerance for equal differences."""

Floats = npt.NDArray[np.float64]
Pair = tuple[Floats, Floats]


class PairedTest(NamedTuple):
    """Mean of B minus mean of A with a 95% interval, and a two-sided p-value below 5% iff the interval excludes 0.

    ``method``: "exact", or "draws" for ``DRAWS`` random permutations.
    """

    difference: Estimate
    p: float
    method: str


def paired_test(a_PK: Floats, b_PK: Floats, seed: int = 0) -> PairedTest:
    """Test whether two evaluations have the same mean score.

    Under the null hypothesis the K_a + K_b responses to a question are exchangeable, so they are pooled and re-dealt.

    Args:
        a_PK: ``[P, K_a]`` scores in [0, 1], before.
        b_PK: ``[P, K_b]``, after; row p is the same question.
        seed: for the random deals, used unless all scores are 0 or 1.
    """
    difference = paired_difference(a_PK, b_PK)
    if _is_binary(a_PK, b_PK):
        values, chances = _all_deals(a_PK, b_PK)
        p, method = min(1.0, float(chances[_is_extreme(values, difference.mean)].sum())), "exact"
    else:
        p, method = _drawn_p(_drawn_deals(a_PK, b_PK, np.random.default_rng(seed)), difference.mean), "draws"
    return PairedTest(*_reconcile(difference, p), method)


def pooled_paired_test(pairs: Sequence[Pair], seed: int = 0) -> PairedTest:
    """``paired_test`` for the unweighted mean difference over several benchmarks."""
    generator = np.random.default_rng(seed)
    difference = mean_of_estimates([paired_difference(a_PK, b_PK) for a_PK, b_PK in pairs])
    deals_D = np.mean([_drawn_deals(a_PK, b_PK, generator) for a_PK, b_PK in pairs], axis=0)
    return PairedTest(*_reconcile(difference, _drawn_p(deals_D, difference.mean)), "draws")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those below 5% has a family-wise error rate of at most 5%."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _reconcile(difference: Estimate, permutation_p: float) -> tuple[Estimate, float]:
    """Make p-value and interval agree: take the larger p of both; if not below 5%, extend the interval to 0.

    The test is about these questions, the interval about new ones. With one question: no interval, p = 1.
    """
    if math.isnan(difference.low):
        return difference, 1.0
    center, half = (difference.low + difference.high) / 2, (difference.high - difference.low) / 2
    interval_p = math.erfc(Z95 * abs(center) / half / math.sqrt(2))
    p = max(permutation_p, interval_p)
    if p >= LEVEL:
        difference = difference._replace(low=min(difference.low, 0.0), high=max(difference.high, 0.0))
    return difference, p


def _is_binary(a_PK: Floats, b_PK: Floats) -> bool:
    return all(bool(((scores == 0) | (scores == 1)).all()) for scores in (a_PK, b_PK))


def _all_deals(a_PK: Floats, b_PK: Floats) -> tuple[Floats, Floats]:
    """Every mean difference from re-dealing scores of 0 and 1, with its probability (convolved hypergeometrics)."""
    samples_a, samples_b = a_PK.shape[1], b_PK.shape[1]
    right_P = [round(float(right)) for right in a_PK.sum(axis=1) + b_PK.sum(axis=1)]
    chances_of = {right: _hypergeometric(right, samples_a, samples_b) for right in set(right_P)}
    chances, lowest = np.ones(1), 0  # of B's total, from ``lowest``
    for right in right_P:
        chances = np.convolve(chances, chances_of[right])
        lowest += max(0, right - samples_a)
    total_b = lowest + np.arange(len(chances))
    values: Floats = (total_b / samples_b - (sum(right_P) - total_b) / samples_a) / len(right_P)
    return values, chances


def _hypergeometric(right: int, samples_a: int, samples_b: int) -> Floats:
    """Probability of each number of right responses dealt to B, from the smallest possible."""
    numbers = range(max(0, right - samples_a), min(right, samples_b) + 1)
    wrong, ways = samples_a + samples_b - right, math.comb(samples_a + samples_b, samples_b)
    return np.array([math.comb(right, x) * math.comb(wrong, samples_b - x) / ways for x in numbers])


def _drawn_deals(a_PK: Floats, b_PK: Floats, generator: np.random.Generator) -> Floats:
    """``[D]`` mean differences of random deals."""
    if _is_binary(a_PK, b_PK):
        values, chances = _all_deals(a_PK, b_PK)
        return generator.choice(values, DRAWS, p=chances / chances.sum())
    pooled = np.concatenate([a_PK, b_PK], axis=1)
    (questions, samples_a), samples_b = a_PK.shape, b_PK.shape[1]
    sums_D = np.empty(DRAWS)  # of the scores dealt to B
    for start in range(0, DRAWS, _BATCH):
        sums_P, wanted_P = np.zeros((_BATCH, questions)), np.full((_BATCH, questions), samples_b)
        for left, score_P in zip(range(pooled.shape[1], 0, -1), pooled.T, strict=True):
            taken_P = generator.random((_BATCH, questions)) * left < wanted_P
            wanted_P -= taken_P
            sums_P += taken_P * score_P
        sums_D[start : start + _BATCH] = sums_P.sum(axis=1)
    values_D: Floats = (sums_D / samples_b - (pooled.sum() - sums_D) / samples_a) / questions
    return values_D


def _drawn_p(deals_D: Floats, observed: float) -> float:
    """Counts the observed deal as a draw, so p is never 0 and the test keeps its level."""
    return (int(_is_extreme(deals_D, observed).sum()) + 1) / (len(deals_D) + 1)


def _is_extreme(values: Floats, observed: float) -> npt.NDArray[np.bool_]:
    extreme: npt.NDArray[np.bool_] = np.abs(values) >= abs(observed) - _ROUNDING
    return extreme
