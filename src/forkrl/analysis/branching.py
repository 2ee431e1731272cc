"""What a token is worth: how much the outcome of a response depends on the token at one of its positions.

The paper (arXiv 2506.01939, section 3) calls tokens of high entropy forks because of where they stand. Here is the
causal test: at a position force each of several alternatives, continue each many times, and compare the success rates.
The rates are estimates, and would differ even if all alternatives were worth the same; every spread below is corrected
for that.

Tables are data frames. ``branches`` has a row for each alternative tried at a position:

    prompt, sample, position     int: which prompt, which response to it, which token of that (all from 0)
    kind                         "fork", "random" or "low": why the position was chosen
    entropy                      nats, of the distribution that alternatives and continuations are drawn from
    probability                  of the alternative in that distribution
    taken                        bool: the response itself took it
    exact                        bool: it ends the response, so that nothing is random after it
    scores                       list: the score in [0, 1] of every continuation; of an exact one, the one score

Intervals are 95% intervals, clustered by prompt: positions of one prompt are alike, and only prompts are independent.
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
"""What ``position_spreads`` measures of each position."""
ENTROPY_EDGES = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, np.inf)
"""Nats; the same for every model, so that tables compare."""
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
    """Positions of one response to branch at, none of them twice: columns position, kind, entropy, by position.

    - fork: those of highest entropy (ties: the earlier one).
    - random: drawn uniformly from all the others. This is the control.
    - low: drawn uniformly from the half of lowest entropy, as far as still free. Not simply the lowest: which of very
      many tokens at about 1e-7 nats that is, rounding decides, and they are the same few types again and again.

    A response with fewer tokens than wanted divides them in the same proportions, by largest remainder.

    Args:
        entropy: ``[T]`` nats, one a token.
        generator: for the draws.
        forks, random, low: wanted of each kind.

    Raises:
        ValueError: an entropy is NaN or infinite.
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
    """What is wanted, or as much as there is in the same proportions; of equal remainders the first has it."""
    if sum(wanted) <= available:
        return list(wanted)
    exact = [available * each / sum(wanted) for each in wanted]
    shares = [int(each) for each in exact]
    for index in sorted(range(len(wanted)), key=lambda index: shares[index] - exact[index])[: available - sum(shares)]:
        shares[index] += 1
    return shares


def branch_rates(branches: pd.DataFrame) -> pd.DataFrame:
    """``branches`` with the success rate of each: columns count, rate, rate_low, rate_high.

    Continuations are independent draws, so the interval is Wilson's at their number. The rate of an exact branch is
    known: both ends are the rate.
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
    """How far the success rates of a position's branches differ: one row a position.

    With rates ``r_i`` and weights ``w_i`` the spread is the variance ``sum_i w_i (r_i - sum_j w_j r_j)^2``. From
    estimated rates it comes out too large by ``sum_i w_i (1 - w_i) v_i`` on average, ``v_i`` the variance of estimate
    i; its unbiased estimate from the continuations (binomial, where scores are 0 or 1) is subtracted. So equal true
    rates give 0 on average, and a single position may come out below 0.

    Columns, next to prompt, sample, position, kind and entropy:
        branches: how many were tried.
        covered: probability of the tried ones together.
        natural: the spread with the model's own probabilities (renormalised over those tried) as weights: the part of
            the outcome's variance that this one choice decides.
        variance: that whole variance, for the same mixture of branches, also unbiased. ``natural / variance`` of sums
            over positions is the share that the choice decides.
        forced: the spread with equal weights: what happens if one is forced to choose blindly. Where the model is
            certain the alternatives are slips of the pen that derail a response, and it is large although the model
            would never choose so.
        range: best minus worst branch; gain: best minus taken. The largest of noisy rates is too large; so one half of
            the continuations says which branch is best or worst, the other how good it is, and the other way round.
        rate: the mean rate under the model's own probabilities.
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
    """The spreads of one position with ``A`` alternatives."""
    rate_A = np.array([each.mean() for each in scores])
    # A single score is of an exact branch, whose rate is known.
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
    """Variance of the true rates under weights that sum to 1, unbiased, from estimates of variance ``noise_A``."""
    shifted_A = rate_A - rate_A[0]  # equal rates then have a variance of exactly 0, not of rounding
    observed = weight_A @ (shifted_A - weight_A @ shifted_A) ** 2
    return float(observed - weight_A * (1 - weight_A) @ noise_A)


def _from_halves(scores: Sequence[Floats], taken: int) -> tuple[float, float]:
    """Best minus worst and best minus taken, chosen on one half of the continuations and measured on the other."""
    first_A = np.array([each[: max(len(each) // 2, 1)].mean() for each in scores])
    second_A = np.array([each[len(each) // 2 :].mean() for each in scores])  # of a single score: that one again
    spread = gain = 0.0
    for choosing_A, measuring_A in ((first_A, second_A), (second_A, first_A)):
        best = measuring_A[choosing_A.argmax()]
        spread += float(best - measuring_A[choosing_A.argmin()]) / 2
        gain += float(best - measuring_A[taken]) / 2
    return spread, gain


def summarise_kinds(spreads: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of position that was tried: counts, and means over its positions with intervals.

    Columns: kind, positions, prompts, branches, covered and entropy (means), rate; for ``share``, ``natural``,
    ``forced``, ``range`` and ``gain`` the mean, ``_low`` and ``_high``. ``share`` is natural over variance.
    """
    present = [kind for kind in KINDS if (spreads["kind"] == kind).any()]
    return pd.DataFrame([{"kind": kind, **_means(spreads[spreads["kind"] == kind])} for kind in present])


def entropy_bins(spreads: pd.DataFrame, edges: Sequence[float] = ENTROPY_EDGES) -> pd.DataFrame:
    """The same for bins of entropy, over all kinds, without empty bins: from, to (nats), and means."""
    number = np.searchsorted(np.asarray(edges), spreads["entropy"].clip(lower=edges[0]), side="right") - 1
    return pd.DataFrame(
        [
            {"from": edges[index], "to": edges[index + 1], **_means(spreads[number == index])}
            for index in range(len(edges) - 1)
            if (number == index).any()
        ]
    )


def fork_tokens(branches: pd.DataFrame, spreads: pd.DataFrame, min_positions: int = 20) -> pd.DataFrame:
    """The same for forks, by the token taken there (column token), if at ``min_positions``; most decisive first.

    Entropy says how undecided a model is, not what depends on the decision: this is where the two part.
    """
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
    """Forks against the controls: one row for each control (``against``) that was tried along with forks.

    For each measure the mean over responses of the mean at its forks minus the mean at its control positions. It is
    paired by response (those that have both), so what makes a whole response easy or hard cancels.
    """
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
    """Spearman's rank correlation of each spread with entropy over all tried positions, with an interval.

    The interval holds the middle 95% of the correlations of ``resamples`` draws of as many prompts with replacement.
    Noise of the single spreads pulls a correlation towards 0; it does not make one.

    Returns:
        Rows natural and forced: measure, spearman, spearman_low, spearman_high, positions. NaN where one of the two
        does not vary; the ends are NaN with a single prompt.
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
    """Pearson's correlation of the ranks; equal values share their mean rank. NaN where one does not vary."""
    if len(first_N) < 2:
        return float("nan")
    first_N, second_N = (ranks - ranks.mean() for ranks in map(rankdata, (first_N, second_N)))
    size = np.sqrt((first_N @ first_N) * (second_N @ second_N))
    return float(first_N @ second_N / size) if size > 0 else float("nan")
