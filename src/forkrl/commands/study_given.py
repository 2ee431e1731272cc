"""A study of runs that exist: ForkRL's run folders, or metrics that other trainers exported."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forkrl.config.recipe import flatten, parse_recipe
from forkrl.config.study import SAME_EVALUATION, StudyConfig, early_ends
from forkrl.errors import UserError
from forkrl.store.run_folder import CONFIG
from forkrl.store.run_record import CURVES, RunRecord, make_record

_STEP = ("step", "_step", "global_step", "Step")
_ACCURACY = "eval/accuracy"


def study_of_runs(words: Sequence[str], metric: str, baseline: str | None) -> tuple[StudyConfig, list[RunRecord]]:
    """The study and records of runs given as ``PATH`` or ``ARM=PATH``.

    A run folder without ARM belongs to the arm of its settings. Other metrics have no scores of single problems, so
    their intervals cover seeds only; runs of an arm are numbered in the order given.

    Raises:
        UserError: a path that holds no metrics, an arm with one run, or a baseline that is no arm.
    """
    given = [_split(word) for word in words]
    folders = {path: make_record("", path, "") for _, path in given if (path / CONFIG).is_file()}
    for path, record in folders.items():
        for key, value in early_ends(record.settings).items():
            raise UserError(f"--runs {path}: with {key} = {value:g} runs differ in length; leave it out, or use 0")
    names = _arms_by_settings(folders)
    records: list[RunRecord] = []
    for arm, path in given:
        if path in folders:
            records.append(folders[path].model_copy(update={"arm": arm or names[path]}))
        elif not arm:
            raise UserError(f"--runs {path}: is not a run folder; name its arm: --runs ARM={path}")
        else:
            number = sum(record.arm == arm for record in records)
            records.append(record_of_metrics(arm, number, _read_metrics(path), metric, path))
    return _study(records, baseline), records


def record_of_metrics(
    arm: str, number: int, rows: Iterable[Mapping[str, Any]], metric: str, path: Path
) -> RunRecord:  # fmt: skip
    """A record of exported metrics, whose held-out accuracy is called ``metric``."""
    rows = list(rows)
    columns = {name for row in rows for name in row if name == metric or name.endswith(f" - {metric}")}
    if len(columns) > 1:  # W&B's charts: "RUN - METRIC"
        raise UserError(
            f"--runs {path}: has several columns of {metric} ({', '.join(sorted(columns))}); export one run"
        )
    curves: dict[str, tuple[list[float], list[float | None]]] = {}
    for row in sorted(rows, key=_step_of):
        step = _step_of(row)
        for name, value in row.items():
            kept = _ACCURACY if name in columns else "" if name == _ACCURACY else name
            if step >= 0 and kept in CURVES and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(kept, ([], []))
                steps.append(float(step))
                values.append(float(value))
    if len(curves.get(_ACCURACY, ([],))[0]) < 2:
        raise UserError(
            f"--runs {path}: has fewer than two values of {metric} with a step; name the metric of held-out accuracy "
            f"with --metric"
        )
    scores = {int(step): [value or 0.0] for step, value in zip(*curves[_ACCURACY], strict=True)}
    if (worst := max(value for of in scores.values() for value in of)) > 1:
        raise UserError(f"--runs {path}: {metric} reaches {worst:g}; accuracy must be a share, at most 1")
    return RunRecord(
        arm=arm, seed=number, settings={}, weights="", provenance={}, machine="", date="", problems="", curves=curves,
        scores=scores,
    )  # fmt: skip


def _step_of(row: Mapping[str, Any]) -> float:
    """-1 if the row has no step."""
    return next((row[name] for name in _STEP if isinstance(row.get(name), int | float)), -1.0)


def _split(word: str) -> tuple[str, Path]:
    """Arm ("" if not given) and path."""
    arm, equals, path = word.partition("=")
    return ("", Path(word)) if not equals or Path(word).exists() else (arm, Path(path))


def _arms_by_settings(folders: Mapping[Path, RunRecord]) -> dict[Path, str]:
    """Names made of the settings in which the runs differ."""
    settings = {path: flatten(record.settings) for path, record in folders.items()}
    differing = _differing([record.settings for record in folders.values()])
    if unlike := [key for key in differing if key.startswith(SAME_EVALUATION)]:
        raise UserError(
            f"--runs: the runs differ in {unlike[0]}; only runs with the same model, data, evaluation and response "
            f"limit can be compared"
        )
    named = {path: " ".join(f"{key}={values.get(key)}" for key in differing) for path, values in settings.items()}
    return {path: re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "runs" for path, name in named.items()}


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Keys of the settings that are not the same everywhere."""
    every = [flatten(values) for values in settings]
    keys = dict.fromkeys(key for values in every for key in values)
    return [key for key in keys if len({repr(values.get(key)) for values in every}) > 1]


def _study(records: Sequence[RunRecord], baseline: str | None) -> StudyConfig:
    arms: dict[str, list[int]] = {}
    first: dict[str, RunRecord] = {}
    for record in records:
        like = first.setdefault(record.arm, record)
        if record.settings != like.settings:
            key = _differing([like.settings, record.settings])[0]
            raise UserError(
                f"--runs: arm {record.arm}: seeds {like.seed} and {record.seed} differ in {key}; give them as two arms"
            )
        if record.steps != like.steps:
            raise UserError(
                f"--runs: arm {record.arm}: seed {like.seed} was evaluated until step {like.steps}, seed "
                f"{record.seed} until {record.steps}; leave out runs that ended early"
            )
        seeds = arms.setdefault(record.arm, [])
        if record.seed in seeds:
            raise UserError(f"--runs: two runs of arm {record.arm} have seed {record.seed}; leave one out")
        seeds.append(record.seed)
    values = {
        "title": f"{len(records)} runs in {len(arms)} arms",
        "recipe": "",
        "baseline": baseline or next(iter(arms)),
        "seeds": sorted({seed for seeds in arms.values() for seed in seeds}),
        "arms": {arm: {"seeds": seeds} for arm, seeds in arms.items()},
    }
    return parse_recipe(StudyConfig, values, "--runs")


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL or CSV file, or of TensorBoard's event files."""
    if not path.exists():
        raise UserError(f"--runs {path}: no such file or folder")
    if path.is_dir() or "tfevents" in path.name:
        return _read_tensorboard(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                return [{key: _number(value) for key, value in row.items() if key} for row in csv.DictReader(file)]
            return [row for line in file if line.strip() and isinstance(row := json.loads(line), dict)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--runs {path}: is neither JSON lines nor CSV ({error})") from error


def _read_tensorboard(path: Path) -> list[dict[str, Any]]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise UserError(f"--runs {path}: reading event files needs tensorboard (pip install tensorboard)") from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return [{"step": event.step, tag: event.value} for tag in tags for event in events.Scalars(tag)]


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
