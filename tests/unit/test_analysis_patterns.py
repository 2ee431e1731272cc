"""Patterns of entropy: hand-worked values, brute force over random tables, and the same from parts as from memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkrl import analysis
from forkrl.errors import UserError
from tests.token_frames import random_frame, token_frame, write_parts

TWO_PROMPTS = token_frame(
    [
        (0, [5, 6, 5, 7], [0.0, 1.0, 0.0, 2.0], True),
        (0, [5, 6], [0.004, 0.5], False),
        (1, [5, 8, 8, 8], [0.0, 3.0, 0.0, 0.0], True),
    ]
)


def test_summary_of_ten_tokens_by_hand() -> None:
    figures = analysis.entropy_summary(TWO_PROMPTS)["value"]
    # Sorted: 0 0 0 0 0 .004 .5 1 2 3; rank 0.8 * 9 = 7.2 lies a fifth of the way from 1 to 2.
    assert figures["tokens"] == 10
    assert figures["mean"] == pytest.approx(6.504 / 10)
    assert figures["share_below_0.01"] == 0.6
    assert figures["percentile_80"] == pytest.approx(1.2)
    assert figures["percentile_50"] == pytest.approx(0.002)
    assert (figures["min"], figures["max"]) == (0.0, 3.0)
    paper = analysis.entropy_summary(TWO_PROMPTS)["paper"]
    assert (paper["share_below_0.01"], paper["percentile_80"]) == (0.5064, 0.672)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_entropy_of_just_a_hundredth_is_not_below_it(dtype: str) -> None:
    edge = token_frame([(0, [5, 6, 7, 8], [0.0099, 0.01, 0.0101, 0.5], None)]).astype({"entropy": dtype})
    assert analysis.entropy_summary(edge)["value"]["share_below_0.01"] == 1 / 4


def test_types_by_hand() -> None:
    types = analysis.token_types(TWO_PROMPTS, min_count=2, threshold=0.9).set_index("token_id")
    assert types.index.tolist() == [8, 6, 5]  # 7 was seen once; means 1, 0.75, 0.001
    assert types["mean_entropy"].tolist() == pytest.approx([1.0, 0.75, 0.001])
    assert types["count"].tolist() == [3, 2, 4]
    assert types["fork_share"].tolist() == pytest.approx([1 / 3, 0.5, 0.0])
    assert types["text"].tolist() == ["t8 ", "t6 ", "t5 "]


def test_positions_by_hand() -> None:
    halves = analysis.fork_positions(TWO_PROMPTS, threshold=0.4, bins=2)
    # First halves: 0, 1 | .004 | 0, 3; second halves: 0, 2 | .5 | 0, 0.
    assert halves["tokens"].tolist() == [5, 5]
    assert halves["fork_share"].tolist() == pytest.approx([0.4, 0.4])
    assert halves["mean_entropy"].tolist() == pytest.approx([4.004 / 5, 2.5 / 5])


def test_histogram_counts_every_token_once() -> None:
    bins = analysis.entropy_histogram(TWO_PROMPTS, bins=3)
    assert bins["high"].tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert bins["tokens"].tolist() == [7, 1, 2]
    assert bins["correct"].tolist() == [5, 1, 2]
    assert bins["incorrect"].tolist() == [2, 0, 0]


def test_correct_against_incorrect_by_hand() -> None:
    rows = analysis.correct_against_incorrect(TWO_PROMPTS, threshold=0.9).set_index("responses")
    assert rows["count"].tolist() == [2, 1, 3, 1]
    assert rows.loc["correct", "mean_entropy"] == pytest.approx(6 / 8)
    assert rows.loc["incorrect", "mean_entropy"] == pytest.approx(0.504 / 2)
    assert rows.loc["difference", "mean_entropy"] == pytest.approx(6 / 8 - 0.252)
    assert rows.loc["difference within prompts", "mean_entropy"] == pytest.approx(3 / 4 - 0.252)  # prompt 0 alone
    assert rows.loc["correct", "fork_share"] == pytest.approx(3 / 8)
    # Clustered by prompt, correct: prompt 0 has 3.0 over 4, prompt 1 3.0 over 4: no spread at all.
    assert rows.loc["correct", "mean_entropy_low"] == pytest.approx(0.75)
    assert math.isnan(rows.loc["difference within prompts", "mean_entropy_low"])


def test_a_response_of_one_token_counts_as_a_response() -> None:
    short = token_frame(
        [(0, [5], [1.0], True), (0, [6], [0.0], False), (1, [5], [2.0], True), (1, [5, 6], [0, 0], True)]
    )
    rows = analysis.correct_against_incorrect(short, threshold=0.9).set_index("responses")
    assert rows["count"].tolist() == [3, 1, 4, 1]


def test_unjudged_responses_have_no_part_in_correctness() -> None:
    unjudged = token_frame([(0, [1, 2], [0.0, 1.0], None), (1, [1], [5.0], None)])
    assert analysis.correct_against_incorrect(unjudged, 0.5).empty
    assert analysis.density_against_correctness(analysis.response_table(unjudged, 0.5)).empty
    mixed = pd.concat([TWO_PROMPTS, token_frame([(1, [1], [9.0], None)])], ignore_index=True)
    pd.testing.assert_frame_equal(
        analysis.correct_against_incorrect(mixed, 0.9), analysis.correct_against_incorrect(TWO_PROMPTS, 0.9)
    )


def test_contexts_by_hand() -> None:
    found = analysis.fork_contexts(TWO_PROMPTS, threshold=0.4, n=1, min_count=1).set_index("context")
    assert found.loc["t5 ", ["count", "forks"]].tolist() == [4, 4]
    assert found.loc["t5 ", "mean_entropy"] == pytest.approx((1 + 2 + 0.5 + 3) / 4)
    assert found.loc["t8 ", ["count", "forks"]].tolist() == [2, 0]
    pairs = analysis.fork_contexts(TWO_PROMPTS, threshold=0.4, n=2, min_count=1).set_index("context")
    assert pairs.loc["t6 t5 ", ["count", "forks"]].tolist() == [1, 1]
    assert "t7 t5 " not in pairs.index, "no context reaches over the end of a response"


def test_density_against_correctness_by_hand() -> None:
    responses = analysis.response_table(TWO_PROMPTS, threshold=0.9)
    assert responses["forks"].tolist() == [2, 0, 1]
    assert responses["fork_density"].tolist() == pytest.approx([0.5, 0.0, 0.25])
    thirds = analysis.density_against_correctness(responses, bins=3)
    assert thirds["accuracy"].tolist() == [0.0, 1.0, 1.0]
    assert thirds["low"].tolist() == pytest.approx([0.0, 0.25, 0.5])


@pytest.mark.parametrize("seed", range(8))
def test_all_patterns_equal_brute_force(seed: int) -> None:
    frame = random_frame(seed)
    threshold = float(np.quantile(frame["entropy"], 0.8))
    entropy = frame["entropy"].to_numpy(np.float64)
    assert analysis.entropy_summary(frame)["value"]["percentile_80"] == pytest.approx(threshold)

    by_type = defaultdict(list)
    by_context: dict[tuple[int, int], list[float]] = defaultdict(list)
    for _, response in frame.groupby(["prompt", "sample"]):
        ids, values = response["token_id"].tolist(), response["entropy"].tolist()
        for place, (token_id, value) in enumerate(zip(ids, values, strict=True)):
            by_type[token_id].append(value)
            if place >= 2:
                by_context[ids[place - 2], ids[place - 1]].append(value)
    types = analysis.token_types(frame, min_count=1)
    assert dict(zip(types["token_id"], types["mean_entropy"], strict=True)) == pytest.approx(
        {token_id: float(np.mean(values)) for token_id, values in by_type.items()}
    )
    found = analysis.fork_contexts(frame, threshold, n=2, min_count=1)
    expected = {f"t{a} t{b} ": sum(v > threshold for v in values) for (a, b), values in by_context.items()}
    assert dict(zip(found["context"], found["forks"], strict=True)) == expected

    bins = np.minimum(((frame["position"] + 0.5) / frame["length"] * 4).astype(int), 3)
    assert analysis.fork_positions(frame, threshold, bins=4)["fork_share"].tolist() == pytest.approx(
        [(entropy[bins == index] > threshold).mean() for index in range(4)]
    )


@pytest.mark.parametrize("seed", range(4))
def test_parts_on_disk_give_what_memory_gives(seed: int, tmp_path: Path) -> None:
    frame = random_frame(seed)
    folder = write_parts(tmp_path / "tokens", frame, prompts_per_group=1 + seed % 2)
    functions: list[Callable[..., pd.DataFrame]] = [
        analysis.entropy_summary,
        analysis.entropy_histogram,
        lambda tokens: analysis.token_types(tokens, 1, 0.5),
        lambda tokens: analysis.fork_positions(tokens, 0.5),
        lambda tokens: analysis.correct_against_incorrect(tokens, 0.5),
        lambda tokens: analysis.fork_contexts(tokens, 0.5, min_count=1),
        lambda tokens: analysis.response_table(tokens, 0.5),
    ]
    for function in functions:
        pd.testing.assert_frame_equal(function(folder), function(frame), check_dtype=False, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 20, width=32), min_size=1, max_size=200))
def test_percentiles_are_numpys(values: list[float]) -> None:
    figures = analysis.entropy_summary(token_frame([(0, [1] * len(values), values, None)]))["value"]
    for percent in (5, 25, 50, 75, 80, 90, 95, 99):
        expected = np.quantile(np.array(values), percent / 100)
        assert figures[f"percentile_{percent}"] == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(
    ("values", "says"), [([], "no tokens"), ([0.1, math.nan], "NaN or infinite at 1 of 2"), ([math.inf], "1 of 1")]
)
def test_summary_refuses(values: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        analysis.entropy_summary(token_frame([(0, [1] * len(values), values, None)]).astype({"entropy": np.float32}))


def test_negative_rounding_counts_as_zero() -> None:
    figures = analysis.entropy_summary(token_frame([(0, [1, 2, 3], [-1e-7, -0.0, 0.0], None)]))["value"]
    assert (figures["min"], figures["max"]) == (0.0, 0.0)


def test_the_order_of_the_rows_does_not_matter() -> None:
    for function in (analysis.fork_positions, analysis.correct_against_incorrect, analysis.response_table):
        pd.testing.assert_frame_equal(function(TWO_PROMPTS.iloc[::-1], 0.5), function(TWO_PROMPTS, 0.5))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column entropy"):
        analysis.entropy_summary(TWO_PROMPTS.drop(columns="entropy"))
    with pytest.raises(ValueError, match="holds no part"):
        analysis.entropy_summary(tmp_path)


def test_a_context_has_a_token() -> None:
    with pytest.raises(ValueError, match="n = 0: a context has at least one token"):
        analysis.fork_contexts(TWO_PROMPTS, 0.5, n=0)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "tokens", random_frame(1, num_prompts=9))
    part = folder / "part-00001.parquet"
    content = bytearray(part.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # pages, not the footer
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"part-00001.parquet: cannot be read .*; remove it"):
        analysis.entropy_summary(folder)


def test_every_table_compares_with_a_threshold_alike() -> None:
    frame = token_frame([(0, [1, 2], [0.1, 0.1], True)]).astype({"entropy": np.float32})  # a little above 0.1
    assert analysis.response_table(frame, 0.1)["forks"].tolist() == [2]
    assert analysis.token_types(frame, 1, 0.1)["fork_share"].tolist() == [1.0, 1.0]
    assert analysis.fork_positions(frame, 0.1, bins=1)["fork_share"].tolist() == [1.0]
