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
_ROUNDING = 1e-15


class Crossed(NamedTuple):
    """A mean over ``S`` seeds and ``P`` questions with its standard error, and what the error is made of.

    ``squares``: mean squares of seeds, questions and residual, each over ``S * P``, so that the squared standard error
    is seeds + questions - residual.
    """

    mean: float
    error: float
    freedom: float
    seeds: int
    squares: tuple[float, float, float]

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
        return float(stdtrit(self.freedom, 0.975) + stdtrit(self.freedom, POWER)) * self.error

    def seeds_needed(self, distance: float) -> int | None:
        """Seeds with which a difference of ``distance`` is found in 80% of studies; None: more questions are needed."""
        seeds, questions, residual = self.squares
        per_seed = max(seeds - residual, 0.0) * self.seeds
        per_question = max(questions - residual, 0.0)
        for count in range(2, _MOST_SEEDS):
            error = math.sqrt(per_seed / count + per_question + residual * self.seeds / count)
            if float(stdtrit(count - 1, 0.975) + stdtrit(count - 1, POWER)) * error <= distance:
                return count
        return None


def crossed_mean(values_SP: npt.ArrayLike) -> Crossed:
    """Mean of ``[S, P]`` values with the standard error of a crossed random-effects design.

    ``SE^2 = (MS_seeds + MS_questions - MS_residual) / (S P)`` is unbiased for the variance of the mean when seeds and
    questions are random (two-way analysis of variance without replication); it is not taken below either mean square
    alone. Degrees of freedom after Satterthwaite. With a single column it is the one-sample t-test over seeds. Raises
    ValueError for fewer than two seeds.
    """
    values: Floats = np.asarray(values_SP, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or not values.size:
        raise ValueError(
            f"values have shape {list(values.shape)}; they must be [seeds, questions], with two seeds or more"
        )
    (S, P), mean = values.shape, float(values.mean())
    if P == 1:
        square = float(values.var(ddof=1)) / S
        return Crossed(mean, math.sqrt(square), S - 1, S, (square, 0.0, 0.0))
    means_S1, means_1P = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    freedoms = S - 1, P - 1, (S - 1) * (P - 1)
    sums = (
        P * float(((means_S1 - mean) ** 2).sum()),
        S * float(((means_1P - mean) ** 2).sum()),
        float(((values - means_S1 - means_1P + mean) ** 2).sum()),
    )
    seeds, questions, residual = (total / freedom / (S * P) for total, freedom in zip(sums, freedoms, strict=True))
    # A component that comes out negative counts as 0.
    kept = [(seeds, S - 1), (questions, P - 1), (-residual, freedoms[2])]
    if questions < residual:
        kept = kept[:1]
    elif seeds < residual:
        kept = kept[1:2]
    square = sum(part for part, _ in kept)
    spread = sum(part**2 / freedom for part, freedom in kept)
    freedom = square**2 / spread if spread > _ROUNDING * square**2 else float(freedoms[2])
    return Crossed(mean, math.sqrt(square), freedom, S, (seeds, questions, residual))
