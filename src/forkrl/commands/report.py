"""``forkrl report DIR``: the page of any output folder, made again from its data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from forkrl.commands.options import ReportOptions
from forkrl.errors import UserError

_WRITERS = {
    "config.toml": ("forkrl.report.run_page", "write_run_report"),
    "results.json": ("forkrl.evaluation.eval_report", "write_eval_report"),
    "comparison.json": ("forkrl.commands.compare", "write_compare_report"),
    "analysis.json": ("forkrl.commands.analyze", "rewrite_report"),
    "drift.json": ("forkrl.commands.drift", "rewrite_report"),
    "branches.json": ("forkrl.commands.branch", "rewrite_report"),
    "temperatures.json": ("forkrl.commands.decode_temps", "write_temps_report"),
}
"""Module and function by the file that tells which command wrote a folder, and that it is finished."""


def run_report(options: ReportOptions) -> int:
    """``forkrl report``."""
    print(f"report: {write_report(options.folder)}")
    return 0


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into an output folder and return its path."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run, or the folder given to --out")
    for name, (module, function) in _WRITERS.items():
        if (folder / name).is_file():
            write: Callable[[Path], Path] = getattr(importlib.import_module(module), function)
            try:
                return write(folder)
            except KeyError as error:
                raise UserError(
                    f"{folder / name}: has no {error}, so another version of ForkRL wrote it; run its command again"
                ) from error
    raise UserError(
        f"{folder}: no finished output of forkrl (none of {', '.join(_WRITERS)}); name a run, or the folder given to "
        "--out; the same command finishes an interrupted one"
    )
