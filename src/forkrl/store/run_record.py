"""The record of a finished run: curves, scores of every held-out problem, and where they come from, in 20 kB of JSON.

A study keeps records in its folder, under version control, where run folders are too large to keep.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from forkrl.config import TrainConfig
from forkrl.config.recipe import parse_recipe, without_removed
from forkrl.config.sections import FROM_LIST, Section
from forkrl.config.study import early_ends, learning_settings
from forkrl.errors import UserError, first_line
from forkrl.parallel.threads import processor
from forkrl.store.atomic import write_text
from forkrl.store.results import read_json
from forkrl.store.run_folder import read_config, read_metrics

SCHEMA = "forkrl-run/1"
MOST_BYTES = 20_000
TOKENS, SECONDS = "total/tokens", "total/seconds"
"""Sampled tokens, and seconds of training steps, up to and including a step."""
CURVES = (
    "eval/accuracy", "eval/entropy", "eval/length", "eval/truncated_fraction", "reward/accuracy", "response/length",
    "response/truncated_fraction", "entropy/mean", "entropy/selected_mean", "selection/kept_fraction", "grad/norm",
)  # fmt: skip
ACCURACY, LENGTH = "accuracy", "tokens a response"
"""Figures that an evaluation has for every question."""
_PROVENANCE = ("forkrl", "torch", "transformers", "commit", "data_fingerprint", "workers", "threads", "device")
_POINTS = 60
"""Most points kept of each training curve; the same ones in all runs of an arm."""


class Measured(Section):
    """What a measurement after training found.

    ``words``: the command and its arguments. ``figures``: numbers of the whole. Of an evaluation, ``scores``: by figure
    the mean per question, sorted by name; ``problems`` identifies the questions; ``spending``: mean tokens a response
    within rising budgets, and accuracy there.
    """

    words: list[str]
    figures: dict[str, float | None] = Field(default_factory=dict)
    problems: str = ""
    scores: dict[str, list[float]] = Field(default_factory=dict)
    spending: Annotated[tuple[list[float], list[float]], FROM_LIST] = ([], [])

    @property
    def names(self) -> list[str]:
        """Of all figures."""
        return [*self.scores, *(name for name, value in self.figures.items() if value is not None)]


class RunRecord(Section):
    """A finished run.

    ``weights``: fingerprint of the base model. ``curves``: by metric, steps and values (None: not finite). ``problems``
    are in the order of each list in ``scores``, which is by step.
    """

    arm: str
    seed: int
    settings: dict[str, Any]
    weights: str
    provenance: dict[str, Any]
    machine: str
    date: str
    curves: dict[str, tuple[list[float], list[float | None]]]
    problems: str
    scores: dict[int, list[float]]
    measured: dict[str, Measured] = Field(default_factory=dict)

    @property
    def steps(self) -> int:
        return max(self.scores)

    @property
    def seconds(self) -> float:
        """Of all training steps; NaN if not known."""
        return _end(self, SECONDS)

    @property
    def tokens(self) -> float:
        """Sampled in training; NaN if not known."""
        return _end(self, TOKENS)


def make_record(
    arm: str, folder: Path, weights: str, measured: Mapping[str, Measured] | None = None, machine: str = ""
) -> RunRecord:
    """The record of a finished run in ``folder``.

    Raises:
        UserError: the run is not finished, was not evaluated, or no scores were kept.
    """
    stored = read_config(folder)
    provenance = stored.pop("provenance", {})
    config = parse_recipe(TrainConfig, without_removed(stored), str(folder))
    rows = read_metrics(folder)
    scores = _read_scores(folder)
    last = config.training.steps
    if not scores or last not in scores:
        further = "".join(f" {key}=0" for key in early_ends(stored))
        raise UserError(
            f"{folder}: has no evaluation of step {last}, its last; finish it with --resume {folder}{further}"
        )
    problems = next(iter(scores.values())).keys()
    return RunRecord(
        arm=arm,
        seed=config.seed,
        settings=learning_settings(config),
        weights=weights,
        provenance={key: provenance[key] for key in _PROVENANCE if key in provenance},
        machine=machine,
        date=datetime.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime, UTC).isoformat(timespec="seconds"),
        curves=_curves(rows),
        problems=digest(problems),
        scores={step: [_mean(of[problem]) for problem in problems] for step, of in scores.items()},
        measured=dict(measured or {}),
    )


def write_record(path: Path, record: RunRecord) -> None:
    """Write the record atomically; of too many scores to fit only those of the first and last evaluation."""
    record = record.model_copy(update={"curves": {name: _thin(*curve) for name, curve in record.curves.items()}})
    text = _dump(record)
    if len(text) > MOST_BYTES:
        ends = {min(record.scores), max(record.scores)}
        text = _dump(record.model_copy(update={"scores": {step: record.scores[step] for step in sorted(ends)}}))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def read_record(path: Path) -> RunRecord:
    """A record; UserError if it is damaged or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        schema = values.pop("schema")
        values["scores"] = {int(step): scores for step, scores in values["scores"].items()}
        values["curves"] = {name: tuple(curve) for name, curve in values["curves"].items()}
        record = parse_recipe(RunRecord, values, schema)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, UserError) as error:
        reason = first_line(error, 200)
        raise UserError(
            f"{path}: cannot be read as a run record ({reason}); remove it to train the run again"
        ) from error
    if schema != SCHEMA:
        raise UserError(f"{path}: is a run record of another version ({schema}); remove it to train the run again")
    return record


def describe_machine() -> str:
    """Processor and number of cores."""
    return f"{processor()}, {os.cpu_count()} cores"


def _end(record: RunRecord, name: str) -> float:
    last = record.curves[name][1][-1] if name in record.curves else None
    return math.nan if last is None else last


def _dump(record: RunRecord) -> str:
    """One line per curve and list of scores, so that a difference of two versions can be read."""
    values = {"schema": SCHEMA, **record.model_dump(mode="json")}
    lines: list[str] = []
    for key, value in values.items():
        value = value if key == "settings" else _rounded(value)
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {json.dumps(str(k))}: {_compact(v)}" for k, v in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {_compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _rounded(value: Any) -> Any:
    """Floats with five significant digits, and without a fraction if they are whole."""
    if isinstance(value, float):
        short = float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
        return int(short) if short == int(short) else short
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float | None]]]:
    tokens = seconds = 0.0
    found: dict[str, tuple[list[float], list[float | None]]] = {}
    for row in rows:
        tokens += row.get("rollout/tokens") or 0.0
        seconds += row.get("time/step_s") or 0.0
        totals = {TOKENS: tokens, SECONDS: seconds} if "rollout/tokens" in row or not row["step"] else {}
        for name, value in {**{name: row[name] for name in CURVES if name in row}, **totals}.items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(float(row["step"]))
            values.append(value)
    return found


def _thin(steps: list[float], values: list[float | None]) -> tuple[list[float], list[float | None]]:
    """At most ``_POINTS`` evenly spaced points, both ends included."""
    count = len(steps)
    if count <= _POINTS:
        return steps, values
    kept = sorted({round(place * (count - 1) / (_POINTS - 1)) for place in range(_POINTS)})
    return [steps[each] for each in kept], [values[each] for each in kept]


def _read_scores(folder: Path) -> dict[int, dict[str, list[float]]]:
    files = sorted((folder / "rollouts").glob("scores-*.json"))
    return {int(path.stem.partition("-")[2]): read_json(path) for path in files}


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def digest(names: Iterable[str]) -> str:
    """Short hash of the names of problems, in their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
