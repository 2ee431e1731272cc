"""Reads what a measurement of a study has found, for the record of its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from forkrl.config.study import MeasurementConfig
from forkrl.evaluation.budgets import Outcomes, budget_curve
from forkrl.store.results import Results, read_results
from forkrl.store.run_record import ACCURACY, LENGTH, Measured, digest

if TYPE_CHECKING:
    from forkrl.evaluation.folder import ScoredResponse


def read_measurement(folder: Path, measurement: MeasurementConfig) -> Measured:
    """What a finished command found."""
    if measurement.command == "eval":
        return _read_evaluation(folder, measurement.words)
    results = read_results(folder)
    figures = _FIGURES[measurement.command](results)
    return Measured(words=measurement.words, figures={name: float(value) for name, value in figures.items()})


def _read_evaluation(folder: Path, words: list[str]) -> Measured:
    from forkrl.evaluation.folder import read_evaluation  # imports torch

    answers: dict[str, list[ScoredResponse]] = {}
    for benchmark, responses in read_evaluation(folder)[1].items():
        for response in responses:
            answers.setdefault(f"{benchmark}/{response.question}", []).append(response)
    questions = [answers[name] for name in sorted(answers)]
    every = [each for given in questions for each in given]
    spending = budget_curve(
        Outcomes(np.array([[each.score] for each in every]), np.array([[float(each.tokens)] for each in every]))
    )
    return Measured(
        words=words,
        figures={"truncated": fmean(not each.finished for each in every)},
        problems=digest(sorted(answers)),
        scores={
            ACCURACY: [fmean(each.score for each in given) for given in questions],
            LENGTH: [fmean(each.tokens for each in given) for given in questions],
        },
        spending=([row["spent"] for row in spending], [row["accuracy"] for row in spending]),
    )


def _analyze_figures(results: Results) -> dict[str, float]:
    names = ("share_below_0.01", "percentile_80", "mean", "max")
    return {f"entropy: {name}": results.facts[name] for name in names}


def _drift_figures(results: Results) -> dict[str, float]:
    """Table 1 by checkpoint, figure 4 by percentile range, and some percentiles of figure 5."""
    overlap, change, percentiles = (results.tables[name] for name in ("overlap", "change", "percentiles"))
    found = {
        f"overlap with the {end}: {row['checkpoint']}": row[f"with_{end}"]
        for end, rows in (("first", overlap[1:]), ("last", overlap[:-1]))  # with itself it is 1
        for row in rows.to_dict("records")
    }
    for row in change.to_dict("records"):
        found[f"change of entropy: {row['from_percentile']:g}-{row['to_percentile']:g}%"] = row["change"]
    for row in percentiles.to_dict("records"):
        for name in ("mean", "percentile_50", "percentile_80", "percentile_95"):
            found[f"{name.replace('_', ' ')}: {row['checkpoint']}"] = row[name]
    return found


def _temperature_figures(results: Results) -> dict[str, float]:
    rows = results.tables["settings"].to_dict("records")
    return {f"accuracy: T_high {row['high']:g}, T_low {row['low']:g}": row["accuracy"] for row in rows}


_FIGURES: dict[str, Callable[[Results], dict[str, float]]] = {
    "analyze": _analyze_figures, "drift": _drift_figures, "decode-temps": _temperature_figures,
}  # fmt: skip
