"""Drift measures: hand-worked values and brute force over random inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forkrl import entropy_change_by_percentile, overlap_ratio
from forkrl.analysis import overlap_table, percentile_table


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1 + seed % 5, 1 + seed % 13)
    a, b = (torch.rand(shape, generator=generator).mul(8).floor() / 4 for _ in range(2))  # many ties
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0, 0] = True
    return a, b, mask


def test_overlap_by_hand() -> None:
    a = torch.tensor([[0.1, 0.9, 0.8, 0.0, 0.7]])
    b = torch.tensor([[0.9, 0.8, 0.1, 0.0, 0.7]])
    everywhere = torch.ones(1, 5, dtype=torch.bool)
    assert overlap_ratio(a, b, everywhere, ratio=0.4) == 0.5  # {1, 2} and {0, 1}
    assert overlap_ratio(a, a, everywhere, ratio=0.4) == 1.0
    assert overlap_ratio(a, b, everywhere, ratio=1.0) == 1.0
    assert overlap_ratio(a, b, everywhere) == 0.0  # ceil(0.2 * 5) = 1: {1} and {0}
    assert overlap_ratio(a, b, torch.tensor([[False, True, True, True, True]]), ratio=0.5) == 0.5  # {1, 2} and {1, 4}


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.01, 1.0))
def test_overlap_equals_brute_force(seed: int, ratio: float) -> None:
    a, b, mask = random_batch(seed)
    flat_a, flat_b = a[mask].tolist(), b[mask].tolist()
    k = max(1, math.ceil(ratio * len(flat_a) - 1e-9))
    tops = [set(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k]) for flat in (flat_a, flat_b)]
    assert overlap_ratio(a, b, mask, ratio) == pytest.approx(len(tops[0] & tops[1]) / k)
    assert overlap_ratio(b, a, mask, ratio) == overlap_ratio(a, b, mask, ratio)


def test_change_by_hand() -> None:
    base = torch.tensor([[0.0, 2.0, 1.0], [3.0, 9.0, 9.0]])
    trained = torch.tensor([[0.5, 1.0, 1.0], [3.5, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    table = entropy_change_by_percentile(base, trained, mask, bins=2)
    # Lower half {0, 1}: +0.5 and 0; upper half {2, 3}: -1 and +0.5.
    assert table["change"].tolist() == pytest.approx([0.25, -0.25])
    assert table["base_mean"].tolist() == pytest.approx([0.5, 2.5])
    assert table["trained_mean"].tolist() == pytest.approx([0.75, 2.25])
    assert table["tokens"].tolist() == [2, 2]
    assert table["to_percentile"].tolist() == [50, 100]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), bins=st.integers(1, 6))
def test_change_equals_brute_force(seed: int, bins: int) -> None:
    base, trained, mask = random_batch(seed)
    flat, change = base[mask].tolist(), (trained - base)[mask].tolist()
    if len(flat) < bins:
        with pytest.raises(ValueError, match=f"fewer than the {bins} percentile ranges"):
            entropy_change_by_percentile(base, trained, mask, bins)
        return
    order = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    parts: list[list[float]] = [[] for _ in range(bins)]
    for rank, index in enumerate(order):
        parts[rank * bins // len(flat)].append(change[index])
    table = entropy_change_by_percentile(base, trained, mask, bins)
    assert table["change"].tolist() == pytest.approx([float(np.mean(part)) for part in parts], abs=1e-6)
    assert table["tokens"].sum() == len(flat)
    assert table["tokens"].max() - table["tokens"].min() <= 1


def test_change_has_an_interval_clustered_by_row() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.rand(400, 5, generator=generator)
    shift = torch.randn(400, 1, generator=generator)  # a whole response moves together
    everywhere = torch.ones(400, 5, dtype=torch.bool)
    row = entropy_change_by_percentile(base, base + shift, everywhere, bins=1).iloc[0]
    half = (row["change_high"] - row["change_low"]) / 2
    assert half == pytest.approx(1.96 * float(shift.std()) / math.sqrt(400), rel=0.02)
    flat = entropy_change_by_percentile(base.flatten(), base.flatten() + 1, everywhere.flatten(), bins=1)
    assert "change_low" not in flat


def test_overlap_table_knows_its_ends() -> None:
    prompts = torch.arange(200) // 10
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(200, generator=generator)
    last = torch.rand(200, generator=generator)
    table = overlap_table({"0": first, "1": (first + last) / 2, "2": last}, prompts).set_index("checkpoint")
    assert table.loc["0", ["with_first", "with_first_low", "with_first_high"]].tolist() == [1.0, 1.0, 1.0]
    assert table.loc["2", "with_last"] == 1.0
    assert table.loc["0", "with_last"] == table.loc["2", "with_first"]
    assert table.loc["0", "with_last"] == overlap_ratio(first, last, torch.ones(200, dtype=torch.bool))
    middle = table.loc["1"]
    assert 0 <= middle["with_first_low"] < middle["with_first"] < middle["with_first_high"] <= 1


def test_percentile_table_by_hand() -> None:
    table = percentile_table({"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.tensor([4.0, 4.0, 4.0])}, [0, 50, 75])
    assert table["percentile_75"].tolist() == [1.5, 4.0]
    assert table["mean"].tolist() == [1.0, 4.0]
    assert table["checkpoint"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: overlap_ratio(torch.ones(2), torch.ones(2), torch.zeros(2, dtype=torch.bool)), "no positions"),
        (lambda: overlap_ratio(torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.bool)), "do not match"),
        (
            lambda: entropy_change_by_percentile(torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.bool)),
            "do not match",
        ),
        (
            lambda: entropy_change_by_percentile(
                torch.full((20,), math.nan), torch.ones(20), torch.ones(20, dtype=torch.bool)
            ),
            "NaN or infinite",
        ),
        (lambda: percentile_table({"x": torch.zeros(0)}), "no tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()  # type: ignore[operator]


def test_an_overlap_has_one_interval_whichever_comes_first() -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = torch.arange(600) // 20
    first = torch.rand(600, generator=generator)
    last = (first + torch.rand(600, generator=generator) * (1 + prompts / 10)) / 2
    table = overlap_table({"first": first, "last": last}, prompts)
    columns = ["", "_low", "_high"]
    forwards = [table["with_last" + end].iloc[0] for end in columns]
    assert forwards == pytest.approx([table["with_first" + end].iloc[1] for end in columns])
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(prompts.numpy() == p) for p in rng.integers(0, 30, 30)])
        resampled.append(overlap_ratio(first[rows], last[rows], torch.ones(len(rows), dtype=torch.bool)))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert 0.9 <= (forwards[2] - forwards[1]) / (high - low) <= 1.5  # in small samples a little wide


def test_the_interval_of_an_overlap_takes_the_border_into_account() -> None:
    """Prompts differ much in their level of entropy, so which of them are drawn moves the border of the top."""
    prompts, tokens = 400, 50
    generator = torch.Generator().manual_seed(1)
    first = 1.5 * torch.randn((prompts, 1), generator=generator) + torch.randn((prompts, tokens), generator=generator)
    last = first + 0.7 * torch.randn((prompts, tokens), generator=generator)
    owner = torch.arange(prompts * tokens) // tokens
    row = overlap_table({"first": first.ravel(), "last": last.ravel()}, owner).iloc[0]
    rng, everything = np.random.default_rng(0), torch.ones(prompts * tokens, dtype=torch.bool)
    resampled = []
    for _ in range(200):
        drawn = torch.from_numpy(rng.integers(0, prompts, prompts))
        resampled.append(overlap_ratio(first[drawn].ravel(), last[drawn].ravel(), everything))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert row["with_last_high"] - row["with_last_low"] == pytest.approx(high - low, rel=0.2)


def test_an_overlap_of_one_prompt_or_of_nothing_in_common_is_not_certain() -> None:
    generator = torch.Generator().manual_seed(0)
    first, last = torch.rand(1000, generator=generator), torch.rand(1000, generator=generator)
    one = overlap_table({"a": first, "b": last}, torch.zeros(1000, dtype=torch.int64)).iloc[0]
    assert one["with_last_low"] < 0.1
    assert one["with_last_high"] > 0.8
    rare = overlap_table({"a": first, "b": last}, torch.arange(1000) // 10, 0.001).iloc[0]
    assert rare["with_last"] == 0
    assert rare["with_last_high"] > 0.03
