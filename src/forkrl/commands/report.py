"""``forkrl report DIR``: the page of any output folder, made again from its data."""

from __future__ import annotations

from pathlib import Path

from forkrl.commands.analyze import read_analysis, write_analysis_report
from forkrl.commands.branch import read_branching, write_branch_report
from forkrl.commands.compare import COMPARISON, write_compare_report
from forkrl.commands.decode_temps import write_temps_report
from forkrl.commands.drift import read_drift, write_drift_report
from forkrl.errors import UserError
from forkrl.evaluation.eval_report import write_eval_report
from forkrl.evaluation.folder import RESULTS
from forkrl.report import write_run_report

_WRITERS = {
    "config.toml": write_run_report,
    RESULTS: write_eval_report,
    COMPARISON: write_compare_report,
    "analysis.json": lambda folder: write_analysis_report(read_analysis(folder)),
    "drift.json": lambda folder: write_drift_report(read_drift(folder)),
    "branches.json": lambda folder: write_branch_report(read_branching(folder)),
    "temperatures.json": write_temps_report,
}
"""By the file that tells which command wrote a folder, and that it is finished."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into an output folder and return its path.

    Raises:
        UserError: the folder is missing, no finished output of a command, or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run, or the folder given to --out")
    for name, write in _WRITERS.items():
        if (folder / name).is_file():
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
