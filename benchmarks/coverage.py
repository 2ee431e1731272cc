"""Coverage of the 95% intervals and type I error of the paired test, simulated with known truth.

    python -m benchmarks.coverage [--simulations 2000]

Coverage should be at least 95%, less the noise of the simulation (0.5 points at 2,000) and a point or two with few
questions. The type I error is the share of p-values below 5% where A and B are alike. Seeds are fixed.

Axes: ``P`` questions, ``K`` samples.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks._record import describe_setting, write_result
from forkrl.evaluation.budgets import Outcomes, compare_at_equal_spending
from forkrl.evaluation.majority import Ballot, majority_at_k
from forkrl.report.formatting import interval_of
from forkrl.stats.intervals import (
    ClusterSums,
    Estimate,
    mean_of_question_values,
    mean_pass_at_k,
    mean_with_interval,
    paired_difference_of_values,
    pass_at_k,
)
from forkrl.stats.permutation import paired_test, pooled_paired_test

Floats = npt.NDArray[np.float64]
Generator = np.random.Generator

MIXED = (0.6, 1.4)  # Beta: mean 0.3, many nearly hopeless questions, some easy
HARD = (0.05, 0.95)  # mean 0.05, nearly all hopeless
EASY = (19.0, 1.0)  # mean 0.95, all easy
_WRONG_ANSWERS = (0.5, 0.3, 0.2)
"""Chances of each wrong answer among the wrong ones, for majority votes."""


def scores(generator: Generator, chance_P: Floats, samples: int) -> Floats:
    """``[P, K]``: 1 with the chance of the question, else 0."""
    return (generator.random((len(chance_P), samples)) < chance_P[:, None]).astype(np.float64)


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def accuracy(simulations: int, questions: int, samples: int, shape: tuple[float, float]) -> dict[str, float]:
    generator = np.random.default_rng(1)
    truth = shape[0] / sum(shape)
    covered = [
        covers(mean_with_interval(scores(generator, generator.beta(*shape, questions), samples)), truth)
        for _ in range(simulations)
    ]
    return {"coverage": float(np.mean(covered))}


def alike(
    simulations: int, questions: int, samples_a: int, samples_b: int, shape: tuple[float, float]
) -> dict[str, float]:
    """A and B have the same chance at each question."""
    generator = np.random.default_rng(2)
    covered = rejected = 0
    for _ in range(simulations):
        chance_P = generator.beta(*shape, questions)
        test = paired_test(scores(generator, chance_P, samples_a), scores(generator, chance_P, samples_b))
        covered += covers(test.difference, 0.0)
        rejected += test.p < 0.05
    return {"coverage": covered / simulations, "type I error": rejected / simulations}


def alike_on_average(simulations: int, questions: int, samples_a: int, samples_b: int) -> dict[str, float]:
    """Each is better at some questions, but not over all questions of the kind."""
    generator = np.random.default_rng(3)
    covered = rejected = 0
    for _ in range(simulations):
        chance_2P = generator.beta(*MIXED, (2, questions))
        chance_2P[1] = np.where(generator.random(questions) < 0.5, chance_2P[0], chance_2P[1])
        test = paired_test(scores(generator, chance_2P[0], samples_a), scores(generator, chance_2P[1], samples_b))
        covered += covers(test.difference, 0.0)
        rejected += test.p < 0.05
    return {"coverage": covered / simulations, "type I error": rejected / simulations}


def better(
    simulations: int, questions: int, samples_a: int, samples_b: int, shape: tuple[float, float], gain: float
) -> dict[str, float]:
    """B fails at a question with ``1 - gain`` of the chance of A."""
    generator = np.random.default_rng(4)
    truth = gain * shape[1] / sum(shape)
    covered = 0
    for _ in range(simulations):
        chance_P = generator.beta(*shape, questions)
        after_P = 1 - (1 - gain) * (1 - chance_P)
        test = paired_test(scores(generator, chance_P, samples_a), scores(generator, after_P, samples_b))
        covered += covers(test.difference, truth)
    return {"coverage": covered / simulations}


def pooled_alike(simulations: int, questions: tuple[int, ...], samples_a: int, samples_b: int) -> dict[str, float]:
    generator = np.random.default_rng(5)
    covered = rejected = 0
    for _ in range(simulations):
        chances = [generator.beta(*MIXED, number) for number in questions]
        pairs = [(scores(generator, each, samples_a), scores(generator, each, samples_b)) for each in chances]
        test = pooled_paired_test(pairs)
        covered += covers(test.difference, 0.0)
        rejected += test.p < 0.05
    return {"coverage": covered / simulations, "type I error": rejected / simulations}


def passes(simulations: int, questions: int, samples: int, k: int, shape: tuple[float, float]) -> dict[str, float]:
    generator = np.random.default_rng(6)
    truth = 1 - math.prod((shape[1] + i) / (sum(shape) + i) for i in range(k))  # 1 - E[(1 - p)^k]
    covered = 0
    for _ in range(simulations):
        right_P = scores(generator, generator.beta(*shape, questions), samples).sum(axis=1)
        covered += covers(mean_pass_at_k(right_P.astype(int).tolist(), samples, k), truth)
    return {"coverage": covered / simulations}


@functools.cache
def _majority(right: int, wrong: tuple[int, ...], k: int) -> float:
    return majority_at_k(Ballot(right, wrong, 0), [k])[0]


def majorities(simulations: int, questions: int, samples: int, k: int, shape: tuple[float, float]) -> dict[str, float]:
    generator = np.random.default_rng(7)

    def values(chance_P: Floats, drawn: int) -> list[float]:
        chances = np.column_stack([chance_P, *((1 - chance_P) * share for share in _WRONG_ANSWERS)])
        votes = generator.multinomial(drawn, chances).tolist()
        return [_majority(right, tuple(sorted(wrong, reverse=True)), k) for right, *wrong in votes]

    truth = float(np.mean(values(generator.beta(*shape, 200_000), k)))
    covered = [
        covers(mean_of_question_values(values(generator.beta(*shape, questions), samples), samples / k), truth)
        for _ in range(simulations)
    ]
    return {"coverage": float(np.mean(covered))}


def pass_difference(
    simulations: int, questions: int, samples: int, k: int, shape: tuple[float, float]
) -> dict[str, float]:
    """Of two that are alike."""
    generator = np.random.default_rng(8)
    covered = 0
    for _ in range(simulations):
        chance_P = generator.beta(*shape, questions)
        sides = [
            [pass_at_k(int(right), samples, k) for right in scores(generator, chance_P, samples).sum(axis=1)]
            for _ in range(2)
        ]
        covered += covers(paired_difference_of_values(sides[0], sides[1], samples / k), 0.0)
    return {"coverage": covered / simulations}


def shares(simulations: int, clusters: int, spread: float, shape: tuple[float, float]) -> dict[str, float]:
    """Zeros and ones in clusters of unequal size: log-normal with mean size 20 at ``spread`` 0."""
    generator = np.random.default_rng(9)
    truth = shape[0] / sum(shape)
    covered = 0
    for _ in range(simulations):
        sizes = np.maximum(1, np.round(20 * np.exp(spread * generator.normal(size=clusters)))).astype(int)
        sums = ClusterSums(2)
        for size, right in zip(sizes, generator.binomial(sizes, generator.beta(*shape, clusters)), strict=True):
            sums.add([right, size])
        covered += covers(sums.share(0, 1), truth)
    return {"coverage": covered / simulations}


def spending(simulations: int, questions: int, samples: int, longest_b: int) -> dict[str, float]:
    """At equal spending: uniform lengths, A's up to 100 tokens; both sides are alike where B's are too."""
    generator = np.random.default_rng(10)
    gain = 0.0 if longest_b == 100 else 0.1
    # A is whole and spends 50.5; B spends as much at the budget b where b - b(b - 1) / (2 * longest) = 50.5.
    middle = longest_b + 0.5
    budget = 100.0 if longest_b == 100 else middle - math.sqrt(middle**2 - 101 * longest_b)
    truth = (0.5 + gain) * budget / longest_b - 0.5
    covered = 0
    for _ in range(simulations):
        chance_P = 0.2 + 0.6 * generator.random(questions)
        sides = [
            Outcomes(
                scores(generator, chance_P + each, samples),
                generator.integers(1, longest + 1, (questions, samples)).astype(np.float64),
            )
            for each, longest in ((0.0, 100), (gain, longest_b))
        ]
        covered += covers(interval_of(compare_at_equal_spending(sides[0], sides[1], seed=0)[-1], "difference"), truth)
    return {"coverage": covered / simulations}


CASES: dict[str, tuple[Callable[..., dict[str, float]], list[tuple[Any, ...]]]] = {
    "accuracy: questions, samples, difficulty": (
        accuracy,
        [(512, 1, MIXED), (200, 4, MIXED), (30, 16, MIXED), (30, 16, HARD), (30, 16, EASY)],
    ),
    "difference, A and B alike: questions, samples of A and B, difficulty": (
        alike,
        [
            (30, 1, 16, MIXED), (30, 1, 16, EASY), (30, 16, 16, MIXED), (30, 4, 64, MIXED), (100, 1, 8, MIXED),
            (200, 4, 4, MIXED), (500, 1, 1, MIXED), (10, 8, 8, MIXED), (100, 1, 1, HARD), (30, 16, 16, HARD),
            (30, 16, 16, EASY),
        ],
    ),
    "difference, alike on average only: questions, samples of A and B": (
        alike_on_average,
        [(30, 1, 16), (30, 16, 16), (200, 4, 4)],
    ),
    "difference, B better: questions, samples of A and B, difficulty, gain": (
        better,
        [(30, 1, 16, MIXED, 0.2), (30, 16, 16, MIXED, 0.2), (100, 1, 1, EASY, 0.5), (200, 4, 4, HARD, 0.1)],
    ),
    "mean difference over benchmarks, alike: questions, samples of A and B": (
        pooled_alike,
        [((30, 40, 200), 1, 16), ((30, 30), 8, 8)],
    ),
    "pass@k: questions, samples, k, difficulty": (
        passes,
        [
            (150, 8, 4, MIXED), (30, 16, 8, MIXED), (30, 16, 8, EASY), (30, 16, 16, EASY), (30, 16, 8, (4, 4)),
            (500, 16, 8, (4, 4)),
        ],
    ),
    "maj@k: questions, samples, k, difficulty": (
        majorities,
        [(150, 8, 4, MIXED), (30, 16, 8, MIXED), (30, 16, 8, EASY), (30, 16, 16, (4, 4)), (500, 16, 8, (9, 4))],
    ),
    "difference of pass@k, alike: questions, samples, k, difficulty": (
        pass_difference,
        [(30, 16, 8, MIXED), (30, 16, 8, (4, 4)), (200, 8, 4, EASY)],
    ),
    "share, unequal clusters: clusters, spread of sizes, difficulty": (
        shares,
        [(30, 0.0, MIXED), (30, 1.0, MIXED), (30, 2.0, MIXED), (100, 1.5, MIXED), (30, 1.5, EASY)],
    ),
    "equal spending: questions, samples, longest response of B": (
        spending,
        [(30, 16, 100), (150, 4, 100), (30, 16, 200), (150, 4, 200)],
    ),
}  # fmt: skip
_SLOW = {spending: 0.1, pooled_alike: 0.25}
"""Share of the simulations, of what takes longer."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulated coverage of intervals.")
    parser.add_argument("--simulations", type=int, default=2000)
    options = parser.parse_args()
    table, cases = Table("what", "case", "coverage", "type I error"), []
    for name, (simulate, settings) in CASES.items():
        for setting in settings:
            found = simulate(round(options.simulations * _SLOW.get(simulate, 1)), *setting)
            cases.append({"what": name, "case": list(setting), **found})
            error = found.get("type I error")
            shown = "" if error is None else f"{error:.1%}"
            table.add_row(name, ", ".join(map(str, setting)), f"{found['coverage']:.1%}", shown)
    Console().print(table)
    write_result("coverage", describe_setting(), cases)


if __name__ == "__main__":
    main()
