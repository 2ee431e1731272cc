"""The interval that covers new seeds and new questions: against scipy, by hand, and by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from forkrl.stats.crossed import crossed_mean


def test_without_a_question_effect_it_is_the_t_test_over_seeds() -> None:
    """Every question gives the same values, so the seeds are all there is."""
    seeds_S = np.array([0.10, 0.14, 0.07, 0.12, 0.11])
    found = crossed_mean(np.repeat(seeds_S[:, None], 40, axis=1))
    reference = stats.ttest_1samp(seeds_S, 0.0)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert tuple(found.estimate)[1:] == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)
    assert found.freedom == pytest.approx(4)


def test_a_single_column_is_the_t_test_over_seeds() -> None:
    values = np.array([0.10, 0.14, 0.07, 0.12])
    found, reference = crossed_mean(values[:, None]), stats.ttest_1samp(values, 0.0)
    assert found.p == pytest.approx(reference.pvalue) and found.freedom == 3


def test_without_a_seed_effect_it_is_the_t_test_over_questions() -> None:
    questions_P = np.random.default_rng(0).normal(0.1, 0.3, 50)
    found = crossed_mean(np.repeat(questions_P[None], 6, axis=0))
    reference = stats.ttest_1samp(questions_P, 0.0)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert tuple(found.estimate)[1:] == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)


def test_mean_squares_by_hand() -> None:
    """Rows 1 2 6 and 3 6 12: grand mean 5; row means 3 7; column means 2 4 9; residuals ±1 0 ∓1."""
    found = crossed_mean([[1, 2, 6], [3, 6, 12]])
    assert found.mean == 5
    assert np.multiply(found.squares, 6) == pytest.approx([3 * (4 + 4) / 1, 2 * (9 + 1 + 16) / 2, (1 + 1 + 1 + 1) / 2])
    assert found.error**2 == pytest.approx((24 + 26 - 2) / 6)
    assert found.freedom == pytest.approx((24 + 26 - 2) ** 2 / (24**2 / 1 + 26**2 / 2 + 2**2 / 2))


def test_p_value_and_interval_agree() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        found = crossed_mean(generator.normal(0.05, 1, (4, 30)) + generator.normal(0, 0.1, (4, 1)))
        assert (found.p < 0.05) == (found.estimate.low > 0 or found.estimate.high < 0)


@pytest.mark.parametrize("values", [[[1.0, 2.0]], [[], []], [1.0, 2.0]])
def test_one_seed_has_no_interval(values: Any) -> None:
    with pytest.raises(ValueError, match="two seeds or more"):
        crossed_mean(values)


def test_constant_values() -> None:
    found = crossed_mean(np.zeros((3, 5)))
    assert (found.p, tuple(found.estimate)) == (1.0, (0.0, 0.0, 0.0))
    assert crossed_mean(np.ones((3, 5))).p == 0.0


SPREADS = {"seeds": (0.05, 0.0), "questions": (0.0, 0.48), "both": (0.03, 0.1), "noise": (0.0, 0.0)}


@pytest.mark.parametrize("seeds", [2, 4, 16])
@pytest.mark.parametrize("spread", SPREADS)
def test_the_interval_covers_new_seeds_and_questions(spread: str, seeds: int) -> None:
    """Differences of two graded answers (-1, 0, 1); 2,000 studies, so 95% has a standard error of half a point."""
    of_seeds, of_questions = SPREADS[spread]
    generator, studies, covered, ignoring_questions = np.random.default_rng(2), 2000, 0, 0
    for _ in range(studies):
        better = (
            0.25 + of_seeds * generator.normal(size=(seeds, 1)) + of_questions * generator.uniform(-0.5, 0.5, (1, 128))
        )
        draws = generator.random((seeds, 128))
        values = np.where(draws < better, 1.0, np.where(draws > 0.8, -1.0, 0.0))  # mean 0.25 - 0.2
        found = crossed_mean(values)
        assert found.error**2 >= max(found.squares[:2]) - 1e-15, "neither seeds nor questions alone are more uncertain"
        low, high = found.estimate[1:]
        covered += low <= 0.05 <= high
        means_S = values.mean(axis=1)
        half = stats.t.ppf(0.975, seeds - 1) * means_S.std(ddof=1) / np.sqrt(seeds)
        ignoring_questions += abs(means_S.mean() - 0.05) <= half
    assert 0.93 <= covered / studies <= 0.985
    if (spread, seeds) == ("questions", 16):
        assert ignoring_questions / studies < 0.92, "questions count"


def test_a_detectable_difference_is_found_in_four_of_five_studies() -> None:
    generator = np.random.default_rng(3)

    def study(mean: float) -> np.ndarray:
        return (
            generator.normal(mean, 0.5, (8, 200))
            + generator.normal(0, 0.05, (8, 1))
            + generator.normal(0, 0.2, (1, 200))
        )

    typical = float(np.median([crossed_mean(study(0.0)).detectable for _ in range(200)]))
    found = np.mean([crossed_mean(study(typical)).p < 0.05 for _ in range(1000)])
    assert 0.74 <= found <= 0.86


def test_seeds_needed_shrink_with_the_distance_and_end_where_questions_limit() -> None:
    generator = np.random.default_rng(4)
    values = generator.normal(0, 0.5, (8, 200)) + generator.normal(0, 0.1, (8, 1)) + generator.normal(0, 0.3, (1, 200))
    found = crossed_mean(values)
    few, more, many = (found.seeds_needed(distance) or 0 for distance in (0.12, 0.1, 0.09))
    assert 8 < few < more < many
    assert found.seeds_needed(1.0) == 9, "more than now"
    assert found.seeds_needed(0.98 * found.detectable) == pytest.approx(9, abs=2)
    assert found.seeds_needed(0.01) is None
