"""What an evaluation's responses say, against brute force, hand-worked values and simulated truth."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from forkrl.evaluation.budgets import Outcomes, Spending, token_budgets
from forkrl.evaluation.folder import ScoredResponse
from forkrl.evaluation.majority import Ballot, ballot, majority_at_k
from forkrl.evaluation.paper import AVERAGE, TABLE_2
from forkrl.evaluation.summary import by_question, mean_over_benchmarks, summarise_benchmark
from forkrl.report.formatting import interval_of
from forkrl.stats.intervals import Estimate, as_columns, mean_with_interval, mean_with_normal_interval
from forkrl.types import FAILURES

SIMULATIONS = 200


def response(question: str, sample: int, answer: str | None, score: float = 0.0, **changes: object) -> ScoredResponse:
    made = ScoredResponse(question, sample, 10, True, 0.5, score, "", answer)
    return replace(made, **changes)  # type: ignore[arg-type]


def answered(question: str, answers: Sequence[str], gold: str = "r") -> list[ScoredResponse]:
    """Responses that are right where the answer starts with ``gold``: "r", "r2" are two spellings of it."""
    return [response(question, i, a, float(a.startswith(gold))) for i, a in enumerate(answers)]


def majority_is_right(answers: Sequence[str]) -> float:
    """One vote, as it is defined: "r…" is one class, "" does not vote, ties share."""
    votes = Counter("r" if answer.startswith("r") else answer for answer in answers if answer)
    if not votes:
        return 0.0
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return ("r" in winners) / len(winners)


@pytest.mark.parametrize(
    ("answers", "k", "expected"),
    [
        (["r", "r", "w"], 1, 2 / 3),
        (["r", "r", "w"], 2, 1 / 3 + 2 / 3 * 1 / 2),  # rr wins, rw ties
        (["r", "r", "w"], 3, 1),
        (["r", "r2", "w", "w"], 4, 1 / 2),  # two spellings of the right answer are one class
        (["r", "u", "v", "w"], 4, 1 / 4),
        (["r", "", "", ""], 4, 1),  # no answer, no vote
        (["r", "", "", ""], 2, 1 / 2),
        (["", "", "", ""], 2, 0),
        (["w", "w", "", ""], 2, 0),
    ],
)
def test_majority_by_hand(answers: list[str], k: int, expected: float) -> None:
    assert majority_at_k(ballot(answered("q", answers)), [k]) == pytest.approx([expected])


def test_majority_equals_counting_every_subset() -> None:
    generator = np.random.default_rng(0)
    names = ["r", "r2", "a", "b", "c", ""]
    for _ in range(60):
        total = int(generator.integers(1, 10))
        answers = [names[i] for i in generator.choice(6, total, p=generator.dirichlet(np.full(6, 0.6)))]
        for k in range(1, total + 1):
            subsets = list(itertools.combinations(answers, k))
            expected = sum(map(majority_is_right, subsets)) / len(subsets)
            assert majority_at_k(ballot(answered("q", answers)), [k]) == pytest.approx([expected], abs=1e-12)


@pytest.mark.parametrize(
    "votes",
    [Ballot(300, (200, 100, 50), 374), Ballot(64, (1,) * 200, 0), Ballot(0, (1024,), 0), Ballot(40, (1,) * 24, 0)],
)
def test_many_votes_stay_probabilities(votes: Ballot) -> None:
    numbers = [1, 2, 4, 8, 16, 32, 64]
    values = majority_at_k(votes, numbers)
    assert all(0 <= value <= 1 for value in values)
    assert values[0] == pytest.approx(votes.right / (votes.right + sum(votes.wrong) + votes.silent))


def small_benchmark() -> list[ScoredResponse]:
    """Two questions of four: one mostly right, one with a failure, a cut response, and one without an answer."""
    first = [response("a", i, "7", 1.0, tokens=length) for i, length in enumerate((10, 20, 30))]
    first.append(response("a", 3, "8", 0.0, tokens=100, finished=False))
    second = [
        response("b", 0, "1", 0.0, tokens=40, entropy=1.5),
        response("b", 1, "", 0.0, tokens=50),
        response("b", 2, None, 0.0, tokens=60, failure="timeout"),
        response("b", 3, "2", 1.0, tokens=30),
    ]
    return first + second


def figures_of(responses: list[ScoredResponse], samples: int) -> dict[str, Any]:
    """The row of the benchmark."""
    (figures,) = summarise_benchmark("x", responses, samples)["benchmarks"]
    return figures


def passes_of(responses: list[ScoredResponse], samples: int, measure: str) -> dict[int, float]:
    """pass@k or maj@k by k."""
    return {row["k"]: row[measure] for row in summarise_benchmark("x", responses, samples)["passes"]}


def test_every_figure_of_a_small_benchmark_by_hand() -> None:
    tables = summarise_benchmark("x", small_benchmark()[::-1], 4)
    (figures,) = tables["benchmarks"]
    scores, lengths = [[1, 1, 1, 0], [0, 0, 0, 1]], [[10, 20, 30, 100], [40, 50, 60, 30]]
    assert (figures["benchmark"], figures["questions"], figures["samples"]) == ("x", 2, 4)
    assert interval_of(figures, "accuracy") == mean_with_interval(scores)
    assert interval_of(figures, "length") == mean_with_normal_interval(lengths)
    assert figures["length_right"] == pytest.approx(90 / 4)
    assert figures["length_wrong"] == pytest.approx(250 / 4)
    assert interval_of(figures, "length_gap") == pytest.approx(mean_with_normal_interval([[80], [20]]))
    assert figures["entropy"] == pytest.approx((0.5 * 300 + 1.5 * 40) / 340)
    assert passes_of(small_benchmark(), 4, "pass") == pytest.approx({1: 0.5, 2: (1 + 1 / 2) / 2, 4: 1.0})
    # Of a's pairs 3 are right and 3 tie; b votes 1 right, 1 wrong, 2 silent: pairs r1 ½, rs 1, rs 1, 1s 0, 1s 0, ss 0.
    assert passes_of(small_benchmark(), 4, "majority") == pytest.approx(
        {1: 0.5, 2: (4.5 / 6 + 2.5 / 6) / 2, 4: (1 + 0.5) / 2}
    )
    assert (figures["truncated"], figures["unparsed"]) == (1 / 8, 1 / 8)
    assert [figures[f"failed_{reason}"] for reason in FAILURES] == [1, 0, 0, 0]
    json.dumps(tables)


def test_maj_at_1_is_pass_at_1_is_accuracy() -> None:
    generator = np.random.default_rng(1)
    rows = [answered(str(q), [("r", "a", "b", "")[i] for i in generator.integers(0, 4, 8)]) for q in range(30)]
    tables = summarise_benchmark("x", [each for row in rows for each in row], 8)
    accuracy = interval_of(tables["benchmarks"][0], "accuracy")
    for name in ("pass", "majority"):
        assert interval_of(tables["passes"][0], name) == pytest.approx(accuracy), name
    assert [row["k"] for row in tables["passes"]] == [1, 2, 4, 8]


def test_a_verifier_may_name_only_missing_answers_like_that_of_programs() -> None:
    programs = [replace(each, answer="" if each.sample == 0 else None, failure="") for each in small_benchmark()]
    assert figures_of(programs, 4)["unparsed"] == 1 / 4
    assert np.isnan([*passes_of(programs, 4, "majority").values()]).all()


def test_without_answers_there_is_no_majority_and_nothing_is_called_unparsed() -> None:
    silent = [replace(each, answer=None) for each in small_benchmark()]
    assert np.isnan([*passes_of(silent, 4, "majority").values(), figures_of(silent, 4)["unparsed"]]).all()
    failed = [replace(each, failure="crash", score=0.0, answer=None, entropy=None) for each in small_benchmark()]
    figures = figures_of(failed, 4)
    assert np.isnan([*passes_of(failed, 4, "majority").values(), figures["entropy"], figures["length_right"]]).all()
    assert [figures[f"failed_{reason}"] for reason in FAILURES] == [0, 8, 0, 0]


def test_the_budget_curve_counts_longer_responses_as_wrong() -> None:
    tables = summarise_benchmark("x", small_benchmark(), 4)
    curve = {row["tokens"]: row for row in tables["budget"]}
    assert max(curve) == 100
    assert interval_of(curve[100], "accuracy") == interval_of(tables["benchmarks"][0], "accuracy")
    for budget, row in curve.items():
        right = [[float(length <= budget) for length in (10, 20, 30)] + [0.0], [0.0, 0.0, 0.0, float(budget >= 30)]]
        assert interval_of(row, "accuracy") == pytest.approx(mean_with_interval(right))
        lengths = [10, 20, 30, 100, 40, 50, 60, 30]
        assert row["spent"] == pytest.approx(sum(min(each, budget) for each in lengths) / 8)
    assert summarise_benchmark("x", [response("q", 0, "", tokens=0)], 1)["budget"][0]["tokens"] == 1


def test_budgets_span_the_lengths_evenly() -> None:
    budgets = token_budgets(np.exp(np.random.default_rng(0).normal(7, 1, (50, 4))).round())
    ratios = np.diff(np.log(budgets))
    assert 18 <= len(budgets) <= 21 and ratios.max() < 1.2 * ratios.min()


@pytest.mark.parametrize("amount", [1.0, 7.5, 12.0, 24.0, 1e9])
def test_spending_finds_the_budget_that_costs_so_much(amount: float) -> None:
    outcomes = Outcomes(np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), np.array([[5.0, 20.0, 9.0], [33.0, 60.0, 17.0]]))
    (budgets,), (accuracies,) = ([*each] for each in Spending(outcomes).at(np.array([amount]), np.ones(2)))
    spent = np.minimum(outcomes.tokens, budgets).mean()
    assert spent == pytest.approx(min(amount, outcomes.tokens.mean()))
    assert accuracies == pytest.approx(outcomes.scores[outcomes.tokens <= budgets + 1e-9].sum() / 6)


def test_an_amount_that_rounding_put_below_a_response_still_pays_for_it() -> None:
    outcomes = Outcomes(np.array([[1.0, 1.0, 1.0]]), np.array([[10.0, 10.0, 30.0]]))
    (_, (accuracy,)) = Spending(outcomes).at(np.array([np.nextafter(10.0, 0)]), np.ones(1))
    assert accuracy == 2 / 3


def test_spending_of_weighted_questions_is_that_of_repeated_ones() -> None:
    generator = np.random.default_rng(2)
    outcomes = Outcomes(generator.integers(0, 2, (6, 3)).astype(float), generator.integers(1, 90, (6, 3)).astype(float))
    weights = np.array([0, 2, 1, 0, 3, 0])
    repeated = Outcomes(*(np.repeat(each, weights, axis=0) for each in outcomes))
    amounts = np.linspace(1, 0.99 * repeated.tokens.mean(), 9)
    found = Spending(outcomes).at(amounts, weights.astype(float))
    expected = Spending(repeated).at(amounts, np.ones(6))
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(("samples", "says"), [(3, "question a has 4 responses"), (5, "not samples 0 to 4")])
def test_a_question_without_all_its_samples_is_refused(samples: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        summarise_benchmark("x", small_benchmark(), samples)


def test_responses_are_sorted_whatever_their_order() -> None:
    rows = by_question(small_benchmark()[::-1], 4)
    assert list(rows) == ["a", "b"] and [each.sample for each in rows["b"]] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no responses"):
        by_question([], 4)


def test_intervals_of_accuracy_and_majority_cover_the_truth() -> None:
    """Difficulties p ~ Beta(1, 1); all wrong responses agree, so maj@4 is p⁴ + 4p³q + 3p²q² in a question."""
    generator = np.random.default_rng(3)
    truth = {"accuracy": 0.5, "maj": 1 / 5 + 4 * (1 / 4 - 1 / 5) + 3 * math.gamma(3) ** 2 / math.gamma(6)}
    covered = Counter[str]()
    for _ in range(SIMULATIONS):
        right = generator.random((40, 4)) < generator.random((40, 1))
        responses = [
            response(f"{q:02}", k, "r" if right[q, k] else "w", float(right[q, k])) for q in range(40) for k in range(4)
        ]
        tables = summarise_benchmark("x", responses, 4)
        found = {"accuracy": interval_of(tables["benchmarks"][0], "accuracy")}
        found["maj"] = interval_of(tables["passes"][2], "majority")
        for name, estimate in found.items():
            covered[name] += estimate.low <= truth[name] <= estimate.high
    for name, count in covered.items():
        assert 0.91 <= count / SIMULATIONS <= 0.99, name


@pytest.mark.parametrize("size", ["8B", "14B", "32B"])
def test_the_papers_rows_have_the_papers_averages(size: str) -> None:
    for which in (0, 1):
        mean = sum(sizes[size][which] for sizes in TABLE_2.values()) / len(TABLE_2)
        assert mean == pytest.approx(AVERAGE[size][which], abs=0.0101)


def test_the_mean_over_benchmarks_weighs_each_alike() -> None:
    rows = [as_columns("accuracy", Estimate(0.2, 0.1, 0.3)) | as_columns("length", Estimate(10, 7, 13))] * 2
    rows[1] = as_columns("accuracy", Estimate(0.6, 0.5, 0.7)) | as_columns("length", Estimate(30, 26, 34))
    (mean,) = mean_over_benchmarks(rows)
    assert interval_of(mean, "accuracy") == pytest.approx((0.4, 0.4 - 0.1 / 2**0.5, 0.4 + 0.1 / 2**0.5))
    assert interval_of(mean, "length") == pytest.approx((20, 17.5, 22.5))
    assert mean_over_benchmarks(rows[:1]) == []
