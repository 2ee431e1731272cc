"""What a run folder holds, read for the report. Whatever is missing or damaged becomes a note, never an invention."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from forkrl.config.secret_values import without_secrets_in_command, without_written_secrets
from forkrl.errors import UserError
from forkrl.report.formatting import evenly_spaced
from forkrl.stats.intervals import mean_with_interval

Floats = npt.NDArray[np.float64]
_KEEP_ANSWERS = ("eval.every:", "eval.problems:", "eval.samples:")
"""Of an evaluation: these change how many answers there are, not how each is drawn."""
ROLLOUT_FILE = re.compile(r"(train|eval)-(\d+)\.parquet")
PER_TOKEN = {
    "tokens": pa.list_(pa.string()),
    "logprobs": pa.list_(pa.float32()),
    "entropy": pa.list_(pa.float32()),
    "selected": pa.list_(pa.bool_()),
}
SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        **PER_TOKEN,
        "score": pa.float32(),
        "reward": pa.float32(),
        "advantage": pa.float32(),
        "finished": pa.bool_(),
    }
)


class Series(NamedTuple):
    """One metric over the steps at which it has a finite value."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response, a value per token in each list. ``advantage`` is None in evaluations."""

    prompt_id: str
    prompt: str
    tokens: list[str]
    logprobs: list[float]
    entropy: list[float]
    selected: list[bool]
    score: float
    reward: float
    advantage: float | None
    finished: bool


@dataclass(frozen=True, slots=True)
class RolloutSample:
    """One file of ``rollouts/``."""

    kind: Literal["train", "eval"]
    step: int
    table: pa.Table

    @property
    def entropy(self) -> Floats:
        """Entropy in nats of every token of every response, ``[N]``; values that are not finite are left out."""
        values = self.table.column("entropy").combine_chunks().flatten()
        flat: Floats = values.to_numpy(zero_copy_only=False).astype(np.float64)
        return flat[np.isfinite(flat)]

    @property
    def prompt_ids(self) -> list[str]:
        return [str(value) for value in self.table.column("prompt_id").to_pylist()]

    def responses(self, rows: Sequence[int]) -> list[Response]:
        return [Response(**row) for row in self.table.take(list(rows)).to_pylist()]


@dataclass(frozen=True, slots=True)
class RunData:
    """A run: its settings, a dict of finite metrics per step, and the samples that the page shows."""

    name: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    metrics: dict[int, dict[str, float]]
    evals: tuple[RolloutSample, ...]  # first and last readable evaluation; one if they are the same
    train: tuple[RolloutSample, ...]
    num_train_files: int
    scores: dict[int, dict[str, list[float]]]  # of the first and last evaluation, by prompt id, where recorded
    notes: list[str] = field(default_factory=list)

    def series(self, name: str) -> Series:
        pairs = [(step, row[name]) for step, row in self.metrics.items() if name in row]
        return Series(np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs], dtype=float))

    @property
    def parts(self) -> list[str]:
        """The parts of a mixed task, by the names of the metrics; none in a task of one part."""
        names = {name for row in self.metrics.values() for name in row}
        prefixes = ("reward/accuracy/", "eval/accuracy/")
        return sorted({name.removeprefix(prefix) for prefix in prefixes for name in names if name.startswith(prefix)})

    @property
    def level_names(self) -> list[str]:
        """The metrics that hold a curriculum's level."""
        names = {name for row in self.metrics.values() for name in row}
        return sorted(name for name in names if name == "task/level" or name.startswith("task/level/"))

    @property
    def num_steps(self) -> int:
        """The last step that trained, as the metrics tell."""
        return max(
            (step for step, row in self.metrics.items() if any(not k.startswith("eval/") for k in row)), default=0
        )

    @property
    def planned_steps(self) -> int | None:
        planned = self.setting("training.steps")
        return planned if isinstance(planned, int) else None

    @property
    def setting_changes(self) -> list[tuple[int, list[str]]]:
        """What resuming changed: the last step done before, and each setting as ``key: old -> new``."""
        recorded = self.provenance.get("changes")
        return [
            (each["after_step"], [str(change) for change in each["settings"]])
            for each in (recorded if isinstance(recorded, list) else [])
            if isinstance(each, dict) and type(each.get("after_step")) is int and isinstance(each.get("settings"), list)
        ]

    def sampling_changes(self, first: int, last: int) -> list[str]:
        """Settings that changed between two evaluations and make answers to the same problem differ."""
        return [
            change
            for step, changes in self.setting_changes
            if first <= step <= last
            for change in changes
            if change.startswith("eval.") and not change.startswith(_KEEP_ANSWERS)
        ]

    def setting(self, key: str) -> Any:
        """Value of ``section.name``, or None."""
        section, _, name = key.partition(".")
        table = self.settings.get(section)
        return table.get(name) if isinstance(table, dict) else None


def read_run(folder: Path, max_train_files: int) -> RunData:
    """Read the run folder; of the training samples, at most ``max_train_files``, evenly spaced, both ends included.

    Raises:
        UserError: the folder is missing, or is no run (it has no config.toml that can be read).
    """
    notes: list[str] = []
    settings = _read_config(folder)
    provenance = settings.pop("provenance", {})
    metrics = _read_metrics(folder / "metrics.jsonl", notes)
    eval_paths, train_paths = _rollout_paths(folder, "eval"), _rollout_paths(folder, "train")
    chosen = [train_paths[i] for i in evenly_spaced(len(train_paths), max_train_files)]
    run = RunData(
        name=folder.resolve().name,
        settings=settings,
        provenance=provenance if isinstance(provenance, dict) else {},
        metrics=metrics,
        evals=_first_and_last(eval_paths, notes),
        train=tuple(sample for step in chosen if (sample := _read_rollouts("train", *step, notes)) is not None),
        num_train_files=len(train_paths),
        scores=_read_scores(folder, [step for step, row in metrics.items() if "eval/accuracy" in row], notes),
        notes=notes,
    )
    for step, changes in run.setting_changes:
        if of_evaluations := [change for change in changes if change.startswith("eval.")]:
            notes.append(f"Evaluations changed after step {step}: {'; '.join(of_evaluations)}.")
    return run


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; name the folder of a run, which holds config.toml and metrics.jsonl"
        )
    try:
        settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a run folder, it has no config.toml; name the folder given to forkrl train --out"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.toml'}: cannot be read ({error}); restore it, or report on another run"
        ) from None
    shown: dict[str, Any] = without_written_secrets("", settings)  # an older version stored them
    provenance = shown.get("provenance")
    if isinstance(provenance, dict) and isinstance(provenance.get("command"), str):
        provenance["command"] = without_secrets_in_command(provenance["command"])
    return shown


def _read_metrics(path: Path, notes: list[str]) -> dict[int, dict[str, float]]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        notes.append("metrics.jsonl is missing: this run has logged no step.")
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    rows: dict[int, dict[str, float]] = {}
    damaged, not_finite = [], 0
    for number, line in enumerate(lines, start=1):
        row = _parse_line(line)
        if row is None:
            damaged.append(str(number))
            continue
        step = row.pop("step")
        finite = {name: float(value) for name, value in row.items() if _is_number(value) and math.isfinite(value)}
        not_finite += sum(1 for value in row.values() if _is_number(value) and not math.isfinite(value))
        rows.setdefault(step, {}).update(finite)
    if damaged:
        notes.append(
            f"metrics.jsonl: left out what could not be read, line {_abridged(damaged)} (cut short in writing?)."
        )
    if not_finite:
        notes.append(f"metrics.jsonl: {not_finite} values are NaN or infinite; the figures leave them out.")
    return dict(sorted(rows.items()))


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The line as a dict with an integer step, or None if it is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _abridged(items: Sequence[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _rollout_paths(folder: Path, kind: str) -> list[tuple[int, Path]]:
    found: list[tuple[int, Path]] = []
    directory = folder / "rollouts"
    for path in directory.iterdir() if directory.is_dir() else ():
        match = ROLLOUT_FILE.fullmatch(path.name)
        if match and match[1] == kind:
            found.append((int(match[2]), path))
    return sorted(found)


def _read_scores(folder: Path, steps: Sequence[int], notes: list[str]) -> dict[int, dict[str, list[float]]]:
    found = {}
    for step in sorted({*steps[:1], *steps[-1:]}):
        path = folder / "rollouts" / f"scores-{step:06d}.json"
        try:
            scores = dict(json.loads(path.read_bytes()))
            mean_with_interval(list(scores.values()))  # raises where they are no equally long lists of scores
        except FileNotFoundError:  # written by an older version
            continue
        except (OSError, ValueError, TypeError) as error:
            notes.append(f"rollouts/{path.name} cannot be read and is left out: {str(error)[:200]}")
            continue
        found[step] = scores
    return found


def _first_and_last(paths: list[tuple[int, Path]], notes: list[str]) -> tuple[RolloutSample, ...]:
    first = _first_readable(paths, notes)
    if first is None:
        return ()
    last = _first_readable([item for item in reversed(paths) if item[0] > first.step], notes)
    return (first,) if last is None else (first, last)


def _first_readable(paths: Iterable[tuple[int, Path]], notes: list[str]) -> RolloutSample | None:
    samples = (_read_rollouts("eval", step, path, notes) for step, path in paths)
    return next((sample for sample in samples if sample is not None), None)


def _read_rollouts(kind: Literal["train", "eval"], step: int, path: Path, notes: list[str]) -> RolloutSample | None:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=SCHEMA.names)
        missing = [name for name in SCHEMA.names if name not in table.column_names]
        if missing:
            notes.append(f"rollouts/{path.name} is left out: it has no column {', '.join(missing)}.")
            return None
        table = table.select(SCHEMA.names).cast(SCHEMA)
        table.validate(full=True)  # finds text that is not UTF-8
    except (pa.ArrowException, OSError) as error:
        notes.append(f"rollouts/{path.name} cannot be read and is left out: {str(error).partition(chr(10))[0][:200]}")
        return None
    whole = _whole_rows(table)
    if len(whole) < table.num_rows:
        gaps = table.num_rows - len(whole)
        notes.append(f"rollouts/{path.name}: {gaps} rows with gaps or lists of unequal length are left out.")
        table = table.take(whole)
    return RolloutSample(kind, step, table) if table.num_rows else None


def _whole_rows(table: pa.Table) -> list[int]:
    """Rows in which nothing is null but the advantage, with one log-prob, entropy and mark for each token."""
    lists = [table.column(name).combine_chunks() for name in PER_TOKEN]
    scalars = [table.column(name).to_pylist() for name in SCHEMA.names if name not in PER_TOKEN and name != "advantage"]
    whole = [
        row
        for row, (tokens, *others) in enumerate(
            zip(*(array.value_lengths().to_pylist() for array in lists), strict=True)
        )
        if tokens is not None
        and all(other == tokens for other in others)
        and all(column[row] is not None for column in scalars)
    ]
    if any(array.flatten().null_count for array in lists):  # rare, so only then is every value looked at
        whole = [row for row in whole if all(None not in array[row].as_py() for array in lists)]
    return whole
