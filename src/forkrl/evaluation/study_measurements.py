"""Measurements after training, compared between the arms of a study; axes as in ``study_arms``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from forkrl.config.study import START, StudyConfig, before_training
from forkrl.errors import UserError
from forkrl.evaluation.study_arms import (
    Floats,
    Row,
    Runs,
    Scores,
    as_share,
    common_seeds,
    difference,
    difference_columns,
)
from forkrl.stats.crossed import Crossed, crossed_mean
from forkrl.stats.intervals import as_columns
from forkrl.store.run_record import ACCURACY, LENGTH, RunRecord

BEFORE, MEAN, EQUAL_LENGTH = "before training", "mean", "accuracy at equal length"


def measurement_rows(study: StudyConfig, arms: Mapping[str, Runs]) -> list[Row]:
    """Per measurement, arm and figure: the mean over seeds, and the difference from the baseline, paired.

    The arm ``START`` is the model before training, measured with the seeds of the baseline. ``MEAN``: over evaluations,
    each with the same weight.
    """
    baseline = arms[study.baseline]
    rows: list[Row] = []
    for name, measurement in study.measurements.items():
        subjects = [(runs.arm, study.label(runs.arm), runs, name) for runs in arms.values()]
        if has_measured(baseline, before_training(name)):
            subjects.append((START, BEFORE, baseline, before_training(name)))
        for arm, label, runs, key in subjects:
            _require_same_questions(name, baseline, runs, key)
            where: Row = {"measurement": name, "arm": arm, "label": label}
            figures = _measured_figures(runs, baseline, key, name)
            if measurement.command == "eval":
                figures[EQUAL_LENGTH] = _at_equal_length(runs, baseline, key, name)
            for figure, (of, of_baseline) in figures.items():
                compared = None if arm == study.baseline else difference(runs, baseline, of, of_baseline)
                rows.append(where | _measured_columns(figure, crossed_mean(runs.scores(of)), compared))
    return rows + _mean_rows(study, arms)


def has_measured(runs: Runs, name: str) -> bool:
    return all(name in record.measured for record in runs.by_seed.values())


def measured_scores(name: str, figure: str) -> Scores:
    """``[P]`` of an evaluation, or ``[1]`` of another command."""

    def of(record: RunRecord) -> Sequence[float]:
        measured = record.measured[name]
        if figure in measured.scores:
            return measured.scores[figure]
        value = measured.figures.get(figure)
        return [math.nan if value is None else value]

    return of


def _measured_figures(runs: Runs, baseline: Runs, key: str, name: str) -> dict[str, tuple[Scores, Scores]]:
    """By figure that all runs have: its values in ``runs``, and in the baseline."""
    every = [record.measured[key] for record in runs.by_seed.values()]
    every += [record.measured[name] for record in baseline.by_seed.values()]
    common = [figure for figure in every[0].names if all(figure in each.names for each in every)]
    return {figure: (measured_scores(key, figure), measured_scores(name, figure)) for figure in common}


def _at_equal_length(runs: Runs, baseline: Runs, key: str, name: str) -> tuple[Scores, Scores]:
    """Accuracy where each run and the baseline's of the same seed have spent the same mean tokens a response.

    The one that writes more is stopped earlier; between budgets, accuracy is interpolated.
    """

    def at(of: str) -> Scores:
        def accuracy(record: RunRecord) -> list[float]:
            sides = (runs.by_seed.get(record.seed), key), (baseline.by_seed.get(record.seed), name)
            lengths = [side.measured[measured].spending[0][-1] for side, measured in sides if side is not None]
            spent, accuracies = record.measured[of].spending
            return [float(np.interp(min(lengths), [0.0, *spent], [0.0, *accuracies]))]

        return accuracy

    return at(key), at(name)


def _mean_rows(study: StudyConfig, arms: Mapping[str, Runs]) -> list[Row]:
    """Accuracy and length over all evaluations, each with equal weight."""
    names = [name for name, each in study.measurements.items() if each.command == "eval"]
    if len(names) < 2:
        return []
    baseline = arms[study.baseline]
    subjects = [(runs.arm, study.label(runs.arm), runs, names) for runs in arms.values()]
    subjects.append((START, BEFORE, baseline, [before_training(name) for name in names]))
    rows: list[Row] = []
    for arm, label, runs, keys in subjects:
        for figure in (ACCURACY, LENGTH):
            value = _mean_of_means([runs.scores(measured_scores(key, figure)) for key in keys])
            seeds = [] if arm == study.baseline else common_seeds(runs, baseline)
            differences = [
                runs.scores(measured_scores(key, figure), seeds) - baseline.scores(measured_scores(name, figure), seeds)
                for key, name in zip(keys, names, strict=True)
            ]
            compared = _mean_of_means(differences) if len(seeds) > 1 else None
            where: Row = {"measurement": MEAN, "arm": arm, "label": label}
            rows.append(where | _measured_columns(figure, value, compared))
    return rows


def _mean_of_means(parts_SP: Sequence[Floats]) -> Crossed:
    """Over several evaluations with equal weights; each ``[S, P]``, with questions of its own.

    The evaluations are given, not sampled, so each is centred on the mean of means: their spread is no error.
    """
    total, means = sum(part.shape[1] for part in parts_SP), [part.mean() for part in parts_SP]
    centred = [
        np.mean(means) + (part - mean) * (total / (len(parts_SP) * part.shape[1]))
        for part, mean in zip(parts_SP, means, strict=True)
    ]
    return crossed_mean(np.concatenate(centred, axis=1))


def _measured_columns(figure: str, found: Crossed, compared: Crossed | None) -> Row:
    value = found.estimate
    if figure.startswith(ACCURACY):
        value = as_share(value)
    columns: Row = {"figure": figure, **as_columns("value", value)}
    return columns if compared is None else columns | difference_columns("difference", compared)


def _require_same_questions(name: str, baseline: Runs, runs: Runs, key: str) -> None:
    first_seed, first = next(iter(baseline.by_seed.items()))
    for seed, record in runs.by_seed.items():
        if record.measured[key].problems != first.measured[name].problems:
            raise UserError(
                f"measurement {name}: runs {baseline.arm} seed {first_seed} and {runs.arm} seed {seed} were measured "
                f"on different questions; remove their records to measure them again"
            )
