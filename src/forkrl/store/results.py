"""Results of a command on disk: ``results.json`` and ``tables/*.csv``, in one format for all commands."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forkrl.errors import UserError
from forkrl.store.atomic import write_json, write_text

RESULTS, TABLES, REPORT = "results.json", "tables", "report.html"
_VERSIONED = ("forkrl", "torch", "transformers", "math-verify", "datasets", "vllm")
_FORMULA_STARTS = ("=", "+", "-", "@")
_READ_AS_SOMETHING_ELSE = {"true", "false", "na", "n/a", "<na>", "#n/a", "#na", "null", "none"}


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """Results of a command, as stored in its folder.

    ``schema`` is ``forkrl-COMMAND/VERSION``; ``notes`` say what is missing, a sentence each. ``facts`` are JSON values,
    None if not finite. ``tables`` are by file name; an estimate has the columns ``name``, ``name_low``, ``name_high``.
    """

    folder: Path
    schema: str
    command: str
    settings: dict[str, Any]
    headline: str
    notes: list[str]
    facts: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    versions: dict[str, str]


def write_results(
    folder: Path,
    schema: str,
    *,
    settings: Mapping[str, Any],
    headline: str,
    facts: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame] | None = None,
    notes: Sequence[str] = (),
) -> Results:
    """Write ``tables/*.csv``, then ``results.json``; return them as read back."""
    frames = dict(tables or {})
    if frames:
        (folder / TABLES).mkdir(exist_ok=True)
    for name, frame in frames.items():
        write_text(folder / TABLES / f"{name}.csv", csv_text(frame))
    record = {
        "schema": schema,
        "command": command_line(),
        "settings": settings,
        "headline": headline,
        "notes": list(notes),
        "facts": facts,
        "tables": list(frames),
        "versions": {name: found for name in _VERSIONED if (found := _version(name))},
    }
    write_json(folder / RESULTS, record)
    return read_results(folder)


def read_results(folder: Path) -> Results:
    """Results that a command wrote; UserError if a file is missing, damaged or of another version."""
    path = folder / RESULTS
    record = read_json(path)
    try:
        tables = {name: read_table(folder / TABLES / f"{name}.csv") for name in record["tables"]}
        return Results(folder, **{**record, "tables": tables})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: another version of ForkRL wrote it ({error}); run its command again") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the command that wrote it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object; run the command that wrote it again")
    return found


def csv_text(table: pd.DataFrame) -> str:
    """The table as CSV without its index; text is encoded by ``csv_cell``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(csv_cell, map(str, table.columns)))
    writer.writerows(map(csv_cell, row) for row in table.itertuples(index=False, name=None))
    return buffer.getvalue()


def csv_cell(value: Any) -> Any:
    """A cell as written: lists and ambiguous or unsafe text (formulas, line breaks) as JSON; missing values empty."""
    if isinstance(value, list | tuple | np.ndarray):
        return json.dumps([float(each) if isinstance(each, np.generic) else each for each in value])
    if not isinstance(value, str):
        return "" if value is None or value is pd.NA or value != value else value
    bare = value.isprintable() and value.strip() and not value.lstrip().startswith((*_FORMULA_STARTS, '"'))
    if bare and value.strip().lower() not in _READ_AS_SOMETHING_ELSE and _number(value) is None:
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


def read_table(path: Path) -> pd.DataFrame:
    """A table written by ``csv_text``; lists remain JSON text."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        columns = zip(*rows, strict=True) if rows else ([] for _ in header)
        named = zip(map(_read_cell, header), columns, strict=True)
        return pd.DataFrame({name: list(map(_read_cell, cells)) for name, cells in named})
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the command that wrote it again") from error


def command_line() -> str:
    return shlex.join(["forkrl", *sys.argv[1:]])


def _read_cell(cell: str) -> Any:
    if cell in ("", "True", "False"):
        return cell == "True" if cell else math.nan
    return json.loads(cell) if cell.startswith('"') else _number(cell, default=cell)


def _number(text: str, default: Any = None) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return default


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
