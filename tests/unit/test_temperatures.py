"""Figures of a temperature sweep, against values worked by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest

from forkrl.analysis.temperatures import (
    PAPER_TEMPERATURES,
    Setting,
    ends_in_loop,
    holds_no_text,
    plan_settings,
    temperature_table,
)
from forkrl.stats.intervals import mean_with_interval, mean_with_normal_interval, paired_difference


def test_the_paper_s_eight_temperatures_make_fifteen_settings() -> None:
    settings = plan_settings()
    assert len(settings) == len(set(settings)) == 15
    assert settings[0] == (1, 1)
    assert {setting.high for setting in settings if setting.low == 1} == set(PAPER_TEMPERATURES)
    assert {setting.low for setting in settings if setting.high == 1} == set(PAPER_TEMPERATURES)


def test_the_baseline_is_there_whatever_the_temperatures() -> None:
    assert plan_settings([0.5]) == [(1, 1), (0.5, 1), (1, 0.5)]
    assert plan_settings([1]) == [(1, 1)]
    assert plan_settings([0.5, 1], base=0.5) == [(0.5, 0.5), (1, 0.5), (0.5, 1)]


@pytest.mark.parametrize("temperatures", [[-0.1], [math.nan], [1, math.inf], [0.5, 0.5]], ids=str)
def test_what_are_no_temperatures_make_no_settings(temperatures: list[float]) -> None:
    with pytest.raises(ValueError, match="temperature"):
        plan_settings(temperatures)


A, B = [1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]
LOOPS = [
    ("one token, 32 times", A + [7] * 32, True),
    ("one token, 31 times", [7] * 31, False),
    ("a block of 8, four times", B + A * 4, True),
    ("a block of 8, three times and all but one token", B + A * 3 + A[:7], False),
    ("a block of 8, broken off in the fifth", B + A * 4 + A[:3], True),
    ("a block of 3, ten times: 30 tokens", A + B * 10, False),
    ("a block of 3, eleven times", A + B * 11, True),
    ("a block of 100, four times", list(range(100)) * 4, True),
    ("a block of 100, three times", list(range(100)) * 3, False),
    ("a loop that is left again", A * 9 + [99], False),
    ("a loop within, then prose", A * 9 + list(range(100, 160)), False),
    ("nothing", [], False),
    ("no repetition", list(range(200)), False),
]


@pytest.mark.parametrize(("ids", "expected"), [case[1:] for case in LOOPS], ids=[case[0] for case in LOOPS])
def test_a_loop_is_a_block_at_the_end_four_times_and_32_tokens(ids: list[int], expected: bool) -> None:
    assert ends_in_loop(ids) is expected


def test_loops_equal_brute_force() -> None:
    rng, found = random.Random(1), 0
    for _ in range(600):
        ids = [rng.randrange(3) for _ in range(rng.randrange(8))]
        ids += [rng.randrange(2) for _ in range(rng.randint(1, 12))] * rng.randint(1, 9)
        expected = any(
            any(all(ids[-1 - i] == ids[-1 - i - p] for i in range(max(4 * p, 32) - p)) for p in [period])
            for period in range(1, len(ids))
            if max(4 * period, 32) <= len(ids)
        )
        assert ends_in_loop(ids) is expected, ids
        found += expected
    assert 50 < found < 550


def test_a_long_loop_is_found_in_a_moment() -> None:
    assert ends_in_loop([1, 2] * 50_000)
    assert not ends_in_loop([1] * 50_000 + [2])


def test_no_text_is_the_replacement_character() -> None:
    assert holds_no_text("caf\ufffd")
    assert not holds_no_text("café \x1b <script> \u202e")


def responses(setting: Setting, rows: list[list[dict[str, Any]]]) -> pd.DataFrame:
    """Problems with their responses; what a response does not say is harmless."""
    plain = {"score": 0.0, "length": 10, "cut": False, "loop": False, "garbled": False, "surprise": 1.0, "forks": 2}
    return pd.DataFrame(
        [
            {"high": setting.high, "low": setting.low, "prompt": problem, "failure": "", **plain, **response}
            for problem, group in enumerate(rows)
            for response in group
        ]
    )


BASE = responses(Setting(1, 1), [[{"score": 1}, {"score": 0}], [{"score": 1}, {"score": 1}], [{"score": 0}] * 2])
COLD = responses(
    Setting(0.3, 1),
    [
        [{"score": 0, "length": 30, "cut": True, "loop": True, "surprise": 6.0}, {"length": 10, "surprise": 2.0}],
        [{"score": 1, "garbled": True}, {"score": 0, "failure": "timeout"}],
        [{"loop": True}, {}],
    ],
)


def test_the_table_holds_what_is_worked_by_hand() -> None:
    table = temperature_table(pd.concat([BASE, COLD]))
    assert list(zip(table["high"], table["low"], strict=True)) == [(1, 1), (0.3, 1)]
    base, cold = table.iloc[0], table.iloc[1]
    assert base["accuracy"] == 0.5 and cold["accuracy"] == pytest.approx(1 / 6)
    assert (cold["cut"], cold["loop"], cold["garbled"]) == pytest.approx((1 / 6, 2 / 6, 1 / 6))
    assert cold["broken"] == pytest.approx(3 / 6), "the union, not the sum"
    assert cold["length"] == pytest.approx(80 / 6)
    assert cold["surprise"] == pytest.approx((6 + 2 + 4 * 1) / 80), "per token, not the mean of responses"
    assert cold["forks"] == pytest.approx(12 / 80)
    assert (cold["prompts"], cold["samples"], cold["tokens"], cold["failures"]) == (3, 2, 80, 1)
    assert base["difference"] == 0 and cold["difference"] == pytest.approx(1 / 6 - 1 / 2)


def test_intervals_are_clustered_by_problem_and_differences_paired() -> None:
    cold = temperature_table(pd.concat([COLD, BASE])).iloc[0]
    scores, base = [[0, 0], [1, 0], [0, 0]], [[1, 0], [1, 1], [0, 0]]
    expected = {
        "accuracy": mean_with_interval(scores),
        "difference": paired_difference(base, scores),
        "length": mean_with_normal_interval([[30, 10], [10, 10], [10, 10]]),
        "broken": mean_with_interval([[1, 0], [1, 0], [1, 0]]),
    }
    for name, estimate in expected.items():
        assert (cold[name], cold[f"{name}_low"], cold[f"{name}_high"]) == pytest.approx(tuple(estimate)), name


def test_the_interval_of_surprise_covers_the_ratio_of_a_known_population() -> None:
    """Lengths and surprises that hang together; the true ratio is 0.5 nats a token."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        lengths = rng.integers(5, 60, (30, 1))
        rows = [
            [{"length": int(n), "surprise": 0.5 * n + rng.normal(0, 4)} for n in group] for group in np.tile(lengths, 2)
        ]
        row = temperature_table(responses(Setting(1, 1), rows)).iloc[0]
        covered += row["surprise_low"] <= 0.5 <= row["surprise_high"]
    assert 0.91 < covered / 300 < 0.985


def test_problems_are_paired_by_number_not_by_the_order_of_rows() -> None:
    shuffled = pd.concat([BASE, COLD.sample(frac=1, random_state=3)])
    ordered = temperature_table(pd.concat([BASE, COLD]))
    pd.testing.assert_frame_equal(temperature_table(shuffled), ordered)


def test_without_the_baseline_there_is_no_difference() -> None:
    assert math.isnan(temperature_table(COLD)["difference"].iloc[0])


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (BASE.iloc[:0], "no responses"),
        (BASE.iloc[:5], "prompts differ in their number of responses"),
        (pd.concat([BASE, COLD.iloc[:4]]), "same ones"),
    ],
)
def test_what_makes_no_table_is_refused(frame: pd.DataFrame, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        temperature_table(frame)
