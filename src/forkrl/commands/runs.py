"""``forkrl runs``: the run folders below a folder, with status, step and accuracy."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forkrl.commands.other_options import RunsOptions
from forkrl.errors import UserError, write_line
from forkrl.method.schedule import early_end
from forkrl.report.terminal import aligned
from forkrl.store.run_folder import CONFIG, LOCK, read_config, read_metrics


@dataclass(frozen=True)
class ListedRun:
    """``status``: "running", "finished", "stopped", or "unreadable" files. Accuracies are held out."""

    path: str
    status: str
    step: int
    steps: int | None
    rule: str
    seed: int | None
    first_accuracy: float | None
    last_accuracy: float | None
    changed: float
    """Seconds since 1970 of the last line of metrics."""


def run_runs(options: RunsOptions) -> int:
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: no such folder; name one that holds run folders")
    runs = sorted(find_runs(options.folder), key=lambda run: run.changed)
    if options.json:
        write_line(sys.stdout, json.dumps([asdict(run) for run in runs], indent=2))
        return 0
    if not runs:
        raise UserError(f"{options.folder}: holds no run folder; forkrl train --out makes one")
    rows = [["run", "status", "step", "rule", "seed", "held-out accuracy"]]
    for run in runs:
        accuracies = [f"{value:.1%}" for value in (run.first_accuracy, run.last_accuracy) if value is not None]
        steps = f"{run.step}/{run.steps if run.steps is not None else '?'}"
        seed = "" if run.seed is None else str(run.seed)
        rows.append([run.path, run.status, steps, run.rule, seed, " → ".join(dict.fromkeys(accuracies))])
    write_line(sys.stdout, "\n".join(aligned(rows)))
    return 0


def find_runs(folder: Path) -> Iterator[ListedRun]:
    """Every run folder in ``folder``, at any depth; what is inside a run is not searched."""
    if (folder / CONFIG).is_file():
        yield describe_run(folder)
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            yield from find_runs(entry)


def describe_run(folder: Path) -> ListedRun:
    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    problem = ""
    try:
        config = read_config(folder)
        rows = read_metrics(folder)
    except UserError:
        problem = "unreadable"
    except FileNotFoundError:  # killed before its first line
        pass
    accuracies = [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None]
    step, steps = int(rows[-1]["step"]) if rows else 0, _setting(config, "training", "steps")
    patience, epochs = _setting(config, "eval", "patience") or 0, _setting(config, "training", "epochs") or 0
    over = steps is not None and (step >= steps or early_end(rows, patience=patience, epochs=epochs) is not None)
    finished = over and bool(rows) and "eval/accuracy" in rows[-1]
    status = problem or ("finished" if finished else "running" if _is_locked(folder) else "stopped")
    metrics = folder / "metrics.jsonl"
    return ListedRun(
        path=str(folder),
        status=status,
        step=step,
        steps=steps,
        rule=str(_setting(config, "selection", "rule") or ""),
        seed=config.get("seed"),
        first_accuracy=accuracies[0] if accuracies else None,
        last_accuracy=accuracies[-1] if accuracies else None,
        changed=metrics.stat().st_mtime if metrics.is_file() else 0.0,
    )


def _setting(config: dict[str, Any], section: str, name: str) -> Any:
    table = config.get(section)
    return table.get(name) if isinstance(table, dict) else None


def _is_locked(folder: Path) -> bool:
    """Whether the process that locked the folder last is alive; taking the lock to find out could disturb a start."""
    try:
        pid = int((folder / LOCK).read_text(encoding="ascii"))
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
