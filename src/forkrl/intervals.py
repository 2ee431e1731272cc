"""Scores with their uncertainty: 95% intervals that know that samples of one question are alike.

Axes: ``P`` questions, ``K`` samples per question.

Questions, not samples, are drawn independently, so every standard error here is *clustered by question*: it comes from
the spread of the question means. A thousand samples of one question are one observation of the benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Scores = Sequence[Sequence[float]] | npt.NDArray[np.floating] | npt.NDArray[np.integer] | npt.NDArray[np.bool_]
_Array = npt.NDArray[np.float64]

_Z95 = 1.959963984540054


class Estimate(NamedTuple):
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def as_columns(name: str, estimate: Estimate) -> dict[str, float]:
    """The estimate as three columns of a table: ``name``, ``name_low``, ``name_high``."""
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def mean_with_interval(scores: Scores) -> Estimate:
    """Mean score with a Wilson interval at the effective sample size of the clustered standard error.

    With ``p`` the mean and ``SE`` its standard error clustered by question, ``n = p (1 - p) / SE^2`` is the number of
    independent yes-or-no draws that would be as uncertain. It lies between P (samples of a question always agree) and
    P·K (they are independent) and is clipped to that range, which also settles ``p = 0`` and ``p = 1``: n = P there.
    Wilson's interval at ``(p, n)`` stays within [0, 1] and keeps its coverage near the ends.

    Args:
        scores: ``[P, K]`` in [0, 1].

    Raises:
        ValueError: no scores, ragged rows, or a score outside [0, 1].
    """
    scores_PK = _as_matrix(scores)
    if scores_PK.min() < 0 or scores_PK.max() > 1:
        raise ValueError(f"scores span {scores_PK.min():g} to {scores_PK.max():g}; they must lie in [0, 1]")
    return _wilson_of_means(scores_PK.mean(axis=1), most=scores_PK.size)


def mean_with_normal_interval(values: Scores) -> Estimate:
    """Mean of any quantity (response lengths, say) with Student's interval, clustered by question.

    Args:
        values: ``[P, K]``, finite.

    Returns:
        The mean; with one question the ends are NaN, for nothing is known of the spread.

    Raises:
        ValueError: no values, ragged rows, or a value that is not finite.
    """
    return _student(_as_matrix(values).mean(axis=1))


def paired_difference(scores_a: Scores, scores_b: Scores) -> Estimate:
    """How much higher ``scores_b`` are than ``scores_a`` on the same questions: mean(b) - mean(a).

    The interval is Student's, on the differences of the question means: what makes a question hard for both cancels, so
    it is usually much narrower than two separate intervals suggest.

    Args:
        scores_a: ``[P, K]``, before.
        scores_b: ``[P, K']``, after; row p is the same question.

    Raises:
        ValueError: different numbers of questions, no scores, ragged rows, or a score that is not finite.
    """
    means_a_P, means_b_P = _as_matrix(scores_a).mean(axis=1), _as_matrix(scores_b).mean(axis=1)
    if len(means_a_P) != len(means_b_P):
        raise ValueError(
            f"{len(means_a_P)} questions against {len(means_b_P)}; a paired difference needs the same ones"
        )
    return _student(means_b_P - means_a_P)


def mean_of_question_values(values: Sequence[float], num_samples: int) -> Estimate:
    """Mean over questions of one value in [0, 1] each, made from ``num_samples`` samples, with a 95% interval.

    For what is estimated a question at a time and is no mean of samples, such as pass@k or a majority vote. The
    interval is Wilson's at the effective sample size of the spread over questions, as in :func:`mean_with_interval`.

    Raises:
        ValueError: no values, or one outside [0, 1].
    """
    values_P1 = _as_matrix([[value] for value in values])
    if values_P1.min() < 0 or values_P1.max() > 1:
        raise ValueError(f"values span {values_P1.min():g} to {values_P1.max():g}; they must lie in [0, 1]")
    return _wilson_of_means(values_P1[:, 0], most=values_P1.size * num_samples)


def mean_of_estimates(estimates: Sequence[Estimate], num_questions: Sequence[int]) -> Estimate:
    """The mean of independent estimates, each weighing the same, whatever its number of questions.

    For a score averaged over benchmarks: they are what they are, and were not drawn, so only the questions within each
    make the mean uncertain. Its squared standard error is the sum of theirs over their number squared, and the degrees
    of freedom are Welch's and Satterthwaite's, rounded down.

    Args:
        estimates: with Student's intervals, as :func:`paired_difference` gives them.
        num_questions: of each, so its degrees of freedom are one less.

    Returns:
        The mean; its ends are NaN if those of an estimate are.
    """
    mean = math.fsum(estimate.mean for estimate in estimates) / len(estimates)
    if any(math.isnan(estimate.low) for estimate in estimates):
        return Estimate(mean, math.nan, math.nan)
    freedoms = [questions - 1 for questions in num_questions]
    halves = [(estimate.high - estimate.low) / 2 for estimate in estimates]
    variances = [(half / _student_quantile(free)) ** 2 for half, free in zip(halves, freedoms, strict=True)]
    if not any(variances):
        return Estimate(mean, mean, mean)
    scaled = [variance / max(variances) for variance in variances]  # squares of tiny ones would vanish
    freedom = sum(scaled) ** 2 / sum(each**2 / free for each, free in zip(scaled, freedoms, strict=True))
    half = _student_quantile(int(freedom + 1e-9)) * math.sqrt(sum(variances)) / len(estimates)
    return Estimate(mean, mean - half, mean + half)


def student_interval(mean: float, error: float, num_questions: int) -> Estimate:
    """Student's interval around a mean whose standard error is known, from resampling for instance.

    Its ends are NaN with one question, of whose spread nothing is known.
    """
    if num_questions == 1:
        return Estimate(mean, math.nan, math.nan)
    half = _student_quantile(num_questions - 1) * error
    return Estimate(mean, mean - half, mean + half)


class ClusterSums:
    """Means over tokens (or other small units) with intervals clustered by question, in constant memory.

    Questions are met one at a time; of each, only sums enter: a mean is a sum over a count, both random, and its
    standard error is the delta method's, ``sqrt(C / (C - 1) * sum_c e_c^2)`` over the ``C`` questions that count, with
    ``e_c = (y_c - mean * n_c) / sum(n)`` the pull of question c on the mean. The interval is Student's with C - 1
    degrees of freedom; with one question its ends are NaN.

    Args:
        width: sums kept of each question.
    """

    def __init__(self, width: int) -> None:
        self._questions = np.zeros(width)  # in which the sum is not 0
        self._sums = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, sums: Sequence[float] | _Array) -> None:
        """The ``[width]`` sums of one question."""
        vector = np.asarray(sums, dtype=np.float64)
        self._questions += vector != 0
        self._sums += vector
        self._products += np.outer(vector, vector)

    def total(self, index: int) -> float:
        """The sum over all questions."""
        return float(self._sums[index])

    def mean(self, value: int, count: int) -> Estimate:
        """``sum(value) / sum(count)``; NaN where nothing was counted."""
        mean, pull = self._mean_and_pull(value, count)
        return self._estimate(mean, pull, self._questions[count])

    def share(self, value: int, count: int, most: float | None = None) -> Estimate:
        """A mean of zeros and ones, with Wilson's interval at the effective sample size, as ``mean_with_interval``.

        ``most``: the largest that size can be; None: all that were counted.
        """
        mean, pull = self._mean_and_pull(value, count)
        if math.isnan(mean):
            return Estimate(mean, math.nan, math.nan)
        questions = self._questions[count]
        most = self._sums[count] if most is None else most
        size = _effective_size(mean, self._squared_error(pull, questions), int(questions), most)
        return _wilson(mean, size)

    def difference(self, before: tuple[int, int], after: tuple[int, int]) -> Estimate:
        """The mean ``after`` minus the mean ``before``, pairs as in ``mean``; questions are shared, so it is paired."""
        mean_before, pull_before = self._mean_and_pull(*before)
        mean_after, pull_after = self._mean_and_pull(*after)
        questions = min(self._questions[before[1]], self._questions[after[1]])
        return self._estimate(mean_after - mean_before, pull_after - pull_before, questions)

    def _mean_and_pull(self, value: int, count: int) -> tuple[float, _Array]:
        """The mean, and the ``[width]`` weights with which a question's sums pull on it."""
        pull = np.zeros(len(self._sums))
        if not self._sums[count]:
            return math.nan, pull
        mean = float(self._sums[value] / self._sums[count])
        pull[value] += 1 / self._sums[count]
        pull[count] -= mean / self._sums[count]
        return mean, pull

    def _estimate(self, mean: float, pull: _Array, questions: float) -> Estimate:
        if questions < 2 or math.isnan(mean):
            return Estimate(mean, math.nan, math.nan)
        half = _student_quantile(int(questions) - 1) * math.sqrt(self._squared_error(pull, questions))
        return Estimate(mean, mean - half, mean + half)

    def _squared_error(self, pull: _Array, questions: float) -> float:
        """Of a mean over so many questions with such pulls; 0 with a single one, whose spread nobody knows."""
        squares = max(float(pull @ self._products @ pull), 0.0)  # the pulls themselves sum to 0
        return squares * float(questions) / max(float(questions) - 1, 1)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Probability that at least one of ``k`` samples is right, without bias: ``1 - C(n - c, k) / C(n, k)``.

    The estimator of arXiv 2107.03374, eq. 1, in exact integers. Plugging c / n into ``1 - (1 - p)^k`` would be too low.

    Raises:
        ValueError: not ``0 <= num_correct <= num_samples`` or not ``1 <= k <= num_samples``.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct = {num_correct} is not between 0 and num_samples = {num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} is not between 1 and num_samples = {num_samples}; draw at least k samples")
    ways = math.comb(num_samples, k)
    return (ways - math.comb(num_samples - num_correct, k)) / ways


def mean_pass_at_k(num_correct: Sequence[int], num_samples: int, k: int) -> Estimate:
    """Mean pass@k over questions, with a 95% interval.

    Each question gives one unbiased estimate in [0, 1]; the interval is Wilson's at the effective sample size of their
    spread over questions, as in :func:`mean_with_interval`. No resampling: the same counts give the same interval.

    Args:
        num_correct: ``[P]``, right samples of each question.
        num_samples: samples of each question.
        k: draws allowed.

    Raises:
        ValueError: no questions, or as :func:`pass_at_k`.
    """
    return mean_of_question_values([pass_at_k(correct, num_samples, k) for correct in num_correct], num_samples)


def _wilson_of_means(means_P: _Array, most: int) -> Estimate:
    """Wilson's interval of the mean over questions; ``most``: all samples."""
    mean, squared_error = float(means_P.mean()), float(means_P.var(ddof=1)) / len(means_P) if len(means_P) > 1 else 0.0
    return _wilson(mean, _effective_size(mean, squared_error, len(means_P), most))


def _wilson(mean: float, size: float) -> Estimate:
    """Wilson's interval at so many independent draws."""
    shrunk = (mean + _Z95**2 / (2 * size)) / (1 + _Z95**2 / size)
    half = _Z95 * math.sqrt(mean * (1 - mean) / size + _Z95**2 / (4 * size**2)) / (1 + _Z95**2 / size)
    # Rounding must not push an end past the mean: at p = 0 and p = 1 they coincide.
    return Estimate(mean, min(mean, max(0.0, shrunk - half)), max(mean, min(1.0, shrunk + half)))


def _effective_size(mean: float, squared_error: float, questions: int, most: float) -> float:
    """Independent yes-or-no draws that would be as uncertain, from ``questions`` to ``most``."""
    if questions == 1 or mean in (0.0, 1.0):
        return questions
    if squared_error == 0:
        return most
    # Few questions tell their spread badly; shrinking by (z / t)^2 turns Wilson's z into Student's t.
    shrink = (_Z95 / _student_quantile(questions - 1)) ** 2
    return min(most, max(questions, mean * (1 - mean) / squared_error * shrink))


def _student(means_P: _Array) -> Estimate:
    error = float(means_P.std(ddof=1)) / math.sqrt(len(means_P)) if len(means_P) > 1 else math.nan
    return student_interval(float(means_P.mean()), error, len(means_P))


def _student_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t: exact at 1 and 2 degrees of freedom, else within 0.2% by Cornish and Fisher."""
    if freedom == 1:
        return 12.706204736432095
    if freedom == 2:
        return 4.302652729911275
    z = _Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, start=1))


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
