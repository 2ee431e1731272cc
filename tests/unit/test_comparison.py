"""Paired comparison: hand-worked values, brute force, and simulated nulls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from benchmarks import coverage
from forkrl.errors import UserError
from forkrl.evaluation import budgets
from forkrl.evaluation.budgets import Outcomes, compare_at_equal_spending
from forkrl.evaluation.comparison import compare
from forkrl.evaluation.folder import ScoredResponse
from forkrl.evaluation.summary import Tables
from forkrl.report.formatting import interval_of
from forkrl.stats import permutation
from forkrl.stats.intervals import (
    Estimate,
    mean_of_estimates,
    mean_of_question_values,
    paired_difference_of_values,
)
from forkrl.stats.permutation import holm, paired_test, pooled_paired_test

Table = Sequence[Sequence[float]]


def responses(scores: Table, tokens: Table | None = None, questions: Sequence[str] = ()) -> list[ScoredResponse]:
    """A response a score; the answer is 1 where right and else the number of the sample."""
    made = []
    for q, row in enumerate(scores):
        for k, score in enumerate(row):
            question, length = (
                questions[q] if questions else f"q{q:03}",
                int(tokens[q][k]) if tokens is not None else 10,
            )
            answer = "right" if score == 1 else str(k)
            made.append(ScoredResponse(question, k, length, True, None, float(score), "", answer))
    return made


def enumerated_p(a: Table, b: Table) -> float:
    """The exact p-value, over all ways to re-deal each question's pooled responses."""
    dealt: list[list[float]] = []
    for row_a, row_b in zip(a, b, strict=True):
        pooled = np.array([*row_a, *row_b])
        choices = itertools.combinations(range(len(pooled)), len(row_b))
        differences = [pooled[list(c)].mean() - np.delete(pooled, list(c)).mean() for c in choices]
        dealt.append(differences)
    seen = abs(np.mean([np.mean(row_b) - np.mean(row_a) for row_a, row_b in zip(a, b, strict=True)])) - 1e-9
    return float(np.mean([abs(np.mean(each)) >= seen for each in itertools.product(*dealt)]))


def permutation_p(a: Table, b: Table, monkeypatch: pytest.MonkeyPatch) -> float:
    """The p-value of the permutation test alone."""
    monkeypatch.setattr(permutation, "_reconcile", lambda difference, p: (difference, p))
    return paired_test(np.array(a, dtype=float), np.array(b, dtype=float)).p


@pytest.mark.parametrize(("samples_a", "samples_b"), [(1, 1), (2, 2), (1, 3), (3, 2)])
def test_the_exact_test_equals_going_through_all_deals(
    samples_a: int, samples_b: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        a, b = (generator.integers(0, 2, (4, samples)).tolist() for samples in (samples_a, samples_b))
        assert permutation_p(a, b, monkeypatch) == pytest.approx(enumerated_p(a, b))


def test_draws_come_close_to_all_deals_and_never_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = [[0.5, 0.25], [0.0, 0.75], [0.125, 0.5]], [[0.75], [1.0], [0.25]]
    for first, second in ((a, b), (b, a)):
        assert permutation_p(first, second, monkeypatch) == pytest.approx(enumerated_p(first, second), abs=0.01)
    apart = permutation_p([[0.1]] * 60, [[0.9]] * 60, monkeypatch)
    assert apart == 1 / (permutation.DRAWS + 1)


def test_one_sample_each_is_the_sign_test(monkeypatch: pytest.MonkeyPatch) -> None:
    assert permutation_p([[0]] * 6 + [[1]] * 9, [[1]] * 6 + [[1]] * 9, monkeypatch) == pytest.approx(2 / 64)


@pytest.mark.parametrize(
    ("questions", "samples_a", "samples_b", "shape"),
    [(30, 1, 16, (19.0, 1.0)), (30, 1, 16, (0.6, 1.4)), (25, 8, 8, (1.0, 1.0)), (30, 16, 16, (0.05, 0.95))],
)
def test_models_that_are_alike_are_rarely_told_apart(
    questions: int, samples_a: int, samples_b: int, shape: tuple[float, float]
) -> None:
    """The first case was rejected in 49% of simulations by a sign flip of the questions' differences."""
    found = coverage.alike(600, questions, samples_a, samples_b, shape)
    assert found["type I error"] <= 0.06
    assert found["coverage"] >= 0.94


def test_models_that_are_alike_on_average_only_are_rarely_told_apart() -> None:
    assert coverage.alike_on_average(600, 30, 16, 16)["type I error"] <= 0.07


def test_the_test_finds_what_is_there() -> None:
    rejected = [
        paired_test(coverage.scores(generator, chance, 4), coverage.scores(generator, chance + 0.1, 4)).p < 0.05
        for generator in [np.random.default_rng(3)]
        for chance in generator.random((100, 200)) * 0.9
    ]
    assert np.mean(rejected) > 0.9


def test_p_value_and_interval_agree() -> None:
    generator = np.random.default_rng(1)
    rejected = 0
    for _ in range(300):
        chance_P = generator.random(int(generator.integers(2, 40)))
        a, b = (
            coverage.scores(generator, np.clip(chance_P + gain, 0, 1), int(generator.integers(1, 6)))
            for gain in (0.0, 0.15)
        )
        test = paired_test(a, b)
        assert (test.p < 0.05) == (test.difference.low > 0 or test.difference.high < 0)
        assert test.difference.low <= test.difference.mean <= test.difference.high
        rejected += test.p < 0.05
    assert 30 < rejected < 270


def test_benchmarks_that_are_alike_are_rarely_told_apart() -> None:
    found = coverage.pooled_alike(100, (20, 30), 1, 8)
    assert found["type I error"] <= 0.1 and found["coverage"] >= 0.9
    right, wrong = np.ones((30, 2)), np.zeros((30, 2))
    apart = pooled_paired_test([(wrong, right), (wrong, right)])
    assert apart.p == 1 / (permutation.DRAWS + 1) and apart.difference.low > 0.8 and apart.method == "draws"


def test_draws_repeat_with_their_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "_reconcile", lambda difference, p: (difference, p))
    a, b = (np.random.default_rng(seed).random((8, 3)) for seed in (1, 2))
    assert paired_test(a, b) == paired_test(a, b, 0) == paired_test(a, b, 0) != paired_test(a, b, 1)
    pairs = [(a, b), (a, b[::-1])]
    assert pooled_paired_test(pairs) == pooled_paired_test(pairs, 0) == pooled_paired_test(pairs, 0)
    assert pooled_paired_test(pairs, 0) != pooled_paired_test(pairs, 1)


def test_an_exact_p_is_at_most_one() -> None:
    """Rounded, the probabilities of all deals of some of these add up to more."""
    same = np.array([[0.0, 1.0, 1.0]] * 40)
    assert all(paired_test(same[:questions], same[:questions]).p == 1 for questions in range(2, 40))


@pytest.mark.parametrize(
    ("interval", "p", "low", "high", "reconciled_p"),
    [
        ((0.3, 0.1, 0.5), 0.0, 0.1, 0.5, 2 * scipy.stats.norm.sf(1.959964 * 1.5)),
        ((0.3, 0.1, 0.5), 0.04, 0.1, 0.5, 0.04),
        ((0.3, 0.1, 0.5), 0.05, 0.0, 0.5, 0.05),
        ((-0.3, -0.5, -0.1), 0.2, -0.5, 0.0, 0.2),
        ((0.1, -0.1, 0.3), 0.0, -0.1, 0.3, 2 * scipy.stats.norm.sf(1.959964 / 2)),
        ((0.3, math.nan, math.nan), 0.01, math.nan, math.nan, 1.0),
    ],
)
def test_a_test_and_its_interval_are_reconciled_by_hand(
    interval: tuple[float, float, float], p: float, low: float, high: float, reconciled_p: float
) -> None:
    difference, found_p = permutation._reconcile(Estimate(*interval), p)
    assert difference == pytest.approx((interval[0], low, high), nan_ok=True)
    assert found_p == pytest.approx(reconciled_p, rel=1e-5)


@pytest.mark.parametrize(
    ("samples", "k", "shape"), [(16, 8, (4.0, 4.0)), (16, 16, (0.6, 1.4)), (16, 8, (0.6, 1.4)), (8, 4, (9.0, 4.0))]
)
def test_intervals_of_pass_and_majority_cover(samples: int, k: int, shape: tuple[float, float]) -> None:
    assert coverage.passes(400, 30, samples, k, shape)["coverage"] >= 0.92
    assert coverage.majorities(100, 30, samples, k, shape)["coverage"] >= 0.9
    assert coverage.pass_difference(200, 30, samples, k, shape)["coverage"] >= 0.92


def test_shares_over_unequal_clusters_cover() -> None:
    assert coverage.shares(600, 30, 2.0, (0.6, 1.4))["coverage"] >= 0.89
    assert coverage.shares(600, 30, 0.0, (0.6, 1.4))["coverage"] >= 0.92


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


A = [[1, 0], [0, 0], [1, 1], [0, 0]]
B = [[1, 1], [0, 1], [1, 1], [0, 0]]


def compared(a: list[ScoredResponse], b: list[ScoredResponse]) -> Tables:
    """The tables of two evaluations of one benchmark."""
    return compare({"x": a}, {"x": b}).tables


def test_a_comparison_by_hand() -> None:
    tokens_b = [[20, 20], [40, 40], [20, 20], [20, 20]]
    found, notes = compare({"x": responses(A)}, {"x": responses(B, tokens_b)})
    (row,) = found["benchmarks"]
    names = ("benchmark", "questions", "samples_a", "samples_b", "better", "worse", "same")
    assert [row[name] for name in names] == ["x", 4, 2, 2, 2, 0, 2]
    assert row["accuracy_difference"] == 0.25
    assert (row["accuracy_a"], row["accuracy_b"]) == (3 / 8, 5 / 8)
    assert (row["p_method"], row["p_holm"]) == ("exact", row["p"])
    assert row["p"] >= enumerated_p(A, B)
    assert row["length_difference"] == 15
    passes = {(each["measure"], each["k"]): each for each in found["passes"]}
    at_two = passes["pass@k", 2]
    assert (at_two["a"], at_two["b"]) == (0.5, 0.75)
    assert interval_of(at_two, "difference") == paired_difference_of_values([1, 0, 1, 0], [1, 1, 1, 0], 1)
    # Wrong answers of A and B are all different: one right of two ties.
    assert (passes["maj@k", 2]["a"], passes["maj@k", 2]["b"]) == (3 / 8, 5 / 8)
    assert [each["question"] for each in found["changes"]] == ["q000", "q001"]
    assert (found["mean"], notes) == ([], [])


def test_equal_budgets_and_equal_spending_take_the_longer_answers_away() -> None:
    """B's gain comes with 40 tokens where A has 10: at 10 tokens each, B has no right answer of that question left."""
    tokens_b = [[20, 20], [40, 40], [20, 20], [20, 20]]
    found = compared(responses(A), responses(B, tokens_b))
    at = {each["tokens"]: each for each in found["budget"]}
    assert (at[40]["a"], at[40]["b"], at[40]["spent_a"], at[40]["spent_b"]) == (3 / 8, 5 / 8, 10, 25)
    assert (at[10]["a"], at[10]["b"]) == (3 / 8, 0)
    (row,), last = found["benchmarks"], found["spending"][-1]
    assert {f"matched_{name}": value for name, value in last.items() if name != "benchmark"}.items() <= row.items()
    assert (last["spent"], last["a"], last["b"], last["budget_b"]) == (10, 3 / 8, 0, 10)
    assert last["difference"] == -3 / 8


def test_the_same_evaluation_twice_differs_in_nothing_but_is_not_certain() -> None:
    generator = np.random.default_rng(5)
    tokens = generator.integers(5, 300, (12, 4)).tolist()
    for scores in (generator.integers(0, 2, (12, 4)).tolist(), [[1] * 4] * 12, [[0] * 4] * 12):
        found = compared(responses(scores, tokens), responses(scores, tokens))
        (row,) = found["benchmarks"]
        assert row["p"] == 1 and found["changes"] == []
        assert interval_of(row, "length_difference") == (0, 0, 0)
        differences = [interval_of(row, f"{name}_difference") for name in ("accuracy", "matched")]
        others = (each for name in ("budget", "spending", "passes") for each in found[name])
        for difference in (*differences, *(interval_of(each, "difference") for each in others)):
            assert difference.mean == 0 and difference.low < 0 < difference.high


def test_sample_counts_may_differ_and_fractions_are_drawn() -> None:
    (row,) = compared(responses(A), responses([[*each, 0.5] for each in B]))["benchmarks"]
    assert (row["samples_a"], row["samples_b"], row["p_method"]) == (2, 3, "draws")
    passes = compared(responses([[*each, 1, 0] for each in A]), responses(B))["passes"]
    assert [(each["measure"], each["k"]) for each in passes] == [
        ("pass@k", 1), ("pass@k", 2), ("maj@k", 1), ("maj@k", 2),
    ]  # fmt: skip
    (row,) = compared(responses(A), responses([[*each, 1] for each in B]))["benchmarks"]
    assert row["p_method"] == "exact"


def test_questions_that_only_one_side_has_are_left_out_with_a_notice() -> None:
    found, notes = compare(
        {"x": responses(A, questions=["a", "b", "c", "d"]), "mine": responses(A)},
        {"x": responses(B, questions=["c", "b", "y", "z"]), "yours": responses(A)},
    )
    (row,) = found["benchmarks"]
    assert row["questions"] == 2
    assert row["accuracy_difference"] == ((1 - 1) + (0.5 - 0)) / 2
    assert notes == [
        "mine: only A has it; left out.",
        "yours: only B has it; left out.",
        "x: 2 of 4 questions of A are not in the other; left out.",
        "x: 2 of 4 questions of B are not in the other; left out.",
    ]


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(UserError, match=r"no benchmark in common \(x against y\)"):
        compare({"x": responses(A)}, {"y": responses(A)})
    with pytest.raises(UserError, match=r"x: the two evaluations have no question in common \(such as 'a' against 'c'"):
        compare({"x": responses(A[:1], questions=["a"])}, {"x": responses(A[:1], questions=["c"])})


def test_one_question_has_no_interval() -> None:
    (row,) = compared(responses(A[:1]), responses(B[:1]))["benchmarks"]
    assert all(math.isnan(row[f"{name}_difference_low"]) for name in ("accuracy", "length", "matched"))


def test_pooling_weighs_benchmarks_alike() -> None:
    same = [[0, 0], [1, 0]]
    found = compare({"x": responses(A), "y": responses(same)}, {"x": responses(B), "y": responses(same)})
    (mean,) = found.tables["mean"]
    assert mean["accuracy_difference"] == (2 / 8 + 0) / 2
    assert (mean["accuracy_a"], mean["accuracy_b"]) == ((3 / 8 + 1 / 4) / 2, (5 / 8 + 1 / 4) / 2)
    assert mean["p"] >= 0.05 and mean["accuracy_difference_low"] <= 0
    zeros, wins, loss = [[0.0]] * 4, [[1.0]] * 4, [[1.0]]  # a loss in one of one question weighs as much as four wins
    even = compare({"x": responses(zeros), "y": responses(loss)}, {"x": responses(wins), "y": responses(zeros[:1])})
    (mean,) = even.tables["mean"]
    assert mean["accuracy_difference"] == 0 and mean["p"] == 1
    one = compare({"x": responses(A), "y": responses(same[:1])}, {"x": responses(B), "y": responses(same[:1])})
    assert math.isnan(one.tables["mean"][0]["accuracy_difference_low"])


def test_the_ends_of_a_mean_of_estimates_by_hand() -> None:
    found = mean_of_estimates([Estimate(0.5, 0.5 - 0.3, 0.5 + 0.1), Estimate(0.9, 0.9 - 0.4, 0.9)])
    assert found == pytest.approx((0.7, 0.7 - 0.5 / 2, 0.7 + 0.1 / 2))
    assert math.isnan(mean_of_estimates([Estimate(1, 1, 1), Estimate(2, math.nan, math.nan)]).low)


def test_the_largest_changes_come_first_and_lost_ones_count() -> None:
    before = [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    after = [[0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    changes = compared(responses(before), responses(after))["changes"]
    assert [(each["question"], each["difference"]) for each in changes] == [
        ("q000", -0.75), ("q002", 0.5), ("q001", 0.25)
    ]  # fmt: skip


def test_where_all_is_spent_no_response_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "RESAMPLES", 2)
    generator = np.random.default_rng(9)
    for _ in range(200):
        short = Outcomes(np.ones((5, 3)), generator.integers(1, 10_000, (5, 3)).astype(float))
        long = Outcomes(np.ones((5, 3)), short.tokens + 3)
        assert compare_at_equal_spending(short, long, seed=0)[-1]["a"] == 1.0


def test_question_values_beyond_a_share_are_refused() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        mean_of_question_values([0.5, 1.5], 4)


@pytest.mark.parametrize(("longest_b", "least"), [(100, 0.88), (200, 0.88)])
def test_the_interval_at_equal_spending_covers_the_truth(
    longest_b: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses of A have 1 to 100 tokens; B is the same, or has up to 200 and more of them right."""
    monkeypatch.setattr(budgets, "RESAMPLES", 200)
    assert coverage.spending(80, 60, 8, longest_b)["coverage"] >= least


def test_resampling_shows_the_whole_variance() -> None:
    """Of 5 questions with equally long responses, where nothing is cut, the percentiles are near Student's interval."""
    generator = np.random.default_rng(2)
    a, b = (coverage.scores(generator, np.full(5, 0.5), 40) for _ in range(2))
    change_P = b.mean(axis=1) - a.mean(axis=1)
    ends = budgets._resampled_ends(
        (budgets.Spending(Outcomes(a, np.full(a.shape, 9.0))), budgets.Spending(Outcomes(b, np.full(b.shape, 9.0)))),
        np.full(20, change_P.mean()),
        seed=0,
    )
    student = scipy.stats.t.interval(0.95, 4, change_P.mean(), scipy.stats.sem(change_P))
    assert (ends[1] - ends[0])[-1] == pytest.approx(student[1] - student[0], rel=0.08)
