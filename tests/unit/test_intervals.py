"""Intervals against hand-worked numbers, brute force and simulated coverage. Axes: P questions, K samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from forkrl.stats.intervals import (
    ClusterSums,
    Estimate,
    mean_pass_at_k,
    mean_with_interval,
    mean_with_normal_interval,
    paired_difference,
    paired_difference_of_values,
    paired_normal_difference,
    pass_at_k,
)

SIMULATIONS = 2000


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_equals_counting_every_subset(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        samples = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(samples, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_correct, num_samples, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_of_huge_counts_neither_overflows_nor_cancels() -> None:
    assert pass_at_k(1, 10**5, 1) == 1e-5
    assert pass_at_k(1, 10**4, 10**3) == 0.1


@pytest.mark.parametrize("arguments", [(-1, 4, 1), (5, 4, 1), (1, 4, 0), (1, 4, 5), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not between"):
        pass_at_k(*arguments)


@pytest.mark.parametrize(("right", "total"), [(0, 40), (1, 40), (17, 40), (40, 40)])
def test_copies_of_one_sample_give_wilson_over_questions(right: int, total: int) -> None:
    """Samples that always agree carry no more than one: the interval is the textbook one for P questions."""
    answers_P = np.array([1.0] * right + [0.0] * (total - right))
    copies = mean_with_interval(np.repeat(answers_P[:, None], 16, axis=1))
    textbook = binomtest(right, total).proportion_ci(method="wilson")
    assert copies == pytest.approx((right / total, textbook.low, textbook.high), abs=1e-12)
    assert mean_with_interval(answers_P[:, None]) == pytest.approx(copies)


def test_questions_of_equal_difficulty_give_wilson_over_samples() -> None:
    scores_PK = np.tile([1.0, 0.0, 0.0, 1.0], (50, 1))
    textbook = binomtest(100, 200).proportion_ci(method="wilson")
    assert mean_with_interval(scores_PK) == pytest.approx((0.5, textbook.low, textbook.high), abs=1e-12)


def test_interval_between_the_extremes_by_hand() -> None:
    """Question means 0, 1/2, 1/2, 1, ... : p = 1/2, var = 8/63, n = (1/4) / (8/63 / 64) · (z/t)^2 = 126 · (z/t)^2."""
    scores_PK = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 16)
    z = float(scipy.stats.norm.ppf(0.975))
    size = 126 * (z / float(scipy.stats.t.ppf(0.975, 63))) ** 2
    half = z * math.sqrt(0.25 / size + z**2 / (4 * size**2)) / (1 + z**2 / size)
    assert mean_with_interval(scores_PK) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_intervals_hold_their_mean_and_stay_in_range(rows: list[list[bool]]) -> None:
    estimate = mean_with_interval(rows)
    assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
    assert estimate.low < estimate.high
    counts = [sum(row) for row in rows]
    assert mean_pass_at_k(counts, 3, 1) == pytest.approx(estimate)


def simulated_scores(rng: np.random.Generator, num_questions: int, num_samples: int) -> np.ndarray:
    """Questions of difficulty Beta(0.6, 1.4): mean 0.3, many nearly hopeless, some easy."""
    difficulty_P1 = rng.beta(0.6, 1.4, size=(num_questions, 1))
    return (rng.random((num_questions, num_samples)) < difficulty_P1).astype(float)


@pytest.mark.parametrize(("num_questions", "num_samples"), [(512, 1), (200, 4), (30, 16)])
def test_coverage_of_the_mean(num_questions: int, num_samples: int) -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(SIMULATIONS):
        estimate = mean_with_interval(simulated_scores(rng, num_questions, num_samples))
        covered += estimate.low <= 0.3 <= estimate.high
    assert 0.93 <= covered / SIMULATIONS <= 0.97


def test_coverage_of_pass_at_k() -> None:
    """Truth by the Beta integral: 1 - E[(1 - p)^k]."""
    rng = np.random.default_rng(8)
    truth = 1 - math.prod((1.4 + i) / (2.0 + i) for i in range(4))
    covered = 0
    for _ in range(SIMULATIONS):
        correct_P = simulated_scores(rng, 150, 8).sum(axis=1).astype(int).tolist()
        estimate = mean_pass_at_k(correct_P, 8, 4)
        covered += estimate.low <= truth <= estimate.high
    assert 0.93 <= covered / SIMULATIONS <= 0.97


def test_coverage_of_pass_at_k_near_one() -> None:
    """30 questions, pass@8 of 16 samples: they hold two independent draws of eight, not sixteen."""
    rng, k, num_samples = np.random.default_rng(8), 8, 16
    truth = 1 - math.prod((3 + i) / (6 + i) for i in range(k))  # questions of Beta(3, 3)
    covered = 0
    for _ in range(SIMULATIONS):
        correct_P = rng.binomial(num_samples, rng.beta(3, 3, 30)).tolist()
        estimate = mean_pass_at_k(correct_P, num_samples, k)
        covered += estimate.low <= truth <= estimate.high
    assert covered / SIMULATIONS >= 0.93


@pytest.mark.parametrize("num_questions", [8, 200])
def test_coverage_of_lengths_and_of_paired_differences(num_questions: int) -> None:
    rng = np.random.default_rng(9)
    lengths_covered = differences_covered = 0
    for _ in range(SIMULATIONS):
        question_P1 = rng.normal(100, 20, size=(num_questions, 1))
        before_PK = question_P1 + rng.normal(0, 10, size=(num_questions, 4))
        after_PK = question_P1 + 3 + rng.normal(0, 10, size=(num_questions, 2))
        lengths, gain = mean_with_normal_interval(before_PK), paired_normal_difference(before_PK, after_PK)
        lengths_covered += lengths.low <= 100 <= lengths.high
        differences_covered += gain.low <= 3 <= gain.high
    assert 0.93 <= lengths_covered / SIMULATIONS <= 0.97
    assert 0.93 <= differences_covered / SIMULATIONS <= 0.97


def test_student_interval_equals_scipy() -> None:
    values_P1 = np.array([[3.0], [5.0], [9.0], [4.0], [4.5]])
    expected = scipy.stats.t.interval(0.95, 4, loc=5.1, scale=float(scipy.stats.sem(values_P1[:, 0])))
    assert mean_with_normal_interval(values_P1) == pytest.approx((5.1, *expected))


def test_a_paired_difference_cancels_what_makes_questions_hard() -> None:
    rng = np.random.default_rng(1)
    before_PK = simulated_scores(rng, 300, 1)
    gain = paired_difference(before_PK, before_PK)
    alone = mean_with_interval(before_PK)
    assert gain.high - gain.low < (alone.high - alone.low) / 5
    assert paired_normal_difference(before_PK, before_PK + 0.01) == pytest.approx((0.01, 0.01, 0.01))


@pytest.mark.parametrize(("gained", "lost", "same"), [(0, 0, 30), (1, 0, 29), (7, 2, 21), (30, 0, 0), (0, 4, 1)])
def test_the_interval_of_paired_proportions_is_bonett_and_prices(gained: int, lost: int, same: int) -> None:
    """Their eq. 3: add one pair to each kind that disagrees."""
    total = gained + lost + same
    more, fewer = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    half = 1.959964 * math.sqrt((more + fewer - (more - fewer) ** 2) / (total + 2))
    expected = max(-1, more - fewer - half), min(1, more - fewer + half)
    before = [[0.0]] * gained + [[1.0]] * (lost + same)
    after = [[1.0]] * gained + [[0.0]] * lost + [[1.0]] * same
    found = paired_difference(before, after)
    assert found == pytest.approx(((gained - lost) / total, *expected), abs=1e-6)
    assert found.low < found.high
    values = paired_difference_of_values([row[0] for row in before], [row[0] for row in after], 1)
    assert values == pytest.approx(found)


def test_many_samples_of_alike_questions_count_as_so_many_pairs() -> None:
    """Every question has a gain of 1/4 in 4 samples: 20 * 4 pairs, of which a half disagree."""
    before, after = np.tile([1.0, 0, 0, 0], (20, 1)), np.tile([1.0, 1, 0, 0], (20, 1))
    size, square = 80, 0.25 + 0.5 - 2 * 0.25 * 0.5
    center = 0.25 * size / (size + 2)
    half = 1.959964 * math.sqrt(((square * size + 2) / (size + 2) - center**2) / (size + 2))
    assert paired_difference(before, after) == pytest.approx((0.25, center - half, center + half), abs=1e-6)


def test_a_paired_difference_of_fractions_by_hand() -> None:
    generator = np.random.default_rng(3)
    question_P1 = generator.random((20, 1))
    a, b = ((question_P1 + generator.normal(0.0, spread, (20, 3))).clip(0, 1) for spread in (0.2, 0.3))
    changes_P = b.mean(axis=1) - a.mean(axis=1)
    mean = changes_P.mean()
    square = ((b[:, None, :] - a[:, :, None]) ** 2).mean()  # over all pairs of responses to a question
    shrink = 1.959964 / scipy.stats.t.ppf(0.975, 19)
    size = (square - mean**2) / (scipy.stats.sem(changes_P) / shrink) ** 2
    assert 20 < size < 60, "neither limit of the effective number of pairs holds"
    center = mean * size / (size + 2)
    half = 1.959964 * math.sqrt(((square * size + 2) / (size + 2) - center**2) / (size + 2))
    assert paired_difference(a, b) == pytest.approx((mean, center - half, center + half), rel=1e-6)


@pytest.mark.parametrize(("rows", "size"), [([[1, 0, 1, 0]], 1), ([[1, 0], [0, 1]], 4)])
def test_the_effective_size_of_few_questions(rows: list[list[float]], size: int) -> None:
    z2 = 1.959964**2
    half = math.sqrt(z2) * math.sqrt(0.25 / size + z2 / (4 * size**2)) / (1 + z2 / size)
    assert mean_with_interval(rows) == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float16])
def test_scores_of_any_dtype_are_computed_in_fp64(dtype: type[np.generic]) -> None:
    scores = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert mean_with_interval(scores.astype(dtype)) == mean_with_interval(scores)


def test_one_question_has_a_mean_and_no_spread() -> None:
    mean, low, high = mean_with_normal_interval([[3.0, 5.0]])
    assert mean == 4.0
    assert math.isnan(low)
    assert math.isnan(high)
    textbook = binomtest(1, 1).proportion_ci(method="wilson")
    assert mean_with_interval([[1, 1, 1]]) == pytest.approx((1.0, textbook.low, textbook.high))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "none of them 0"),
        ([[]], "none of them 0"),
        ([[1.0], [1.0, 0.0]], "rows differ in length"),
        ([[0.5, 1.5]], "must lie in"),
        ([[-0.1]], "must lie in"),
        ([[math.nan]], "NaN or infinite"),
    ],
)
def test_bad_scores_are_refused(scores: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_with_interval(scores)


def test_a_paired_difference_of_other_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="2 questions against 1"):
        paired_difference([[1.0], [0.0]], [[1.0]])


def test_estimate_prints_with_its_interval() -> None:
    assert str(Estimate(0.4, 0.3579, 0.44321)) == "0.4 [0.3579, 0.4432]"


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_shares_of_equal_questions_are_the_mean_with_its_interval(rows: list[list[bool]]) -> None:
    sums = ClusterSums(2)
    for row in rows:
        sums.add([sum(row), len(row)])
    assert sums.share(0, 1) == pytest.approx(mean_with_interval(rows), abs=1e-12)
    assert sums.total(0) == np.sum(rows) and sums.total(1) == np.size(rows)


def test_a_share_has_at_most_the_given_size() -> None:
    """50 identical questions with four samples each: samples count as independent, up to the given size."""
    sums = ClusterSums(2)
    for _ in range(50):
        sums.add([2, 4])
    for most, size in ((None, 200), (100, 100), (1000, 1000)):
        textbook = binomtest(size // 2, size).proportion_ci(method="wilson")
        assert sums.share(0, 1, most) == pytest.approx((0.5, textbook.low, textbook.high))


def test_the_size_of_unequal_clusters_is_kishs() -> None:
    """One cluster of 97 and three of 1 that all agree: (97 + 3)^2 / (97^2 + 3) clusters, not 4."""
    sums = ClusterSums(2)
    for size in (97, 1, 1, 1):
        sums.add([size, size])
    textbook = mean_with_interval([[1.0]])  # Wilson's at 1; at 1.0624 it is a little narrower
    low = 1.062_4 / (1.062_4 + 1.959964**2)
    assert textbook.low == pytest.approx(1 / (1 + 1.959964**2), abs=1e-6)
    assert sums.share(0, 1) == pytest.approx((1.0, low, 1.0), abs=1e-4)


def test_clustered_means_over_tokens_by_hand() -> None:
    sums = ClusterSums(4)
    for value, count in ((1.0, 2.0), (6.0, 3.0)):
        sums.add([value, count, 2 * value, count])
    # mean 7/5; pulls (1 - 2.8) / 5 and (6 - 4.2) / 5; error sqrt(2 * 2 * 0.36^2); t with one degree of freedom 12.706
    mean, low, high = sums.mean(0, 1)
    assert mean == pytest.approx(1.4)
    assert (high - low) / 2 == pytest.approx(12.7062 * 2 * 0.36, rel=1e-4)
    assert sums.difference((0, 1), (2, 3)).mean == pytest.approx(1.4)
    assert sums.difference((0, 1), (0, 1)) == (0.0, 0.0, 0.0)


def test_questions_without_a_part_in_a_mean_do_not_narrow_its_interval() -> None:
    sums, alone = ClusterSums(2), ClusterSums(2)
    for value, count in ((1.0, 2.0), (6.0, 3.0)):
        alone.add([value, count])
        for vector in ([value, count], [0.0, 0.0], [0.0, 0.0]):
            sums.add(vector)
    assert sums.mean(0, 1) == pytest.approx(alone.mean(0, 1))
    single = ClusterSums(2)
    single.add([1.0, 2.0])
    single.add([0.0, 0.0])
    assert math.isnan(single.mean(0, 1).low)
    assert single.share(0, 1).high > 0.9


def test_clustered_means_cover_the_truth() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        sums = ClusterSums(2)
        for _ in range(25):
            count = int(rng.integers(1, 40))
            sums.add([count * (1.0 + rng.normal()) + rng.normal() * math.sqrt(count), count])
        low, high = sums.mean(0, 1)[1:]
        covered += low <= 1.0 <= high
    assert 0.91 <= covered / 400 <= 0.985


def test_large_counts_do_not_overflow() -> None:
    large, small = ClusterSums(2), ClusterSums(2)
    for value, count in ((1, 2), (6, 3)):
        small.add([value, count])
        large.add([value * 10**10, count * 10**10])
    assert large.mean(0, 1) == pytest.approx(small.mean(0, 1))


def test_a_mean_of_nothing_is_not_a_number() -> None:
    sums = ClusterSums(2)
    sums.add([0.0, 0.0])
    assert all(math.isnan(value) for value in (*sums.mean(0, 1), *sums.share(0, 1)))


def test_a_difference_is_no_surer_than_the_mean_that_fewer_questions_count_in() -> None:
    sums, single = ClusterSums(4), ClusterSums(4)
    for value, count in ((1.0, 2.0), (6.0, 3.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)):
        sums.add([value, count, 3.0, 3.0])  # the second mean is 1 in each of five questions: it adds no spread
    half = 12.7062 * 2 * 0.36  # as of the first mean alone, which counts in two
    assert sums.difference((0, 1), (2, 3)) == pytest.approx((-0.4, -0.4 - half, -0.4 + half), rel=1e-4)
    assert sums.difference((2, 3), (0, 1)) == pytest.approx((0.4, 0.4 - half, 0.4 + half), rel=1e-4)
    single.add([1.0, 2.0, 3.0, 3.0])
    single.add([0.0, 0.0, 4.0, 3.0])
    assert math.isnan(single.difference((0, 1), (2, 3)).low), "one question tells nothing of its spread"
