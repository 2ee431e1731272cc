"""Scores with 95% intervals whose standard errors are *clustered by question*: only questions are drawn independently.

Axes: ``P`` questions, ``K`` samples per question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Scores = Sequence[Sequence[float]] | npt.NDArray[np.floating] | npt.NDArray[np.integer] | npt.NDArray[np.bool_]
_Array = npt.NDArray[np.float64]

Z95 = 1.959963984540054
_ROUNDING = 1e-12


class Estimate(NamedTuple):
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def as_columns(name: str, estimate: Estimate) -> dict[str, float]:
    """Columns ``name``, ``name_low`` and ``name_high``."""
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def mean_with_interval(scores: Scores) -> Estimate:
    """Mean score with Wilson's interval at the effective sample size of the clustered standard error.

    With mean ``p`` and standard error ``SE``, ``n = p (1 - p) / SE^2`` binary draws are equally uncertain, clipped to P
    (samples always agree) to P·K (independent); at ``p = 0`` and ``p = 1`` it is P. Wilson's interval keeps its
    coverage near 0 and 1. ``scores``: ``[P, K]`` in [0, 1].
    """
    scores_PK = _as_shares(scores)
    return _wilson_of_means(scores_PK.mean(axis=1), most=scores_PK.size)


def mean_with_normal_interval(values: Scores) -> Estimate:
    """Mean of any finite quantity ``[P, K]`` with Student's interval; NaN ends with one question."""
    return _student(_as_matrix(values).mean(axis=1))


def paired_difference(scores_a: Scores, scores_b: Scores) -> Estimate:
    """mean(b) - mean(a) in [-1, 1] on the same questions; NaN ends with one question.

    The effective number of pairs is the variance of the difference of two responses to a question over the squared
    standard error, clipped to P to P times the larger K. Bonett and Price (2012) add one pair with difference 1 and one
    with -1 to the normal interval, so it has a width even if all responses agree.

    Args:
        scores_a: ``[P, K]`` in [0, 1], before.
        scores_b: ``[P, K']`` in [0, 1], after; row p is the same question.
    """
    a_PK, b_PK = _as_shares(scores_a), _as_shares(scores_b)
    _check_pairs(a_PK, b_PK)
    a_P, b_P = a_PK.mean(axis=1), b_PK.mean(axis=1)
    squares_P = (a_PK**2).mean(axis=1) + (b_PK**2).mean(axis=1) - 2 * a_P * b_P
    return _paired(b_P - a_P, float(squares_P.mean()), max(a_PK.shape[1], b_PK.shape[1]))


def paired_difference_of_values(values_a: Sequence[float], values_b: Sequence[float], num_draws: float) -> Estimate:
    """``paired_difference`` for ``[P]`` values as in :func:`mean_of_question_values`."""
    a_P1, b_P1 = (_as_shares([[value] for value in values]) for values in (values_a, values_b))
    _check_pairs(a_P1, b_P1)
    return _paired((b_P1 - a_P1)[:, 0], float((a_P1 + b_P1 - 2 * a_P1 * b_P1).mean()), num_draws)


def paired_normal_difference(values_a: Scores, values_b: Scores) -> Estimate:
    """``paired_difference`` of any finite quantity, with Student's interval on the question means."""
    a_PK, b_PK = _as_matrix(values_a), _as_matrix(values_b)
    _check_pairs(a_PK, b_PK)
    return _student(b_PK.mean(axis=1) - a_PK.mean(axis=1))


def mean_of_question_values(values: Sequence[float], num_draws: float) -> Estimate:
    """Mean over questions of one value in [0, 1] each, such as pass@k, with Wilson's interval.

    Args:
        values: ``[P]``, probability of a right draw.
        num_draws: largest number of independent draws behind each value: K / k if it averages over all ways to draw
            k of K samples (Hoeffding's bound on the variance of a U-statistic).
    """
    values_P1 = _as_shares([[value] for value in values])
    return _wilson_of_means(values_P1[:, 0], most=values_P1.size * num_draws)


def mean_of_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates; MOVER interval (Zou and Donner 2008), NaN if any end is NaN."""
    mean = math.fsum(estimate.mean for estimate in estimates) / len(estimates)
    below = math.hypot(*(estimate.mean - estimate.low for estimate in estimates)) / len(estimates)
    above = math.hypot(*(estimate.high - estimate.mean for estimate in estimates)) / len(estimates)
    return Estimate(mean, mean - below, mean + above)


class ClusterSums:
    """Ratio means over tokens (or other small units) with intervals clustered by question, in constant memory.

    Accumulates ``width`` sums per question. A mean is a sum over a count, both random; its standard error is the delta
    method's, ``sqrt(C / (C - 1) * sum_c e_c^2)`` over ``C`` counted questions, with the influence ``e_c = (y_c - mean *
    n_c) / sum(n)`` of question c. Student's interval with C - 1 degrees of freedom; NaN ends with one question.
    """

    def __init__(self, width: int) -> None:
        self._questions = np.zeros(width)  # number with a nonzero sum
        self._sums = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, sums: Sequence[float] | _Array) -> None:
        """Add the ``[width]`` sums of one question."""
        vector = np.asarray(sums, dtype=np.float64)
        self._questions += vector != 0
        self._sums += vector
        self._products += np.outer(vector, vector)

    def total(self, index: int) -> float:
        return float(self._sums[index])

    def mean(self, value: int, count: int) -> Estimate:
        """``sum(value) / sum(count)``; NaN if the count is 0."""
        mean, pull = self._mean_and_pull(value, count)
        return self._estimate(mean, pull, self._questions[count])

    def share(self, value: int, count: int, most: float | None = None) -> Estimate:
        """A mean of zeros and ones with Wilson's interval; ``most``: maximum effective size, default the count."""
        mean, pull = self._mean_and_pull(value, count)
        if math.isnan(mean):
            return Estimate(mean, math.nan, math.nan)
        # Kish's effective number of equal clusters for clusters of unequal size.
        clusters = float(self._sums[count] ** 2 / self._products[count, count])
        most = self._sums[count] if most is None else most
        error = self._squared_error(pull, self._questions[count])
        return _wilson(mean, _effective_size(mean * (1 - mean), error, clusters, most))

    def difference(self, before: tuple[int, int], after: tuple[int, int]) -> Estimate:
        """Mean ``after`` minus mean ``before``, (value, count) as in ``mean``; paired, as questions are shared."""
        mean_before, pull_before = self._mean_and_pull(*before)
        mean_after, pull_after = self._mean_and_pull(*after)
        questions = min(self._questions[before[1]], self._questions[after[1]])
        return self._estimate(mean_after - mean_before, pull_after - pull_before, questions)

    def _mean_and_pull(self, value: int, count: int) -> tuple[float, _Array]:
        """The mean, and the ``[width]`` weights of a question's sums in its influence on the mean."""
        pull = np.zeros(len(self._sums))
        if not self._sums[count]:
            return math.nan, pull
        mean = float(self._sums[value] / self._sums[count])
        pull[value] = 1 / self._sums[count]
        pull[count] -= mean / self._sums[count]
        return mean, pull

    def _estimate(self, mean: float, pull: _Array, questions: float) -> Estimate:
        if questions < 2:
            return Estimate(mean, math.nan, math.nan)
        half = _student_quantile(int(questions) - 1) * math.sqrt(self._squared_error(pull, questions))
        return Estimate(mean, mean - half, mean + half)

    def _squared_error(self, pull: _Array, questions: float) -> float:
        """Squared standard error of a mean over ``questions`` questions; 0 for one, whose spread is unknown."""
        squares = max(float(pull @ self._products @ pull), 0.0)  # influences sum to 0
        return squares * float(questions) / max(float(questions) - 1, 1)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Unbiased probability that at least one of ``k`` samples is right: ``1 - C(n - c, k) / C(n, k)``.

    Computed in exact integers (arXiv 2107.03374, eq. 1).
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct = {num_correct} is not between 0 and num_samples = {num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} is not between 1 and num_samples = {num_samples}; draw at least k samples")
    ways = math.comb(num_samples, k)
    return (ways - math.comb(num_samples - num_correct, k)) / ways


def mean_pass_at_k(num_correct: Sequence[int], num_samples: int, k: int) -> Estimate:
    """Mean pass@k, with the interval of :func:`mean_of_question_values`; ``num_correct``: ``[P]``."""
    values = [pass_at_k(correct, num_samples, k) for correct in num_correct]
    return mean_of_question_values(values, num_samples / k)


def _paired(change_P: _Array, square: float, num_draws: float) -> Estimate:
    """Bonett and Price's interval at the effective number of pairs; ``square``: mean squared difference of a pair."""
    difference, questions = float(change_P.mean()), len(change_P)
    if questions == 1:
        return Estimate(difference, math.nan, math.nan)
    variance = square - difference**2
    size = _effective_size(variance, _squared_error(change_P), questions, questions * num_draws)
    center = difference * size / (size + 2)
    half = Z95 * math.sqrt(((square * size + 2) / (size + 2) - center**2) / (size + 2))
    return Estimate(difference, max(-1.0, min(difference, center - half)), min(1.0, max(difference, center + half)))


def _squared_error(means_P: _Array) -> float:
    """Squared standard error of the mean over questions; 0 for one question, whose spread is unknown."""
    return float(means_P.var(ddof=1)) / len(means_P) if len(means_P) > 1 else 0.0


def _wilson_of_means(means_P: _Array, most: float) -> Estimate:
    mean = float(means_P.mean())
    return _wilson(mean, _effective_size(mean * (1 - mean), _squared_error(means_P), len(means_P), most))


def _wilson(mean: float, size: float) -> Estimate:
    """Wilson's interval at ``size`` independent draws."""
    shrunk = (mean + Z95**2 / (2 * size)) / (1 + Z95**2 / size)
    half = Z95 * math.sqrt(mean * (1 - mean) / size + Z95**2 / (4 * size**2)) / (1 + Z95**2 / size)
    # Rounding must not push an end past the mean, which it equals at p = 0 and p = 1.
    return Estimate(mean, min(mean, max(0.0, shrunk - half)), max(mean, min(1.0, shrunk + half)))


def _effective_size(variance: float, squared_error: float, clusters: float, most: float) -> float:
    """Independent draws of this variance that would be as uncertain, clipped to [``clusters``, ``most``]."""
    if clusters <= 1 or variance < _ROUNDING:
        return clusters
    if squared_error == 0:
        return most
    # The spread of few questions is uncertain: shrinking by (z / t)^2 turns the normal quantile into Student's t.
    shrink = (Z95 / _student_quantile(clusters - 1)) ** 2
    return min(most, max(clusters, variance / squared_error * shrink))


def _student(means_P: _Array) -> Estimate:
    mean = float(means_P.mean())
    if len(means_P) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = _student_quantile(len(means_P) - 1) * math.sqrt(_squared_error(means_P))
    return Estimate(mean, mean - half, mean + half)


def _student_quantile(freedom: float) -> float:
    return float(stdtrit(freedom, 0.975))


def _check_pairs(a_PK: _Array, b_PK: _Array) -> None:
    if len(a_PK) != len(b_PK):
        raise ValueError(f"{len(a_PK)} questions against {len(b_PK)}; a paired difference needs the same ones")


def _as_shares(scores: Scores) -> _Array:
    matrix = _as_matrix(scores)
    if matrix.min() < 0 or matrix.max() > 1:
        raise ValueError(f"scores span {matrix.min():g} to {matrix.max():g}; they must lie in [0, 1]")
    return matrix


def _as_matrix(values: Scores) -> _Array:
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except ValueError:
        raise ValueError("rows differ in length; every question needs the same number of samples") from None
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"scores have shape {list(matrix.shape)}; they must be [questions, samples], none of them 0")
    if not np.isfinite(matrix).all():
        raise ValueError("a score is NaN or infinite")
    return matrix
