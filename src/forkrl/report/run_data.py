"""Reads a run folder for its report and notes everything missing or damaged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from forkrl.config.recipe import without_removed
from forkrl.config.secret_values import reject_written_secrets
from forkrl.errors import UserError, first_line
from forkrl.report.formatting import evenly_spaced, low_entropy
from forkrl.stats.intervals import mean_with_interval
from forkrl.store.run_folder import best_step, read_config

Floats = npt.NDArray[np.float64]
_KEEP_ANSWERS = ("eval.every:", "eval.patience:", "eval.problems:", "eval.samples:")
"""Changes to an evaluation that do not affect how a response is sampled."""
_ROLLOUT_FILE = re.compile(r"(train|eval)-(\d+)\.parquet")
_PER_TOKEN = {"tokens": pa.string(), "logprobs": pa.float32(), "entropy": pa.float32(), "selected": pa.bool_()}
_SCALARS = {
    "prompt_id": pa.string(), "prompt": pa.string(), "score": pa.float32(), "reward": pa.float32(),
    "finished": pa.bool_(),
}  # fmt: skip
SCHEMA = pa.schema(
    {**_SCALARS, **{name: pa.list_(kind) for name, kind in _PER_TOKEN.items()}, "advantage": pa.float32()}
)


class Series(NamedTuple):
    """One metric at the steps where it is finite."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class RolloutSample:
    """One file of ``rollouts/``: rows of ``SCHEMA``, one per response; ``advantage`` is null in evaluations."""

    step: int
    table: pa.Table

    @property
    def entropy(self) -> Floats:
        """Finite token entropies of all responses in nats, ``[N]``."""
        values = self.table.column("entropy").combine_chunks().flatten()
        flat: Floats = values.to_numpy(zero_copy_only=False).astype(np.float64)
        return flat[np.isfinite(flat)]

    @property
    def prompt_ids(self) -> list[str]:
        return [str(value) for value in self.table.column("prompt_id").to_pylist()]

    def responses(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return list(self.table.take(list(rows)).to_pylist())


@dataclass(frozen=True, slots=True)
class RunData:
    """A run: settings, finite metrics per step, and the samples that the page shows."""

    name: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    metrics: dict[int, dict[str, float]]
    evals: tuple[RolloutSample, ...]  # first and last readable evaluation, or the only one
    train: tuple[RolloutSample, ...]
    num_train_files: int
    scores: dict[int, dict[str, list[float]]]  # of the first and last evaluation, by prompt id
    notes: list[str] = field(default_factory=list)

    def series(self, name: str) -> Series:
        pairs = [(step, row[name]) for step, row in self.metrics.items() if name in row]
        return Series(*np.array(pairs, dtype=float).reshape(-1, 2).T)

    @property
    def metric_names(self) -> set[str]:
        return {name for row in self.metrics.values() for name in row}

    @property
    def parts(self) -> list[str]:
        """Metric names of the parts of a mixed task; empty for a single task."""
        prefixes = ("reward/accuracy/", "eval/accuracy/")
        return sorted({name.split("/", 2)[2] for name in self.metric_names if name.startswith(prefixes)})

    @property
    def level_names(self) -> list[str]:
        """Metrics that contain a curriculum level."""
        return sorted(name for name in self.metric_names if f"{name}/".startswith("task/level/"))

    @property
    def num_steps(self) -> int:
        trained = (step for step, row in self.metrics.items() if any(not name.startswith("eval/") for name in row))
        return max(trained, default=0)

    @property
    def planned_steps(self) -> int | None:
        planned = self.setting("training.steps")
        return planned if isinstance(planned, int) else None

    @property
    def setting_changes(self) -> list[tuple[int, list[str]]]:
        """Changes made on resume: the step before it, and each setting as ``key: old -> new``."""
        recorded = self.provenance.get("changes")
        return [
            (each["after_step"], [str(change) for change in each["settings"]])
            for each in (recorded if isinstance(recorded, list) else [])
            if isinstance(each, dict) and type(each.get("after_step")) is int and isinstance(each.get("settings"), list)
        ]

    def sampling_changes(self, first: int, last: int) -> list[str]:
        """Settings that changed between two evaluations and affect sampling."""
        return [
            change
            for step, changes in self.setting_changes
            if first <= step <= last
            for change in changes
            if change.startswith("eval.") and not change.startswith(_KEEP_ANSWERS)
        ]

    def setting(self, key: str) -> Any:
        section, _, name = key.partition(".")
        table = self.settings.get(section)
        return table.get(name) if isinstance(table, dict) else None


def read_run(folder: Path, max_train_files: int) -> RunData:
    """Read a run folder with at most ``max_train_files`` training samples, evenly spaced, both ends included."""
    notes: list[str] = []
    settings = without_removed(read_config(folder))
    provenance = settings.pop("provenance", {})
    try:
        for name, section in settings.items():
            reject_written_secrets(name, section)
    except ValueError as error:  # an earlier version stored it, or someone edited the file
        raise UserError(f"{folder / 'config.toml'}: {error}") from error
    metrics = _read_metrics(folder / "metrics.jsonl", notes)
    paths: dict[str, list[tuple[int, Path]]] = {"eval": [], "train": []}
    for path in (folder / "rollouts").glob("*.parquet"):
        if match := _ROLLOUT_FILE.fullmatch(path.name):
            paths[match[1]].append((int(match[2]), path))
    evals, train = sorted(paths["eval"]), sorted(paths["train"])
    chosen = [_read_rollouts(*train[i], notes) for i in evenly_spaced(len(train), max_train_files)]
    first = _first_readable(evals, notes)
    last = None if first is None else _first_readable([each for each in evals[::-1] if each[0] > first.step], notes)
    run = RunData(
        name=folder.resolve().name,
        settings=settings,
        provenance=provenance if isinstance(provenance, dict) else {},
        metrics=metrics,
        evals=tuple(sample for sample in (first, last) if sample is not None),
        train=tuple(sample for sample in chosen if sample is not None),
        num_train_files=len(train),
        scores=_read_scores(folder, [step for step, row in metrics.items() if "eval/accuracy" in row], notes),
        notes=notes,
    )
    notes += _low_entropy(run) + _best_checkpoint(run, folder / "checkpoints")
    for step, changes in run.setting_changes:
        if of_evaluations := [each for each in changes if each.startswith("eval.") and "eval.patience:" not in each]:
            notes.append(f"Evaluations changed after step {step}: {'; '.join(of_evaluations)}.")
    return run


def _low_entropy(run: RunData) -> list[str]:
    floor = run.setting("log.entropy_floor")
    if not isinstance(floor, int | float):
        return []
    below = [(int(step), each) for step, each in zip(*run.series("entropy/mean"), strict=True) if each < floor]
    if not below:
        return []
    sentence = low_entropy(*below[0], floor)
    return [f"{sentence[0].upper()}{sentence[1:]}."]


def _best_checkpoint(run: RunData, checkpoints: Path) -> list[str]:
    best = best_step([{"step": step, **row} for step, row in run.metrics.items()], checkpoints)
    if run.setting("checkpoint.keep_best") is not True or best is None:
        return []
    if not best:
        return ["checkpoint.keep_best kept no checkpoint: no evaluation was better than the one before training."]
    return [
        f"checkpoint.keep_best chose step {best}, the best of {len(run.series('eval/accuracy'))} evaluations, by "
        f"these held-out problems: its accuracy of {run.metrics[best]['eval/accuracy']:.1%} on them is biased upwards, "
        f"so measure that checkpoint on others."
    ]


def _read_metrics(path: Path, notes: list[str]) -> dict[int, dict[str, float]]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        notes.append("metrics.jsonl is missing: this run has logged no step.")
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    rows: dict[int, dict[str, float]] = {}
    damaged, num_lost = [], 0
    for number, line in enumerate(lines, start=1):
        row = _parse_line(line)
        if row is None:
            damaged.append(str(number))
            continue
        step = row.pop("step")
        numbers = {name: float(value) for name, value in row.items() if type(value) in (int, float)}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        num_lost += len(numbers) - len(finite)
        rows.setdefault(step, {}).update(finite)
    if damaged:
        which = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        notes.append(f"metrics.jsonl: left out what could not be read, line {which} (cut short in writing?).")
    if num_lost:
        notes.append(f"metrics.jsonl: {num_lost} values are NaN or infinite; the figures leave them out.")
    return dict(sorted(rows.items()))


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0 else None


def _read_scores(folder: Path, steps: Sequence[int], notes: list[str]) -> dict[int, dict[str, list[float]]]:
    found = {}
    for step in sorted({*steps[:1], *steps[-1:]}):
        path = folder / "rollouts" / f"scores-{step:06d}.json"
        try:
            scores = dict(json.loads(path.read_bytes()))
            mean_with_interval(list(scores.values()))  # raises unless they are score lists of equal length
        except (OSError, ValueError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_line(error, 200)
            notes.append(f"rollouts/{path.name} cannot be read and is left out: {reason}")
            continue
        found[step] = scores
    return found


def _first_readable(paths: Sequence[tuple[int, Path]], notes: list[str]) -> RolloutSample | None:
    """The first readable sample; adds a note for each damaged one before it."""
    samples = (_read_rollouts(*each, notes) for each in paths)
    return next((sample for sample in samples if sample is not None), None)


def _read_rollouts(step: int, path: Path, notes: list[str]) -> RolloutSample | None:
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
        notes.append(f"rollouts/{path.name} cannot be read and is left out: {first_line(error, 200)}")
        return None
    whole = table.filter(_whole_rows(table))
    if gaps := table.num_rows - whole.num_rows:
        notes.append(f"rollouts/{path.name}: {gaps} rows with gaps or lists of unequal length are left out.")
    return RolloutSample(step, whole) if whole.num_rows else None


def _whole_rows(table: pa.Table) -> pa.Array:
    """Whether a row has no null except the advantage, and one log-prob, entropy and mark per token."""
    lists = [table.column(name).combine_chunks() for name in _PER_TOKEN]
    whole = [np.asarray(table.column(name).is_valid()) for name in (*_SCALARS, *_PER_TOKEN)]
    lengths = [np.asarray(each.value_lengths().fill_null(-1)) for each in lists]
    whole += [each == lengths[0] for each in lengths]
    for each in lists:
        gaps = pc.list_parent_indices(each).filter(pc.list_flatten(each).is_null())
        whole.append(~np.isin(np.arange(table.num_rows), np.asarray(gaps)))
    return pa.array(np.logical_and.reduce(whole))
