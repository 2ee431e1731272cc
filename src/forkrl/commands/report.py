"""``forkrl report DIR``: the page of any output folder, made again from its data."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from forkrl.commands.options import ReportOptions
from forkrl.errors import UserError
from forkrl.report.page import write_page
from forkrl.store.results import REPORT, RESULTS, read_json, read_results
from forkrl.store.run_folder import CONFIG

_PAGES = {
    "analyze": "forkrl.commands.analyze:make_page",
    "branch": "forkrl.commands.branch:make_page",
    "decode-temps": "forkrl.commands.decode_temps:make_page",
    "drift": "forkrl.commands.drift:make_page",
}
"""The function that makes a page of ``Results``, by the command in their schema."""
_WRITERS = {
    "run": "forkrl.report.run_page:write_run_report",
    "eval": "forkrl.evaluation.eval_report:write_eval_report",
    "compare": "forkrl.commands.compare:write_compare_report",
}
"""The function that writes the page of a folder which has no ``Results``."""


def run_report(options: ReportOptions) -> int:
    """``forkrl report``."""
    print(f"report: {write_report(options.folder)}")
    return 0


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into an output folder and return its path."""
    command, source = _command_of(folder)
    try:
        if command in _WRITERS:
            path: Path = _load(_WRITERS[command])(folder)
            return path
        return write_page(folder / REPORT, _load(_PAGES[command])(read_results(folder)))
    except KeyError as error:
        raise UserError(
            f"{source}: has no {error}: another version of ForkRL wrote it; run its command again"
        ) from error


def _command_of(folder: Path) -> tuple[str, Path]:
    """Which command wrote a folder, and the file that says so and that it is finished."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run, or the folder given to --out")
    if (folder / CONFIG).is_file():
        return "run", folder / CONFIG
    if (folder / "comparison.json").is_file():
        return "compare", folder / "comparison.json"
    if not (path := folder / RESULTS).is_file():
        raise UserError(
            f"{folder}: no finished output of forkrl (neither {CONFIG} nor {RESULTS}); name a run, or the folder given "
            "to --out; the same command finishes an interrupted one"
        )
    schema = str(read_json(path).get("schema"))
    command = schema.removeprefix("forkrl-").partition("/")[0]
    if command not in _PAGES | _WRITERS:
        raise UserError(f"{path}: has the unknown schema {schema!r}; run the command that wrote it again")
    return command, path


def _load(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
