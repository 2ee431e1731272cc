"""Accuracy against token budgets. Axes: ``P`` questions, ``K`` samples each, ``J`` token amounts.

At a budget of ``b`` tokens a response counts as right if it is right and no longer than ``b``; a longer one stops after
*spending* ``b``. Two models compare at equal budgets, or at equal mean spending (smaller budget for longer responses).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from forkrl.stats.intervals import Z95, Estimate, as_columns, mean_with_interval, paired_difference

NUM_BUDGETS = 20
RESAMPLES = 1000
FRACTIONS = tuple(0.05 * step for step in range(1, 21))

Floats = npt.NDArray[np.float64]
_ROUNDING = 1e-6
"""An interpolated budget must include the response whose length it is."""


class Outcomes(NamedTuple):
    """Scores and lengths (tokens), both ``[P, K]``."""

    scores: Floats
    tokens: Floats

    def within(self, budget: float) -> Floats:
        """``[P, K]`` scores, 0 for responses longer than ``budget`` tokens."""
        return np.where(self.tokens <= budget, self.scores, 0.0)

    def spent(self, budget: float) -> float:
        """Mean tokens per response when stopped at ``budget``."""
        return float(np.minimum(self.tokens, budget).mean())


def token_budgets(tokens: Floats) -> list[int]:
    """About 20 log-spaced budgets, from the length of a short response to the longest."""
    longest = max(1, round(float(tokens.max())))
    short = max(1, int(np.quantile(tokens, 0.01)))
    return sorted({*(round(float(budget)) for budget in np.geomspace(short, longest, NUM_BUDGETS)), longest})


def budget_curve(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Accuracy with its interval, and mean tokens spent, at every budget."""
    return [
        {
            "tokens": budget,
            **as_columns("accuracy", mean_with_interval(outcomes.within(budget))),
            "spent": outcomes.spent(budget),
        }
        for budget in token_budgets(outcomes.tokens)
    ]


def compare_at_budgets(a: Outcomes, b: Outcomes) -> list[dict[str, Any]]:
    """Both accuracies and their paired difference at equal budgets; row p is the same question on both sides."""
    return [
        {
            "tokens": budget,
            **as_columns("a", mean_with_interval(a.within(budget))),
            **as_columns("b", mean_with_interval(b.within(budget))),
            **as_columns("difference", paired_difference(a.within(budget), b.within(budget))),
            "spent_a": a.spent(budget),
            "spent_b": b.spent(budget),
        }
        for budget in token_budgets(np.concatenate([a.tokens.ravel(), b.tokens.ravel()]))
    ]


class Spending:
    """Accuracy as a function of mean tokens spent, for any question weights.

    Spending is continuous and increasing in the budget, so each amount up to the mean length has one budget.
    """

    def __init__(self, outcomes: Outcomes) -> None:
        samples = outcomes.tokens.shape[1]
        order = np.argsort(outcomes.tokens, axis=None, kind="stable")
        self._lengths = outcomes.tokens.ravel()[order]
        self._scores = outcomes.scores.ravel()[order]
        self._questions = np.arange(outcomes.tokens.size)[order] // samples
        self._samples = samples
        self.num_questions = len(outcomes.tokens)

    def at(self, amounts: Floats, weights_P: Floats) -> tuple[Floats, Floats]:
        """Budgets with these mean spendings, and the accuracies there, ``[J]`` each."""
        weights = weights_P[self._questions]
        total = weights_P.sum() * self._samples
        counted = np.cumsum(weights)
        spent = (np.cumsum(weights * self._lengths) + self._lengths * (total - counted)) / total
        budgets = np.interp(amounts, np.append(0.0, spent), np.append(0.0, self._lengths))
        right = np.append(0.0, np.cumsum(weights * self._scores))
        accuracies = right[np.searchsorted(self._lengths, budgets + _ROUNDING, side="right")] / total
        return budgets, accuracies

    def mean_length(self, weights_P: Floats) -> float:
        """Mean response length in tokens: the spending without a budget."""
        return float(weights_P[self._questions] @ self._lengths / (weights_P.sum() * self._samples))


def compare_at_equal_spending(a: Outcomes, b: Outcomes, seed: int) -> list[dict[str, Any]]:
    """Both accuracies and their paired difference at equal mean spending; row p is the same question.

    The amounts are twentieths of the smaller mean length; at the last one that side is complete. Amounts and budgets
    depend on the data, so the interval covers the 95% range of ``RESAMPLES`` question resamples with their own
    budgets, and the interval at the budgets found, which has a width even if all responses agree.
    """
    sides = (Spending(a), Spending(b))
    ones = np.ones(sides[0].num_questions)
    amounts = np.array(FRACTIONS) * min(side.mean_length(ones) for side in sides)
    (budgets_a, accuracy_a), (budgets_b, accuracy_b) = (side.at(amounts, ones) for side in sides)
    differences = accuracy_b - accuracy_a
    lows, highs = _resampled_ends(sides, differences, seed)
    rows = []
    for j in range(len(amounts)):
        cut = paired_difference(a.within(budgets_a[j] + _ROUNDING), b.within(budgets_b[j] + _ROUNDING))
        interval = Estimate(float(differences[j]), min(cut.low, float(lows[j])), max(cut.high, float(highs[j])))
        rows.append(
            {
                "spent": float(amounts[j]),
                "budget_a": float(budgets_a[j]),
                "budget_b": float(budgets_b[j]),
                "a": float(accuracy_a[j]),
                "b": float(accuracy_b[j]),
                **as_columns("difference", interval),
            }
        )
    return rows


def _resampled_ends(sides: tuple[Spending, Spending], differences: Floats, seed: int) -> tuple[Floats, Floats]:
    """Percentile interval of the ``[J]`` differences, which are not smooth; NaN with one question."""
    questions = sides[0].num_questions
    if questions == 1:
        unknown = np.full(len(FRACTIONS), math.nan)
        return unknown, unknown
    generator = np.random.default_rng(seed)
    found = np.empty((RESAMPLES, len(FRACTIONS)))
    for row in found:
        weights_P = generator.multinomial(questions, np.full(questions, 1 / questions)).astype(np.float64)
        amounts = np.array(FRACTIONS) * min(side.mean_length(weights_P) for side in sides)
        (_, before), (_, after) = (side.at(amounts, weights_P) for side in sides)
        row[:] = after - before
    # Resampling n questions gives (n - 1) / n of the variance, and a small n estimates the spread poorly.
    widening = math.sqrt(questions / (questions - 1)) * float(stdtrit(questions - 1, 0.975)) / Z95
    ends = differences + widening * (np.quantile(found, (0.025, 0.975), axis=0) - differences)
    lows, highs = np.clip(ends, -1.0, 1.0)
    return lows, highs
