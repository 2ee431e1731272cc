"""How much the outcome of a response depends on the token at one of its positions.

Forces alternatives at a position and compares the success rates of their continuations. Estimated rates differ even if
the true ones are equal; every spread corrects for that. Intervals are 95%, clustered by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import rankdata

from forkrl.analysis.patterns import mean_by_cluster
from forkrl.stats.intervals import Estimate, as_columns, mean_with_interval

KINDS = ("fork", "random", "low")
MEASURES = ("natural", "forced", "range", "gain")
"""Measures of ``position_spreads``."""
ENTROPY_EDGES = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, np.inf)
"""Nats; fixed, so that tables of different models compare."""
RESAMPLES = 2000

_POSITION = ["prompt", "sample", "position"]
Floats = npt.NDArray[np.float64]


def choose_positions(
    entropy: Sequence[float] | npt.NDArray[np.floating],
    generator: np.random.Generator,
    *,
    forks: int,
    random: int,
    low: int,
) -> pd.DataFrame:
    """Distinct positions of one response to branch at: columns position, kind, entropy, sorted by position.

    - fork: highest entropy ``[T]`` (finite, nats; ties: the earlier position).
    - random: uniform over the remaining positions; the control.
    - low: uniform over the remaining positions in the half of lowest entropy. Not the lowest ones: among entropies of
      about 1e-7 nats rounding decides, and always picks the same few token types.

    Short responses divide their tokens in the requested proportions, by largest remainder.
    """
    entropy_T = np.asarray(entropy, dtype=np.float64)
    if not np.isfinite(entropy_T).all():
        raise ValueError("entropy is NaN or infinite")
    counts = _shares((forks, random, low), len(entropy_T))
    falling_T = np.argsort(-entropy_T, kind="stable")
    top = falling_T[: counts[0]]
    drawn = generator.choice(falling_T[counts[0] :], counts[1], replace=False)
    free = np.setdiff1d(falling_T[len(entropy_T) // 2 :], np.concatenate([top, drawn]))
    lowest = generator.choice(free, min(counts[2], len(free)), replace=False)
    chosen = [
        (int(position), kind) for kind, group in zip(KINDS, (top, drawn, lowest), strict=True) for position in group
    ]
    table = pd.DataFrame(sorted(chosen), columns=["position", "kind"])
    return table.assign(entropy=entropy_T[table["position"].to_numpy(dtype=np.int64)])


def _shares(wanted: Sequence[int], available: int) -> list[int]:
    """Divide ``available`` proportionally to ``wanted``, at most ``wanted``; ties favour the first."""
    if sum(wanted) <= available:
        return list(wanted)
    exact = [available * each / sum(wanted) for each in wanted]
    shares = [int(each) for each in exact]
    for index in sorted(range(len(wanted)), key=lambda index: shares[index] - exact[index])[: available - sum(shares)]:
        shares[index] += 1
    return shares


def branch_rates(branches: pd.DataFrame) -> pd.DataFrame:
    """``branches`` with columns count, rate, rate_low, rate_high: Wilson's interval; none if the rate is exact.

    ``branches`` has one row per alternative: prompt, sample, position (ints from 0), kind ("fork", "random" or "low"),
    entropy (nats) of the sampling distribution, probability in it, taken (bool: by the response), exact (bool: it ends
    the response), scores (list in [0, 1], one per continuation; a single one if exact).
    """
    estimates = [
        Estimate(*[float(scores[0])] * 3) if exact else mean_with_interval([[float(score)] for score in scores])
        for scores, exact in zip(branches["scores"], branches["exact"], strict=True)
    ]
    columns = (
        dict(zip(("rate", "rate_low", "rate_high"), zip(*estimates, strict=True), strict=True)) if estimates else {}
    )
    return branches.assign(count=[len(scores) for scores in branches["scores"]], **columns)


def position_spreads(branches: pd.DataFrame) -> pd.DataFrame:
    """How much the success rates of a position's branches differ: one row per position.

    With rates ``r_i`` and weights ``w_i`` the spread is the variance ``sum_i w_i (r_i - sum_j w_j r_j)^2``. Rate
    estimates of variance ``v_i`` add ``sum_i w_i (1 - w_i) v_i`` in expectation; its unbiased estimate from the
    continuations is subtracted, so a single position may be negative.

    Columns, besides prompt, sample, position, kind and entropy:
        branches, covered: number of alternatives tried, and their total probability.
        natural: spread weighted by the model's probabilities (renormalised over those tried): the part of the outcome's
            variance that this choice decides.
        variance: that total variance for the same mixture, unbiased; natural / variance of sums is the share decided.
        forced: spread with equal weights. Large where the model is certain, as the alternatives derail the response.
        range, gain: best minus worst branch, best minus taken. Against selection bias, one half of the continuations
            selects the branches and the other half measures them, and vice versa.
        rate: mean rate under the model's probabilities.
    """
    rows = []
    for key, group in branches.groupby(_POSITION, sort=True):
        first = group.iloc[0]
        place = dict(zip(_POSITION, key, strict=True)) | {"kind": first["kind"], "entropy": float(first["entropy"])}
        scores = [np.asarray(each, dtype=np.float64) for each in group["scores"]]
        measured = _measure(scores, group["probability"].to_numpy(dtype=np.float64), int(group["taken"].argmax()))
        rows.append(place | {"branches": len(group), "covered": float(group["probability"].sum())} | measured)
    return pd.DataFrame(rows)


def _measure(scores: Sequence[Floats], probability_A: Floats, taken: int) -> dict[str, float]:
    rate_A = np.array([each.mean() for each in scores])
    # A single score belongs to an exact branch, whose rate is known.
    variance_A = np.array([each.var(ddof=1) if len(each) > 1 else 0.0 for each in scores])
    noise_A = variance_A / np.array([len(each) for each in scores])
    weight_A = probability_A / probability_A.sum()
    equal_A = np.full(len(scores), 1 / len(scores))
    natural = corrected_variance(rate_A, noise_A, weight_A)
    spread, gain = _from_halves(scores, taken)
    return {
        "natural": natural,
        "variance": float(weight_A @ variance_A) + natural,
        "forced": corrected_variance(rate_A, noise_A, equal_A),
        "range": spread,
        "gain": gain,
        "rate": float(weight_A @ rate_A),
    }


def corrected_variance(rate_A: Floats, noise_A: Floats, weight_A: Floats) -> float:
    """Unbiased variance of the true rates under weights that sum to 1, from estimates of variance ``noise_A``."""
    shifted_A = rate_A - rate_A[0]  # makes the variance of equal rates exactly 0
    observed = weight_A @ (shifted_A - weight_A @ shifted_A) ** 2
    return float(observed - weight_A * (1 - weight_A) @ noise_A)


def _from_halves(scores: Sequence[Floats], taken: int) -> tuple[float, float]:
    """Best minus worst and best minus taken, selected on one half of the continuations and measured on the other."""
    first_A = np.array([each[: max(len(each) // 2, 1)].mean() for each in scores])
    second_A = np.array([each[len(each) // 2 :].mean() for each in scores])  # a single score is in both halves
    spread = gain = 0.0
    for choosing_A, measuring_A in ((first_A, second_A), (second_A, first_A)):
        best = measuring_A[choosing_A.argmax()]
        spread += float(best - measuring_A[choosing_A.argmin()]) / 2
        gain += float(best - measuring_A[taken]) / 2
    return spread, gain


def summarise_kinds(spreads: pd.DataFrame) -> pd.DataFrame:
    """One row per kind: counts, means, ``share`` (natural over variance) and measures with ``_low`` and ``_high``."""
    present = [kind for kind in KINDS if (spreads["kind"] == kind).any()]
    return pd.DataFrame([{"kind": kind, **_means(spreads[spreads["kind"] == kind])} for kind in present])


def entropy_bins(spreads: pd.DataFrame, edges: Sequence[float] = ENTROPY_EDGES) -> pd.DataFrame:
    """As ``summarise_kinds``, by entropy bin over all kinds, without empty bins; columns from and to are in nats."""
    number = np.searchsorted(np.asarray(edges), spreads["entropy"].clip(lower=edges[0]), side="right") - 1
    return pd.DataFrame(
        [
            {"from": edges[index], "to": edges[index + 1], **_means(spreads[number == index])}
            for index in range(len(edges) - 1)
            if (number == index).any()
        ]
    )


def fork_tokens(branches: pd.DataFrame, spreads: pd.DataFrame, min_positions: int = 20) -> pd.DataFrame:
    """As ``summarise_kinds``, for forks by token taken with at least ``min_positions``; highest ``natural`` first."""
    taken = branches.loc[branches["taken"] & (branches["kind"] == KINDS[0]), [*_POSITION, "token"]]
    found = [
        {"token": token, **_means(group)}
        for token, group in spreads.merge(taken, on=_POSITION).groupby("token")
        if len(group) >= min_positions
    ]
    return pd.DataFrame(found).sort_values("natural", ascending=False, ignore_index=True) if found else pd.DataFrame()


def _means(spreads: pd.DataFrame) -> dict[str, float]:
    by_prompt = spreads.groupby("prompt")
    sums, counts = by_prompt[[*MEASURES, "variance"]].sum(), by_prompt.size()
    plain = {name: float(spreads[name].mean()) for name in ("entropy", "branches", "covered", "rate")}
    found = {"positions": len(spreads), "prompts": len(counts), **plain}
    found |= as_columns("share", mean_by_cluster(sums["natural"], sums["variance"]))
    for name in MEASURES:
        found |= as_columns(name, mean_by_cluster(sums[name], counts))
    return found


def compare_kinds(spreads: pd.DataFrame) -> pd.DataFrame:
    """Forks minus each control kind (column ``against``), paired within responses to cancel their difficulty."""
    rows = []
    means = spreads.pivot_table(index=["prompt", "sample"], columns="kind", values=list(MEASURES), aggfunc="mean")
    tried = set(spreads["kind"])
    for control in KINDS[1:]:
        if not {KINDS[0], control} <= tried:
            continue
        row: dict[str, Any] = {"against": control}
        for measure in MEASURES:
            difference = (means[measure, KINDS[0]] - means[measure, control]).dropna()
            by_prompt, row["responses"] = difference.groupby("prompt"), len(difference)
            row |= as_columns(measure, mean_by_cluster(by_prompt.sum(), by_prompt.size()))
        if row["responses"]:
            rows.append(row)
    return pd.DataFrame(rows)


def entropy_relation(spreads: pd.DataFrame, seed: int, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Spearman correlation of ``natural`` and ``forced`` with entropy, with a bootstrap interval over prompts.

    Noise in the spreads only attenuates the correlation. NaN if one is constant; no interval with a single prompt.
    """
    rows = []
    members = list(spreads.groupby("prompt").indices.values())
    entropy_N = spreads["entropy"].to_numpy(dtype=np.float64)
    for measure in ("natural", "forced"):
        spread_N, generator = spreads[measure].to_numpy(dtype=np.float64), np.random.default_rng(seed)
        draws = []
        for _ in range(resamples if len(members) > 1 else 0):
            index = np.concatenate([members[each] for each in generator.integers(len(members), size=len(members))])
            draws.append(spearman(entropy_N[index], spread_N[index]))
        finite = np.array([each for each in draws if np.isfinite(each)])
        low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) else (np.nan, np.nan)
        rows.append((measure, spearman(entropy_N, spread_N), float(low), float(high), len(spreads)))
    return pd.DataFrame(rows, columns=["measure", "spearman", "spearman_low", "spearman_high", "positions"])


def spearman(first_N: Floats, second_N: Floats) -> float:
    """Pearson correlation of ranks, ties averaged; NaN if one input is constant."""
    if len(first_N) < 2:
        return float("nan")
    first_N, second_N = (ranks - ranks.mean() for ranks in map(rankdata, (first_N, second_N)))
    size = np.sqrt((first_N @ first_N) * (second_N @ second_N))
    return float(first_N @ second_N / size) if size > 0 else float("nan")
