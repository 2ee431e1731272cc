"""maj@k: exact probability that the most frequent answer of ``k`` responses is right, from ``n >= k`` responses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forkrl.evaluation.folder import ScoredResponse

MAX_VOTES = 64
"""Largest k: the cost is quadratic, and larger k add little."""


class Ballot(NamedTuple):
    """Votes per question: right answers, sizes of classes of equal wrong answers (largest first), and non-votes."""

    right: int
    wrong: tuple[int, ...]
    silent: int


def ballot(responses: Sequence[ScoredResponse]) -> Ballot:
    """Votes of the responses to one question; unjudged responses do not vote."""
    wrong = Counter(response.answer or "" for response in responses if response.score != 1)
    silent = wrong.pop("", 0)
    return Ballot(len(responses) - wrong.total() - silent, tuple(sorted(wrong.values(), reverse=True)), silent)


def majority_at_k(votes: Ballot, numbers: Sequence[int]) -> list[float]:
    """The probability that the majority of ``k`` responses is right, for each ``k`` of ``numbers``.

    Unbiased: the mean over all C(n, k) subsets. For each number r of right responses in the subset, dynamic programming
    counts the ways in which no wrong answer has more than r votes. If t wrong answers also have r, right wins in 1 of
    t + 1 cases. A subset without votes is wrong.
    """
    total = votes.right + sum(votes.wrong) + votes.silent
    most = max(numbers)
    favourable = [0.0] * len(numbers)
    for right in range(1, min(votes.right, most) + 1):
        others = _ways_of_others(votes, right, most - right)
        shared = others @ (1 / np.arange(1.0, others.shape[1] + 1))  # by number drawn
        for index, number in enumerate(numbers):
            if number >= right:
                favourable[index] += math.comb(votes.right, right) * float(shared[number - right])
    chances = (ways / math.comb(total, number) for ways, number in zip(favourable, numbers, strict=True))
    return [min(1.0, chance) for chance in chances]  # rounding


def _ways_of_others(votes: Ballot, limit: int, draws: int) -> npt.NDArray[np.float64]:
    """``[draws + 1, ties + 1]``: ways to draw others, by number drawn and answers with ``limit`` votes (maximum)."""
    ways = np.zeros((draws + 1, draws // limit + 1))
    ways[:, 0] = [math.comb(votes.silent, drawn) for drawn in range(draws + 1)]
    for size in votes.wrong:
        after = np.zeros_like(ways)
        for drawn in range(min(size, limit, draws) + 1):
            tie = int(drawn == limit)
            after[drawn:, tie:] += math.comb(size, drawn) * ways[: draws + 1 - drawn, : ways.shape[1] - tie]
        ways = after
    return ways
