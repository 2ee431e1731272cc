"""The folder of one training run, locked for one process at a time.

config.toml          the resolved recipe, and a [provenance] table
metrics.jsonl        one JSON object per line
rollouts/            sampled responses with per-token values: train-000010.parquet, eval-000000.parquet;
                     the scores of every held-out problem: scores-000000.json
checkpoints/         step-N/, see forkrl.store.checkpoint
report.html
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import tomli_w

from forkrl.config import CHANGEABLE
from forkrl.errors import UserError, first_line
from forkrl.store.atomic import explained_write_errors, finite, fsync, temporary_beside, write_bytes, write_text

if TYPE_CHECKING:
    import pyarrow as pa

CONFIG = "config.toml"
LOCK = ".lock"
_DIGEST = "recipe_sha256"


_PER_TOKEN = ("token_ids", "tokens", "logprobs", "entropy", "selected")
_ROLLOUT_NAME = re.compile(r"(train|eval)-(\d{6,})")
_log = logging.getLogger("forkrl")


@cache
def rollout_schema() -> pa.Schema:
    """One row per response; lists have one value per response token. Log-probs and entropy are in nats."""
    import pyarrow as pa  # slow to import

    return pa.schema(
        [
            pa.field("step", pa.int32(), nullable=False),
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("prompt", pa.string(), nullable=False),
            pa.field("response", pa.string(), nullable=False),
            pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("tokens", pa.list_(pa.string()), nullable=False),
            pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
            pa.field("entropy", pa.list_(pa.float32()), nullable=False),
            pa.field("selected", pa.list_(pa.bool_()), nullable=False),
            pa.field("score", pa.float32(), nullable=False),
            pa.field("reward", pa.float32(), nullable=False),
            pa.field("advantage", pa.float32()),  # null in evaluations
            pa.field("finished", pa.bool_(), nullable=False),
        ]
    )


class RunFolder:
    """A locked run folder, from ``create`` or ``open``; a context manager."""

    def __init__(self, path: Path, lock: int, config: dict[str, Any]) -> None:
        self.path = path
        self.provenance: dict[str, Any] = config["provenance"]
        self.recipe: dict[str, Any] = {key: value for key, value in config.items() if key != "provenance"}
        self._lock = lock
        self._metrics = (path / "metrics.jsonl").open("ab", buffering=0)

    @classmethod
    def create(cls, path: Path, recipe_values: Mapping[str, Any], provenance: Mapping[str, Any]) -> Self:
        """Start a run in a new or empty folder and write its config.toml, without None values of ``provenance``."""
        refuse_occupied(path)
        with explained_write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(path, "training")
            try:
                refuse_occupied(path)  # again: another process may have created it
                for folder in ("checkpoints", "rollouts"):
                    (path / folder).mkdir(exist_ok=True)
                known = {key: value for key, value in provenance.items() if value is not None}
                _write_config(path, recipe_values, known)
                fsync(path.parent)
                return cls(path, lock, _read_unedited(path))
            except BaseException:
                os.close(lock)
                raise

    @classmethod
    def open(cls, path: Path) -> Self:
        config = _read_unedited(path)
        with explained_write_errors(path):
            lock = lock_folder(path, "training")
            try:
                return cls(path, lock, config)
            except BaseException:
                os.close(lock)
                raise

    def close(self) -> None:
        """Release the lock."""
        self._metrics.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Delete the folder of a run that ``create`` has just begun."""
        clear_folder(self.path)
        with suppress(OSError):  # a link or mount point made by the user remains, empty
            self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def change_recipe(self, recipe_values: Mapping[str, Any], step: int, changes: Sequence[str]) -> None:
        """Replace the recipe atomically and note its changes, which apply after ``step``, in the provenance."""
        history = [*self.provenance.get("changes", []), {"after_step": step, "settings": list(changes)}]
        _write_config(self.path, recipe_values, {**self.provenance, "changes": history})
        config = _read_unedited(self.path)
        self.provenance = config.pop("provenance")
        self.recipe = config

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, unbuffered. NaN and infinity become null."""
        line = json.dumps(finite(record), allow_nan=False).encode("utf-8") + b"\n"
        before = self._size()
        with explained_write_errors(self.path / "metrics.jsonl"):
            try:
                while line:  # a nearly full disk accepts only a part
                    line = line[self._metrics.write(line) :]
            except BaseException:
                self._metrics.truncate(before)
                raise

    @property
    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, synced to disk, so that a checkpoint can refer to it."""
        with explained_write_errors(self.path / "metrics.jsonl"):
            os.fsync(self._metrics.fileno())
        return self._size()

    def truncate_metrics(self, size: int) -> None:
        """Truncate metrics.jsonl to the complete lines in its first ``size`` bytes; warn if they are fewer."""
        content = (self.path / "metrics.jsonl").read_bytes()
        whole = content[:size].rfind(b"\n") + 1
        if whole != size:
            _log.warning(
                "%s: %d bytes in whole lines where the checkpoint counted %d; figures of some earlier steps are lost",
                self.path / "metrics.jsonl", whole, size,
            )  # fmt: skip
        with explained_write_errors(self.path / "metrics.jsonl"):
            self._metrics.truncate(whole)
            os.fsync(self._metrics.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def evaluation_bytes(self, start: int, step: int) -> int:
        """Length of the metrics.jsonl line at ``start`` if it is the step's evaluation, else 0."""
        line, newline, _ = (self.path / "metrics.jsonl").read_bytes()[start:].partition(b"\n")
        try:
            record = json.loads(line)
        except ValueError:  # missing or incomplete line
            return 0
        logged = newline and isinstance(record, dict) and record.get("step") == step and "eval/accuracy" in record
        return len(line + newline) if logged else 0

    def _size(self) -> int:
        return os.fstat(self._metrics.fileno()).st_size

    def write_rollouts(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write ``rollouts/NAME.parquet`` (``rollout_schema``) atomically, such as ``train-000010``."""
        if not _ROLLOUT_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name for rollouts, such as train-000010")
        for number, row in enumerate(rows):
            _check_row(number, row)
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([_encodable(row) for row in rows], schema=rollout_schema())
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        path = self._rollouts(name)
        write_bytes(path, buffer.getvalue().to_pybytes())
        return path

    def read_rollouts(self, name: str) -> list[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._rollouts(name)
        try:
            rows: list[dict[str, Any]] = pq.read_table(path, schema=rollout_schema()).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as rollouts ({first_line(error)})") from error
        return rows

    @property
    def rollout_names(self) -> list[str]:
        """Names for ``read_rollouts``: evaluations first, each kind by step."""
        found = [_ROLLOUT_NAME.fullmatch(path.stem) for path in (self.path / "rollouts").glob("*.parquet")]
        return [match[0] for match in sorted(filter(None, found), key=lambda match: (match[1], int(match[2])))]

    def _rollouts(self, name: str) -> Path:
        return self.path / "rollouts" / f"{name}.parquet"

    def write_scores(self, step: int, scores: Mapping[str, Sequence[float]]) -> None:
        """Write ``rollouts/scores-STEP.json``: scores of every held-out problem, by prompt id."""
        write_text(self.path / "rollouts" / f"scores-{step:06d}.json", json.dumps(scores, separators=(",", ":")) + "\n")

    def discard_after(self, step: int, metrics_bytes: int) -> None:
        """Delete what came after ``step`` (-1: everything), when metrics.jsonl had ``metrics_bytes`` bytes."""
        for name in self.rollout_names:
            if int(name.partition("-")[2]) > step:
                self._rollouts(name).unlink()
        for path in (self.path / "rollouts").glob("scores-*.json"):
            if int(path.stem.partition("-")[2]) > step:
                path.unlink()
        for leftover in (self.path / "rollouts").glob(temporary_beside(Path("*")).name):
            leftover.unlink()
        fsync(self.path / "rollouts")
        self.truncate_metrics(metrics_bytes)


def refuse_unusable(path: Path) -> None:
    """Refuse a path where no folder can be created or written."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; choose another --out")
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not writable" if existing.is_dir() else "is not a folder"
        raise UserError(f"{path}: cannot be created: {existing} {reason}; choose another --out")


def refuse_occupied(path: Path) -> None:
    """Refuse an unusable path, or a folder with content other than what a killed ``create`` may leave."""
    refuse_unusable(path)
    if not path.exists():
        return
    if (path / CONFIG).exists():
        resumable = read_config(path).get("checkpoint", {}).get("kind", "full") == "full"
        remedy = f"continue it with --resume {path}, or " if resumable else ""
        raise UserError(f"{path}: already holds a run; {remedy}choose another --out")
    ours = {LOCK, temporary_beside(Path(CONFIG)).name}
    empty = {folder for folder in ("checkpoints", "rollouts") if not any((path / folder).glob("*"))}
    if others := sorted(entry.name for entry in path.iterdir() if entry.name not in ours | empty):
        raise UserError(
            f"{path}: is not empty (it holds {others[0]}); a run needs its own folder, choose another --out"
        )


def clear_folder(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def lock_folder(path: Path, activity: str) -> int:
    """A descriptor that holds the folder's exclusive lock until it is closed or the process ends."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise UserError(
            f"{path}: process {holder or 'unknown'} is {activity} here; wait for it, stop it, or choose another --out"
        ) from None
    os.truncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def read_config(path: Path) -> dict[str, Any]:
    """The contents of config.toml, with ``provenance``; edits are not detected."""
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; name the folder given to forkrl train --out")
    try:
        return tomllib.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not a run folder, it has no {CONFIG}; name the folder given to forkrl train --out"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / CONFIG}: cannot be read ({error}); restore it, or use another run") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without locking the folder: a run may be writing the last one."""
    records: list[dict[str, Any]] = []
    *lines, _ = (path / "metrics.jsonl").read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path / 'metrics.jsonl'}: line {number} is not a JSON object; remove that line")
        records.append(record)
    return records


def best_step(rows: Sequence[Mapping[str, Any]], checkpoints: Path, *others: int) -> int | None:
    """The first step with the highest held-out accuracy, of those with a checkpoint, 0 and ``others``."""
    accuracies = {
        row["step"]: row["eval/accuracy"]
        for row in rows
        if "eval/accuracy" in row and (row["step"] in (0, *others) or (checkpoints / f"step-{row['step']}").is_dir())
    }
    return max(accuracies, key=accuracies.__getitem__, default=None)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe of a run as plain values, without locking the folder."""
    return {name: value for name, value in _read_unedited(path).items() if name != "provenance"}


def _write_config(path: Path, recipe_values: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    signed = {**provenance, _DIGEST: _digest(recipe_values)}
    write_text(path / CONFIG, tomli_w.dumps({**recipe_values, "provenance": signed}))


def _digest(recipe_values: Mapping[str, Any]) -> str:
    """Detects edits of config.toml, which would no longer describe the finished steps."""
    return hashlib.sha256(json.dumps(recipe_values, sort_keys=True).encode()).hexdigest()


def _read_unedited(path: Path) -> dict[str, Any]:
    config = read_config(path)
    provenance = config.get("provenance", {})
    if provenance.get(_DIGEST) != _digest({name: value for name, value in config.items() if name != "provenance"}):
        raise UserError(
            f"{path / CONFIG}: was edited after the run began; undo the edit. A resumed run may change only "
            f"{', '.join(CHANGEABLE)}, each given on the command line: forkrl train --resume {path} training.steps=60"
        )
    return config


def _check_row(number: int, row: Mapping[str, Any]) -> None:
    """Arrow silently fills missing columns with null and drops unknown ones."""
    if difference := row.keys() ^ set(rollout_schema().names):
        raise ValueError(f"row {number}: missing or unknown columns: {', '.join(sorted(difference))}")
    if empty := [name for name in rollout_schema().names if row[name] is None and name != "advantage"]:
        raise ValueError(f"row {number}: no value for {', '.join(empty)}")
    lengths = {name: len(row[name]) for name in _PER_TOKEN}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"row {number}: one value per token is wanted, the lists have lengths {lengths}")


def _encodable(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: encodable_text(row[name]) for name in ("prompt_id", "prompt", "response")}
    return {**row, **texts, "tokens": [encodable_text(token) for token in row["tokens"]]}


def encodable_text(text: str) -> str:
    """Text with lone surrogates, which UTF-8 cannot encode, escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
