"""The runs of a study by arm, and paired differences between arms.

Axes: ``S`` seeds, ``P`` held-out problems. Every run of a study answers the same problems; runs of different arms are
paired by seed and problem. Differences have the two-level interval of ``forkrl.stats.crossed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forkrl.config.study import StudyConfig
from forkrl.errors import UserError
from forkrl.stats.crossed import Crossed, crossed_mean
from forkrl.stats.intervals import Estimate, as_columns
from forkrl.store.run_record import RunRecord

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
Scores = Callable[[RunRecord], Sequence[float] | Floats]
"""``[P]`` values of a run, one per question, or one of the whole."""


class Runs(NamedTuple):
    """The runs of one arm by seed."""

    arm: str
    by_seed: dict[int, RunRecord]

    def scores(self, of: Scores, seeds: Iterable[int] | None = None) -> Floats:
        """``[S, P]`` of all seeds, or of those given."""
        return np.array([of(self.by_seed[seed]) for seed in (self.by_seed if seeds is None else seeds)], np.float64)


def final(record: RunRecord) -> Sequence[float]:
    """``[P]`` scores of the last evaluation."""
    return record.scores[max(record.scores)]


def at_start(record: RunRecord) -> Sequence[float]:
    """``[P]`` scores before training."""
    return record.scores[min(record.scores)]


def runs_by_arm(study: StudyConfig, records: Iterable[RunRecord]) -> dict[str, Runs]:
    """The arms with at least two runs, in the order of the study.

    Raises:
        UserError: two runs were evaluated on different problems, or no arm can be compared with the baseline.
    """
    found: dict[str, dict[int, RunRecord]] = {arm: {} for arm in study.arms}
    first: RunRecord | None = None
    for record in records:
        first = first or record
        if _data(record) != _data(first):
            raise UserError(
                f"runs {first.arm} seed {first.seed} and {record.arm} seed {record.seed} have different data or "
                f"held-out problems; a study needs the same data, eval.problems and task.held_out_rows for all runs "
                f"(metrics of other trainers can only be compared with each other)"
            )
        found[record.arm][record.seed] = record
    arms = {arm: Runs(arm, dict(sorted(runs.items()))) for arm, runs in found.items() if len(runs) > 1}
    if study.baseline not in arms or len(arms) < 2:
        have = ", ".join(f"{arm} {len(runs)}" for arm, runs in found.items())
        raise UserError(
            f"too few finished runs to compare: the baseline {study.baseline} and another arm need two each ({have}); "
            f"the same command trains the missing ones"
        )
    return arms


def _data(record: RunRecord) -> tuple[str, str]:
    return record.problems, str(record.provenance.get("data_fingerprint", ""))


def difference(runs: Runs, other: Runs, of: Scores = final, of_other: Scores | None = None) -> Crossed | None:
    """Mean of ``runs`` minus mean of ``other`` over common seeds and all problems; None below two common seeds."""
    seeds = common_seeds(runs, other)
    if len(seeds) < 2:
        return None
    return crossed_mean(runs.scores(of, seeds) - other.scores(of_other or of, seeds))


def common_seeds(runs: Runs, other: Runs) -> list[int]:
    return [seed for seed in runs.by_seed if seed in other.by_seed]


def difference_columns(name: str, found: Crossed) -> Row:
    return as_columns(name, found.estimate) | {"p": found.p, "detectable": found.detectable}


def as_share(estimate: Estimate) -> Estimate:
    """With its ends cut to those that a share can have."""
    return Estimate(estimate.mean, max(0.0, estimate.low), min(1.0, estimate.high))
