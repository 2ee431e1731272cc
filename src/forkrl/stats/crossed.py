"""Means over seeds and questions that are both samples: an interval that covers new seeds *and* new questions.

Axes: ``S`` seeds (training runs), ``P`` questions; every run answers the same questions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from forkrl.stats.intervals import Estimate

Floats = npt.NDArray[np.float64]
POWER = 0.8
_MOST_SEEDS = 1000


class Crossed(NamedTuple):
    """A mean over ``S`` seeds and ``P`` questions with its standard error.

    ``squares``: mean squares of seeds, questions and residual, each over ``S * P``, so that the squared standard error
    is seeds + questions - residual.
    """

    mean: float
    shape: tuple[int, int]
    squares: tuple[float, float, float]

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(_square_and_freedom(self.squares, self.shape)[0])

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the standard error."""
        return _square_and_freedom(self.squares, self.shape)[1]

    @property
    def estimate(self) -> Estimate:
        """With Student's 95% interval."""
        half = float(stdtrit(self.freedom, 0.975)) * self.error
        return Estimate(self.mean, self.mean - half, self.mean + half)

    @property
    def p(self) -> float:
        """Two-sided p-value of a mean of 0; below 5% iff the interval excludes 0."""
        if not self.error:
            return 1.0 if not self.mean else 0.0
        return 2 * float(stdtr(self.freedom, -abs(self.mean) / self.error))

    @property
    def detectable(self) -> float:
        """The smallest true difference from 0 that this design finds in 80% of studies, at the 5% level."""
        return self.detectable_with(POWER)

    def detectable_with(self, power: float) -> float:
        """As ``detectable``, found in this share of studies."""
        return float(stdtrit(self.freedom, 0.975) + stdtrit(self.freedom, power)) * self.error

    def seeds_needed(self, distance: float) -> int | None:
        """Seeds, more than now, with which ``distance`` would be detectable; None: it takes more questions."""
        (S, P), (seeds, questions, residual) = self.shape, self.squares
        per_seed, per_question = max(seeds - residual, 0.0) * S, max(questions - residual, 0.0)
        for count in range(S + 1, _MOST_SEEDS):
            rest = residual * S / count
            expected = per_seed / count + rest, per_question + rest, rest
            if self._replace(shape=(count, P), squares=expected).detectable <= distance:
                return count
        return None


def crossed_mean(values_SP: npt.ArrayLike) -> Crossed:
    """Mean of ``[S, P]`` values with the standard error of a crossed random-effects design.

    ``SE^2 = (MS_seeds + MS_questions - MS_residual) / (S P)`` is unbiased for the variance of the mean when seeds and
    questions are random (two-way analysis of variance without replication), with Satterthwaite's degrees of freedom; it
    is not taken below either mean square alone. With a single column it is the one-sample t-test over seeds. Raises
    ValueError for fewer than two seeds.
    """
    values: Floats = np.asarray(values_SP, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or not values.size:
        raise ValueError(f"values have shape {list(values.shape)}; they must be [seeds, questions], two seeds or more")
    (S, P), mean = values.shape, float(values.mean())
    if P == 1:
        return Crossed(mean, (S, P), (float(values.var(ddof=1)) / S, 0.0, 0.0))
    means_S1, means_1P = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    seeds = P * float(((means_S1 - mean) ** 2).sum()) / (S - 1)
    questions = S * float(((means_1P - mean) ** 2).sum()) / (P - 1)
    residual = float(((values - means_S1 - means_1P + mean) ** 2).sum()) / ((S - 1) * (P - 1))
    return Crossed(mean, (S, P), (seeds / (S * P), questions / (S * P), residual / (S * P)))


def _square_and_freedom(squares: tuple[float, float, float], shape: tuple[int, int]) -> tuple[float, float]:
    """Squared standard error and its degrees of freedom; a negative component counts as 0."""
    (S, P), (seeds, questions, residual) = shape, squares
    total = seeds + questions - residual
    if seeds >= max(questions, total):
        return seeds, S - 1
    if questions >= total:
        return questions, P - 1
    spread = seeds**2 / (S - 1) + questions**2 / (P - 1) + residual**2 / ((S - 1) * (P - 1))
    return total, total**2 / spread
