"""What a branch is worth: hand-worked spreads, and simulations in which the true rates are known.

Axes: ``A`` alternatives, ``K`` continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from forkrl.analysis import branching
from forkrl.analysis.branching import (
    branch_rates,
    choose_positions,
    compare_kinds,
    corrected_variance,
    entropy_bins,
    entropy_relation,
    fork_tokens,
    position_spreads,
    spearman,
    summarise_kinds,
)
from forkrl.stats.intervals import mean_with_normal_interval


def position(scores: Sequence[Sequence[float]], probability: Sequence[float], **place: Any) -> pd.DataFrame:
    """The branches of one position; the first is the one that was taken."""
    known = {"prompt": 0, "sample": 0, "position": 3, "kind": "fork", "entropy": 1.0} | place
    rows = [
        known | {"probability": p, "taken": index == 0, "exact": len(each) == 1, "scores": list(each)}
        for index, (each, p) in enumerate(zip(scores, probability, strict=True))
    ]
    return pd.DataFrame(rows)


def choose(entropy: Sequence[float], seed: int = 0, **wanted: int) -> pd.DataFrame:
    counts = {"forks": 4, "random": 2, "low": 2} | wanted
    return choose_positions(entropy, np.random.default_rng(seed), **counts)


def test_forks_are_the_top_and_nothing_is_chosen_twice() -> None:
    entropy = np.random.default_rng(1).random(50)
    low_half = set(np.argsort(entropy)[:25].tolist())
    seen: dict[str, set[int]] = {"random": set(), "low": set()}
    for seed in range(300):
        chosen = choose(entropy.tolist(), seed)
        by_kind = {kind: set(group["position"]) for kind, group in chosen.groupby("kind")}
        assert by_kind["fork"] == set(np.argsort(entropy)[-4:].tolist())
        assert by_kind["low"] <= low_half
        assert chosen["position"].is_unique
        assert chosen["position"].is_monotonic_increasing
        assert (chosen["entropy"] == entropy[chosen["position"]]).all()
        assert [len(by_kind[kind]) for kind in ("fork", "random", "low")] == [4, 2, 2]
        for kind, found in seen.items():
            found |= by_kind[kind]
    assert seen == {"random": set(range(50)) - by_kind["fork"], "low": low_half}


def test_the_random_positions_are_uniform_among_those_that_are_no_forks() -> None:
    counts = np.zeros(12)
    for seed in range(2000):
        chosen = choose(list(range(12)), seed, forks=2, random=3, low=0)
        counts[chosen.loc[chosen["kind"] == "random", "position"]] += 1
    assert (counts[-2:] == 0).all()
    assert stats.chisquare(counts[:10]).pvalue > 0.001


@pytest.mark.parametrize(
    ("length", "kinds"),
    [
        (1, ["fork"]),  # remainders 4/8, 2/8, 2/8
        (2, ["fork", "random"]),  # 1 fork, and 0.5 of each control
        (3, ["fork", "low", "random"]),  # 1.5, 0.75, 0.75
        (4, ["fork", "fork", "low", "random"]),
        (8, ["fork"] * 4 + ["low"] * 2 + ["random"] * 2),
    ],
)
def test_a_short_response_divides_its_tokens(length: int, kinds: list[str]) -> None:
    for seed in range(20):
        chosen = choose(np.linspace(0, 1, length).tolist(), seed)
        assert chosen["position"].is_unique
        if length != 3 and length != 4:  # there the random one may take the last free token of the lower half
            assert sorted(chosen["kind"]) == kinds
        assert set(chosen["kind"]) <= set(kinds)


def test_equal_entropies_and_none_wanted_and_values_that_are_not_finite() -> None:
    chosen = choose([0.5] * 10, forks=3, random=0, low=0)
    assert chosen["position"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="NaN or infinite"):
        choose([0.1, float("nan")])


def test_rates_by_hand() -> None:
    """Wilson at 3 of 4: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z² = 3.8415."""
    rated = branch_rates(pd.concat([position([[1, 1, 0, 1], [0.0]], [0.6, 0.3])]))
    first, second = rated.to_dict("records")
    z2 = 3.841458820694124
    centre, half = (0.75 + z2 / 8) / (1 + z2 / 4), np.sqrt(z2 * (0.1875 / 4 + z2 / 64)) / (1 + z2 / 4)
    assert (first["count"], first["rate"]) == (4, 0.75)
    assert (first["rate_low"], first["rate_high"]) == pytest.approx((centre - half, centre + half))
    assert (second["count"], second["rate"], second["rate_low"], second["rate_high"]) == (1, 0, 0, 0)


def test_spreads_by_hand() -> None:
    """Rates 1/2 and 1, estimated variances of their estimates 1/12 (s² = 1/3, n = 4) and 0; weights 3/4 and 1/4.

    natural: (3/4)(1/8)² + (1/4)(3/8)² = 3/64, less (3/16)(1/12) = 1/64: 2/64.
    forced: 1/16 less (1/4)(1/12): 1/24. variance: 2/64 + (3/4)(1/3) = 9/32.
    Halves of the first: 1 then 0. Chosen on the first half, both are 1: the first branch is best and worst. On the
    second half the second branch is best, the first worst, and on the first half both measure 1.
    """
    (row,) = position_spreads(position([[1, 1, 0, 0], [1, 1, 1, 1]], [0.6, 0.2])).to_dict("records")
    assert row["natural"] == pytest.approx(2 / 64)
    assert row["forced"] == pytest.approx(1 / 24)
    assert row["variance"] == pytest.approx(9 / 32)
    assert row["covered"] == pytest.approx(0.8)
    assert row["rate"] == pytest.approx(0.625)
    assert (row["range"], row["gain"], row["branches"]) == (0, 0, 2)


def test_an_exact_branch_has_no_noise() -> None:
    """Rates 0 (known) and 1/2; forced: 1/16 less (1/4) v of the second alone, v = 1/12."""
    (row,) = position_spreads(position([[0.0], [1, 0, 0, 1]], [0.5, 0.5])).to_dict("records")
    assert row["forced"] == pytest.approx(1 / 16 - 1 / 48)
    assert row["range"] == pytest.approx(0.5)  # on either half the second branch is at 1/2
    assert row["gain"] == pytest.approx(0.5)


RATES = {"equal": [0.4, 0.4, 0.4], "certain": [0.0, 0.0, 0.0], "different": [0.1, 0.5, 0.9]}
WEIGHTS = [0.7, 0.2, 0.1]


def simulate(rates: Sequence[float], repeats: int, num_continuations: int, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    parts = []
    for repeat in range(repeats):
        scores = (generator.random((len(rates), num_continuations)) < np.array(rates)[:, None]).astype(float)
        parts.append(position(scores.tolist(), WEIGHTS, prompt=repeat))
    return position_spreads(pd.concat(parts))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1 / 3])
def test_equal_rates_have_no_spread_at_all(rate: float) -> None:
    """Not 1e-33 of rounding, which would make a share of 100%."""
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    assert corrected_variance(np.full(4, rate), np.zeros(4), weights / weights.sum()) == 0


@pytest.mark.parametrize("name", RATES)
def test_spreads_are_unbiased(name: str) -> None:
    """Thousands of positions with the same true rates: every mean is the truth within its own interval (99.9%)."""
    rates, weights = np.array(RATES[name]), np.array(WEIGHTS)
    spreads = simulate(RATES[name], 2500, 6)
    mean = weights @ rates
    truth = {
        "natural": weights @ (rates - mean) ** 2,
        "variance": mean * (1 - mean),
        "forced": rates.var(),
        "rate": mean,
    }
    if name != "different":  # choosing by a half of 3 is no sure choice, so range and gain then fall short of the truth
        truth |= {"range": 0.0, "gain": 0.0}
    for measure, true in truth.items():
        values = spreads[measure].to_numpy()
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - true) <= 3.3 * error + 1e-12, measure
    assert (spreads["natural"] < 0).any() or name == "certain", "a corrected spread may be negative"


def test_range_and_gain_come_near_the_truth_with_many_continuations() -> None:
    spreads = simulate(RATES["different"], 200, 200)
    assert spreads["range"].mean() == pytest.approx(0.8, abs=0.01)
    assert spreads["gain"].mean() == pytest.approx(0.8, abs=0.01)


def test_the_correction_equals_brute_force_over_all_outcomes() -> None:
    """Two branches, two continuations each: the mean over all 16 outcomes, by their probability, is the true spread."""
    rates, weights = np.array([0.3, 0.8]), np.array([0.9, 0.1])
    expected = 0.0
    for outcome in np.ndindex(2, 2, 2, 2):
        scores = np.array(outcome, dtype=float).reshape(2, 2)
        probability = float(np.prod(np.where(scores == 1, rates[:, None], 1 - rates[:, None])))
        noise = scores.var(axis=1, ddof=1) / 2
        expected += probability * corrected_variance(scores.mean(axis=1), noise, weights)
    assert expected == pytest.approx(weights @ (rates - weights @ rates) ** 2)


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    known = {"sample": 0, "position": 0, "kind": "fork", "entropy": 1.0, "branches": 3, "covered": 0.9, "rate": 0.5}
    numbers = {"natural": 0.0, "variance": 0.2, "forced": 0.0, "range": 0.0, "gain": 0.0}
    return pd.DataFrame([known | numbers | row for row in rows])


def test_means_by_kind_are_clustered_by_prompt() -> None:
    """Prompts of equal size: the mean of the prompt means, with Student's interval. Share: sum over sum."""
    values = [[0.1, 0.3], [0.0, 0.2], [0.5, 0.1]]
    rows = [{"prompt": p, "position": k, "natural": v} for p, each in enumerate(values) for k, v in enumerate(each)]
    (row,) = summarise_kinds(table(rows)).to_dict("records")
    expected = mean_with_normal_interval(values)
    assert (row["natural"], row["natural_low"], row["natural_high"]) == pytest.approx(tuple(expected))
    assert row["share"] == pytest.approx(1.2 / (6 * 0.2))
    assert (row["kind"], row["positions"], row["prompts"]) == ("fork", 6, 3)


def test_the_difference_is_paired_by_response() -> None:
    """Hard and easy responses differ far more than their positions do; a response without controls is left out."""
    rows: list[dict[str, Any]] = []
    for prompt, level in enumerate((0.1, 0.5, 0.9, 0.3)):
        rows += [{"prompt": prompt, "position": k, "natural": level + d} for k, d in enumerate((0.02, 0.04))]
        rows += [{"prompt": prompt, "position": 5, "kind": "random", "natural": level + 0.01 * (prompt % 2)}]
    rows += [{"prompt": 9, "natural": 99.0}, {"prompt": 0, "position": 7, "kind": "low", "natural": 0.1}]
    compared = compare_kinds(table(rows)).set_index("against")
    expected = mean_with_normal_interval([[0.03], [0.02], [0.03], [0.02]])
    row = compared.loc["random"]
    assert row["responses"] == 4
    assert (row["natural"], row["natural_low"], row["natural_high"]) == pytest.approx(tuple(expected))
    assert compared.loc["low", "natural"] == pytest.approx(0.03)
    assert np.isnan(compared.loc["low", "natural_low"]), "one prompt tells nothing of the spread"
    assert compare_kinds(table([{"prompt": 0}])).empty


def test_ranks_equal_scipy_s_and_the_interval_holds_the_truth() -> None:
    generator = np.random.default_rng(3)
    first, second = generator.integers(0, 8, 200).astype(float), generator.random(200)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
    entropy = generator.random(300)
    rows = [
        {"prompt": index // 5, "entropy": e, "natural": e + generator.normal(0, 0.3), "forced": generator.random()}
        for index, e in enumerate(entropy)
    ]
    relation = entropy_relation(table(rows), seed=0, resamples=400).set_index("measure")
    assert relation.loc["natural", "spearman_low"] > 0.3
    assert relation.loc["forced", "spearman_low"] < 0 < relation.loc["forced", "spearman_high"]
    assert relation.equals(entropy_relation(table(rows), seed=0, resamples=400).set_index("measure"))
    single = entropy_relation(table(rows[:5]), seed=0).set_index("measure")
    assert np.isnan(single.loc["natural", "spearman_low"])


def test_forks_by_the_token_that_was_taken() -> None:
    places = [("a", 0.3), ("b", 0.1), ("a", 0.5), ("b", 0.3), ("rare", 0.9)]
    spreads = table([{"prompt": index, "natural": value} for index, (_, value) in enumerate(places)])
    rows = [
        {"prompt": index, "sample": 0, "position": 0, "kind": "fork", "taken": taken, "token": name if taken else "c"}
        for index, (name, _) in enumerate(places)
        for taken in (True, False)
    ]
    found = fork_tokens(pd.DataFrame(rows), spreads, min_positions=2)
    assert found["token"].tolist() == ["a", "b"]
    assert found["natural"].tolist() == pytest.approx([0.4, 0.2])
    assert found["positions"].tolist() == [2, 2]
    assert fork_tokens(pd.DataFrame(rows), spreads).empty


def test_bins_of_entropy_hold_every_position_once() -> None:
    entropies = [-1e-7, 0.0, 0.0005, 0.001, 0.3, 0.5, 7.0]
    bins = entropy_bins(table([{"prompt": i, "entropy": e, "natural": i} for i, e in enumerate(entropies)]))
    assert bins["from"].tolist() == [0.0, 0.001, 0.25, 0.5, 2.0]
    assert bins["positions"].tolist() == [3, 1, 1, 1, 1]
    assert bins["natural"].tolist() == [1, 3, 4, 5, 6]
    assert bins["to"].iloc[-1] == np.inf
    assert branching.ENTROPY_EDGES[0] == 0
