"""Paired comparison: hand-worked values, brute force, and simulated nulls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from forkrl.errors import UserError
from forkrl.evaluation import budgets, permutation
from forkrl.evaluation.budgets import Outcomes, compare_at_equal_spending
from forkrl.evaluation.comparison import compare
from forkrl.evaluation.permutation import drawn_sign_flip_p, exact_sign_flip_p, holm
from forkrl.evaluation.responses import ScoredResponse
from forkrl.intervals import Estimate, mean_of_estimates, mean_of_question_values, paired_difference, student_interval

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
            made.append(ScoredResponse(question, k, "text", length, True, None, float(score), "", answer))
    return made


def enumerated_p(differences: Sequence[float]) -> float:
    seen = abs(sum(differences)) - 1e-9
    signs = list(itertools.product((-1, 1), repeat=len(differences)))
    return float(np.mean([abs(np.dot(each, differences)) >= seen for each in signs]))


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1, 1, 1, 1, 1], 2 / 32), ([3], 1.0), ([0, 0], 1.0), ([2, 2, -2], 1.0), ([4, 2, 0], 0.5), ([16] * 10, 2**-9)],
)
def test_sign_flips_by_hand(differences: list[int], p: float) -> None:
    assert exact_sign_flip_p(differences) == pytest.approx(p)


def test_the_exact_test_equals_going_through_all_signs() -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        differences = generator.integers(-5, 6, int(generator.integers(1, 11))) * int(generator.integers(1, 4))
        assert exact_sign_flip_p(differences.tolist()) == pytest.approx(enumerated_p(differences.tolist()))


def test_draws_come_close_to_the_exact_test_and_never_to_zero() -> None:
    differences = np.array([0.5, -0.25, 0.75, 0.1, 0.3, 0.0, -0.2, 0.6])
    assert drawn_sign_flip_p(differences, seed=1) == pytest.approx(enumerated_p(differences.tolist()), abs=0.01)
    assert drawn_sign_flip_p(differences, seed=1) == drawn_sign_flip_p(differences, seed=1)
    assert drawn_sign_flip_p(np.full(60, 0.1), seed=1) == 1 / (permutation.DRAWS + 1)
    assert drawn_sign_flip_p(np.zeros(3), seed=1) == 1.0


def test_a_null_is_rejected_one_time_in_twenty() -> None:
    """Questions of every difficulty, both models alike: P(p < 5%) is 5%, less what a discrete test cannot reach."""
    generator = np.random.default_rng(4)
    rejected = 0
    for _ in range(1000):
        right = generator.random((2, 25, 8)) < generator.random((1, 25, 1))
        counts = right.sum(axis=2)
        rejected += exact_sign_flip_p((counts[1] - counts[0]).tolist()) < 0.05
    assert 0.03 < rejected / 1000 < 0.065


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


A = [[1, 0], [0, 0], [1, 1], [0, 0]]
B = [[1, 1], [0, 1], [1, 1], [0, 0]]


def test_a_comparison_by_hand() -> None:
    tokens_b = [[20, 20], [40, 40], [20, 20], [20, 20]]
    found = compare({"x": responses(A)}, {"x": responses(B, tokens_b)})
    (row,) = found["benchmarks"]
    assert (row["questions"], row["samples"], row["better"], row["worse"], row["same"]) == (
        4,
        {"a": 2, "b": 2},
        2,
        0,
        2,
    )
    assert row["accuracy"]["difference"] == paired_difference(A, B)._asdict()
    assert (row["accuracy"]["a"]["mean"], row["accuracy"]["b"]["mean"]) == (3 / 8, 5 / 8)
    assert (row["p"], row["p_method"], row["p_holm"]) == (0.5, "exact", 0.5)
    assert row["length"]["difference"]["mean"] == 15
    assert row["pass@k"]["2"] == {
        "a": 0.5, "b": 0.75, "difference": paired_difference([[1], [0], [1], [0]], [[1], [1], [1], [0]])._asdict(),
    }  # fmt: skip
    # Wrong answers of A and B are all different: one right of two ties.
    assert (row["maj@k"]["2"]["a"], row["maj@k"]["2"]["b"]) == (3 / 8, 5 / 8)
    assert [each["question"] for each in row["changes"]] == ["q000", "q001"]
    assert (found["pooled"], found["notices"]) == (None, [])


def test_equal_budgets_and_equal_spending_take_the_longer_answers_away() -> None:
    """B's gain comes with 40 tokens where A has 10: at 10 tokens each, B has no right answer of that question left."""
    tokens_b = [[20, 20], [40, 40], [20, 20], [20, 20]]
    (row,) = compare({"x": responses(A)}, {"x": responses(B, tokens_b)})["benchmarks"]
    at = {each["tokens"]: each for each in row["budget"]}
    assert (at[40]["a"]["mean"], at[40]["b"]["mean"], at[40]["spent_a"], at[40]["spent_b"]) == (3 / 8, 5 / 8, 10, 25)
    assert (at[10]["a"]["mean"], at[10]["b"]["mean"]) == (3 / 8, 0)
    matched = row["length_matched"]
    assert matched == row["equal_spending"][-1]
    assert (matched["spent"], matched["a"], matched["b"], matched["budget_b"]) == (10, 3 / 8, 0, 10)
    assert matched["difference"]["mean"] == -3 / 8


def test_the_same_evaluation_twice_differs_in_nothing() -> None:
    generator = np.random.default_rng(5)
    tokens = generator.integers(5, 300, (12, 4)).tolist()
    scores = generator.integers(0, 2, (12, 4)).tolist()
    found = compare({"x": responses(scores, tokens)}, {"x": responses(scores, tokens)})
    (row,) = found["benchmarks"]
    assert row["p"] == 1 and row["changes"] == []
    for each in (row["accuracy"], row["length"], row["length_matched"], *row["budget"], *row["equal_spending"]):
        assert each["difference"] == {"mean": 0, "low": 0, "high": 0}


def test_sample_counts_may_differ_and_fractions_are_drawn() -> None:
    (row,) = compare({"x": responses(A)}, {"x": responses([[*each, 0.5] for each in B])})["benchmarks"]
    assert (row["samples"], row["p_method"]) == ({"a": 2, "b": 3}, "draws")
    assert row["p"] == pytest.approx(enumerated_p([2.5 / 3 - 1 / 2, 1.5 / 3, 2.5 / 3 - 1, 0.5 / 3]), abs=0.01)
    (row,) = compare({"x": responses([[*each, 1, 0] for each in A])}, {"x": responses(B)})["benchmarks"]
    assert list(row["pass@k"]) == list(row["maj@k"]) == ["1", "2"]
    (row,) = compare({"x": responses(A)}, {"x": responses([[*each, 1] for each in B])})["benchmarks"]
    assert row["p_method"] == "exact"
    assert row["p"] == pytest.approx(enumerated_p([3 - 3 / 2, 2 - 0, 3 - 3, 1 - 0]))


def test_questions_that_only_one_side_has_are_left_out_with_a_notice() -> None:
    found = compare(
        {"x": responses(A, questions=["a", "b", "c", "d"]), "mine": responses(A)},
        {"x": responses(B, questions=["c", "b", "y", "z"]), "yours": responses(A)},
    )
    (row,) = found["benchmarks"]
    assert row["questions"] == 2
    assert row["accuracy"]["difference"]["mean"] == ((1 - 1) + (0.5 - 0)) / 2
    assert found["notices"] == [
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
    (row,) = compare({"x": responses(A[:1])}, {"x": responses(B[:1])})["benchmarks"]
    assert all(math.isnan(row[name]["difference"]["low"]) for name in ("accuracy", "length", "length_matched"))


def test_pooling_weighs_benchmarks_alike() -> None:
    same = [[0, 0], [1, 0]]
    found = compare({"x": responses(A), "y": responses(same)}, {"x": responses(B), "y": responses(same)})
    pooled = found["pooled"]
    assert pooled["accuracy"]["difference"]["mean"] == (2 / 8 + 0) / 2
    assert (pooled["accuracy"]["a"], pooled["accuracy"]["b"]) == ((3 / 8 + 1 / 4) / 2, (5 / 8 + 1 / 4) / 2)
    assert pooled["p"] == pytest.approx(0.5, abs=0.02)
    zeros, wins, loss = [[0.0]] * 4, [[1.0]] * 4, [[1.0]]  # a loss in one of one question weighs as much as four wins
    even = compare({"x": responses(zeros), "y": responses(loss)}, {"x": responses(wins), "y": responses(zeros[:1])})
    assert even["pooled"]["accuracy"]["difference"]["mean"] == 0 and even["pooled"]["p"] == 1
    one = compare({"x": responses(A), "y": responses(same[:1])}, {"x": responses(B), "y": responses(same[:1])})
    assert math.isnan(one["pooled"]["accuracy"]["difference"]["low"])


def test_the_mean_of_two_estimates_is_welchs() -> None:
    x, y = np.array([1.0, 2, 4, 7]), np.array([3.0, 3.5, 1, 0, 2, 2.5])
    found = mean_of_estimates([paired_difference(np.zeros((len(v), 1)), v[:, None]) for v in (x, -y)], [4, 6])
    welch = scipy.stats.ttest_ind(x, y, equal_var=False)
    error = math.sqrt(x.var(ddof=1) / 4 + y.var(ddof=1) / 6) / 2
    half = float(scipy.stats.t.ppf(0.975, math.floor(welch.df))) * error
    mean = (x.mean() - y.mean()) / 2
    assert found == pytest.approx((mean, mean - half, mean + half), rel=3e-3)
    assert mean_of_estimates([Estimate(1, 1, 1), Estimate(2, 2, 2)], [5, 5]) == (1.5, 1.5, 1.5)


def test_the_freedom_of_a_mean_of_estimates_lies_between_the_least_and_the_sum() -> None:
    values = np.random.default_rng(8).normal(0, 1, 12)[:, None]
    twice = mean_of_estimates([paired_difference(np.zeros((12, 1)), sign * values) for sign in (1, -1)], [12, 12])
    half = float(scipy.stats.t.ppf(0.975, 22)) * float(values.std(ddof=1)) / math.sqrt(12) / math.sqrt(2)
    assert twice == pytest.approx((0, -half, half), rel=1e-3, abs=1e-9)


def test_the_largest_changes_come_first_and_lost_ones_count() -> None:
    before = [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    after = [[0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    (row,) = compare({"x": responses(before)}, {"x": responses(after)})["benchmarks"]
    assert [(each["question"], each["difference"]) for each in row["changes"]] == [
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
    assert math.isnan(student_interval(1.0, 0.5, 1).low)


def test_the_interval_at_equal_spending_covers_the_truth() -> None:
    """Responses of A have 1 to 100 tokens, B's 1 to 200 and more of them right, whatever their length."""
    generator = np.random.default_rng(6)
    covered, count = 0, 40
    for _ in range(count):
        sides = []
        for gain, longest in ((0.0, 100), (0.1, 200)):
            tokens = generator.integers(1, longest + 1, (60, 8)).astype(float)
            right = generator.random((60, 8)) < generator.random((60, 1)) * 0.5 + 0.2 + gain
            sides.append(Outcomes(right.astype(float), tokens))
        last = compare_at_equal_spending(sides[0], sides[1], seed=0)[-1]
        # A is whole and spends 50.5; B spends as much at the budget b where b - b² / 400 = 50.5.
        budget = 200 * (1 - math.sqrt(1 - 50.5 / 100))
        truth = 0.55 * budget / 200 - 0.45
        covered += last["difference"]["low"] <= truth <= last["difference"]["high"]
    assert covered >= 0.85 * count
