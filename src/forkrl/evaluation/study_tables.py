"""Compares the arms of a study: final accuracy with paired differences, curves, equal budgets, claims.

Axes: ``S`` seeds, ``P`` held-out problems, ``A`` arms. Every run of a study answers the same problems, and runs of
different arms are paired by seed and problem. Differences have the two-level interval of ``forkrl.stats.crossed``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from forkrl.config.study import START, ClaimConfig, StudyConfig, before_training
from forkrl.evaluation.study_arms import (
    Floats,
    Row,
    Runs,
    Scores,
    as_share,
    at_start,
    common_seeds,
    difference,
    difference_columns,
    final,
    runs_by_arm,
)
from forkrl.evaluation.study_measurements import has_measured, measured_scores, measurement_rows
from forkrl.stats.crossed import POWER, Crossed, crossed_mean
from forkrl.stats.intervals import Estimate, as_columns, mean_with_normal_interval
from forkrl.stats.permutation import holm
from forkrl.store.run_record import ACCURACY, CURVES, SECONDS, TOKENS, RunRecord

_DRAWS = 2000
FIGURES = {
    "length": "eval/length",
    "truncated": "eval/truncated_fraction",
    "entropy": "eval/entropy",
    "kept": "selection/kept_fraction",
}
"""Columns of the table of arms, and the curve whose last value they hold; ``kept`` is the mean over steps."""
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "not distinguishable"


def study_tables(study: StudyConfig, records: Sequence[RunRecord], seed: int = 0) -> dict[str, list[Row]]:
    """All tables: ``arms``, ``claims``, ``measurements``, ``curves``, ``runs``; ``seed`` is for the bootstrap."""
    arms = runs_by_arm(study, records)
    measurements = measurement_rows(study, arms)  # first: it checks that questions are the same
    return {
        "arms": arm_rows(study, arms, seed),
        "claims": [claim_row(claim, arms) for claim in study.claims],
        "measurements": measurements,
        "curves": curve_rows(arms),
        "runs": run_rows(arms),
    }


def arm_rows(study: StudyConfig, arms: Mapping[str, Runs], seed: int) -> list[Row]:
    """Final accuracy of each arm and its difference from the baseline, best first."""
    baseline = arms[study.baseline]
    best = _share_of_draws_won(arms.values(), seed)
    rows: list[Row] = []
    for runs in arms.values():
        accuracy = crossed_mean(runs.scores(final))
        gain = crossed_mean(runs.scores(final) - runs.scores(at_start))
        row: Row = {
            "arm": runs.arm,
            "label": study.label(runs.arm),
            "seeds": len(runs.by_seed),
            **as_columns("accuracy", as_share(accuracy.estimate)),
            "start": float(runs.scores(at_start).mean()),
            **as_columns("gain", gain.estimate),
            "best": best.get(runs.arm, math.nan),
            "seed_deviation": float(runs.scores(final).mean(axis=1).std(ddof=1)),
            **{column: _last(runs, curve, whole=column == "kept") for column, curve in FIGURES.items()},
        }
        found = None if runs is baseline else difference(runs, baseline)
        if found is not None:
            row |= difference_columns("difference", found)
            for name, total in (("equal_tokens", TOKENS), ("equal_seconds", SECONDS)):
                if _are_comparable([*runs.by_seed.values(), *baseline.by_seed.values()], total):
                    row |= as_columns(name, equal_budget_difference(runs, baseline, total))
        rows.append(row)
    compared = [row for row in rows if "p" in row]
    for row, adjusted in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["p_holm"] = adjusted
    return sorted(rows, key=lambda row: -row["accuracy"])


def _are_comparable(records: Sequence[RunRecord], total: str) -> bool:
    """Whether a budget means the same for all runs, and scores between start and end are known."""
    clocks = {(record.machine, record.provenance.get("threads")) for record in records}
    known = all(total in record.curves and len(record.scores) > 2 for record in records)
    return known and (total != SECONDS or (len(clocks) == 1 and bool(records[0].machine)))


def equal_budget_difference(runs: Runs, other: Runs, total: str) -> Estimate:
    """The difference where every run has spent as much (tokens or seconds) as the one that spent least in all.

    Scores between two evaluations are interpolated linearly.
    """
    seeds = common_seeds(runs, other)
    every = [each.by_seed[seed] for each in (runs, other) for seed in seeds]
    budget = min(_spent(record, total)[-1] for record in every)

    def at_budget(record: RunRecord) -> Floats:
        return _scores_at(record, total, budget)

    return crossed_mean(runs.scores(at_budget, seeds) - other.scores(at_budget, seeds)).estimate


def _scores_at(record: RunRecord, total: str, budget: float) -> Floats:
    """``[P]`` scores of a run when it had spent ``budget``."""
    spent, steps = _spent(record, total), sorted(record.scores)
    place = float(np.interp(budget, spent, np.arange(len(steps))))
    low = min(int(place), len(steps) - 2)
    before, after = (np.array(record.scores[steps[each]]) for each in (low, low + 1))
    mixed: Floats = before + (place - low) * (after - before)
    return mixed


def _spent(record: RunRecord, total: str) -> list[float]:
    """What the run had spent at each of its evaluations."""
    steps, values = record.curves[total]
    known = [value or 0.0 for value in values]
    return [float(np.interp(step, steps, known)) for step in sorted(record.scores)]


def claim_row(claim: ClaimConfig, arms: Mapping[str, Runs]) -> Row:
    """The verdict on a claim: whether the 95% interval lies in the differences for which it is true, or outside."""
    row: Row = {
        "claim": claim.text,
        "measurement": claim.measurement or "held out",
        "arm": claim.arm,
        "than": claim.than,
        "says": claim.says,
        "margin": claim.margin,
    }
    found = _claimed_difference(claim, arms)
    if found is None:
        return row | {"verdict": "not tested", "seeds_needed": math.nan}
    (low, high), interval = claim.region, found.estimate
    needed: float = math.nan
    if low < interval.low and interval.high < high:
        verdict = SUPPORTED
    elif interval.high < low or high < interval.low:
        verdict = CONTRADICTED
    else:
        verdict = UNDECIDED
        distance = min(abs(found.mean - end) for end in (low, high) if math.isfinite(end))
        needed = found.seeds_needed(distance) or math.inf
    row |= as_columns("difference", interval) | {
        "detectable": found.detectable,
        "supported_from": _supported_from(claim, found),
    }
    return row | {"verdict": verdict, "seeds_needed": needed}


def _claimed_difference(claim: ClaimConfig, arms: Mapping[str, Runs]) -> Crossed | None:
    if claim.arm not in arms or claim.than not in {START, *arms}:
        return None
    runs, name = arms[claim.arm], claim.measurement
    of: Scores = measured_scores(name, ACCURACY) if name else final
    of_start: Scores = measured_scores(before_training(name), ACCURACY) if name else at_start
    if claim.than != START:
        return difference(runs, arms[claim.than], of)
    started = runs if not name else next(each for each in arms.values() if has_measured(each, before_training(name)))
    return difference(runs, started, of, of_start)


def _supported_from(claim: ClaimConfig, found: Crossed) -> float:
    """The true difference from which this design supports the claim in about 80% of studies.

    For "equal" up to which size, judged so that each end is missed in at most 10%; NaN if none is small enough.
    """
    low, high = claim.region
    if claim.says == "equal":
        reach = found.detectable_with(0.5 + POWER / 2)
        return high - reach if reach <= high else math.nan
    return low + found.detectable if math.isfinite(low) else high - found.detectable


def curve_rows(arms: Mapping[str, Runs]) -> list[Row]:
    """Mean over seeds, with Student's 95% interval, of every curve of each arm at each step."""
    rows: list[Row] = []
    for runs in arms.values():
        for metric in (*CURVES, TOKENS, SECONDS):
            at: dict[float, list[float | None]] = {}
            for record in runs.by_seed.values():
                for step, value in zip(*record.curves.get(metric, ([], [])), strict=True):
                    at.setdefault(step, []).append(value)
            for step in sorted(at):
                rows.append(
                    {"arm": runs.arm, "metric": metric, "step": step, "seeds": len(at[step])}
                    | as_columns("value", _over_seeds(at[step]))
                )
    return rows


def run_rows(arms: Mapping[str, Runs]) -> list[Row]:
    return [
        {
            "arm": runs.arm,
            "seed": seed,
            "start": fmean(at_start(record)),
            "final": fmean(final(record)),
            "steps": record.steps,
            "tokens": record.tokens,
            "seconds": record.seconds,
            "date": record.date,
            "commit": str(record.provenance.get("commit", "")),
            "workers": record.provenance.get("workers", math.nan),
            "threads": record.provenance.get("threads", math.nan),
            "machine": record.machine,
        }
        for runs in arms.values()
        for seed, record in runs.by_seed.items()
    ]


def _over_seeds(values: Sequence[float | None]) -> Estimate:
    known = [[value] for value in values if value is not None]
    return mean_with_normal_interval(known) if known else Estimate(math.nan, math.nan, math.nan)


def _last(runs: Runs, curve: str, *, whole: bool) -> float:
    """Mean over seeds of the curve's last value, or of its mean over steps."""
    found = []
    for record in runs.by_seed.values():
        values = [value for value in record.curves.get(curve, ([], []))[1] if value is not None]
        found += [fmean(values) if whole else values[-1]] if values else []
    return fmean(found) if found else math.nan


def _share_of_draws_won(every: Iterable[Runs], seed: int) -> dict[str, float]:
    """How often each arm has the highest accuracy when seeds and problems are drawn again; arms with all seeds only."""
    most = max(len(runs.by_seed) for runs in every)
    arms = [runs for runs in every if len(runs.by_seed) == most]
    seeds = set.intersection(*(set(runs.by_seed) for runs in arms))
    if len(arms) < 2 or len(seeds) < most:
        return {}
    generator = np.random.default_rng(seed)
    scores_ASP = np.stack([runs.scores(final, sorted(seeds)) for runs in arms])
    _, S, P = scores_ASP.shape
    wins_A = np.zeros(len(arms))
    for _ in range(_DRAWS):
        seed_weights = generator.multinomial(S, np.full(S, 1 / S))
        problem_weights = generator.multinomial(P, np.full(P, 1 / P))
        means_A = np.einsum("asp,s,p->a", scores_ASP, seed_weights, problem_weights)
        wins_A += np.isclose(means_A, means_A.max()) / np.isclose(means_A, means_A.max()).sum()
    return dict(zip((runs.arm for runs in arms), (wins_A / _DRAWS).tolist(), strict=True))
