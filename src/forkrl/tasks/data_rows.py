"""Rows of JSONL and Parquet files, folders of them, and data sets of the Hugging Face hub, one by one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.config import TaskConfig
from forkrl.errors import UserError, first_line
from forkrl.model.locations import require_hub_id
from forkrl.tasks.json_lines import json_object

NO_VERIFIER = "none"
_SUFFIXES = (".jsonl", ".parquet")
_SPLIT = re.compile(r"[\w.\-+%\[\]:]+")
_BATCH_ROWS = 1024


class Row(NamedTuple):
    place: str
    """The location of the row in error messages: "train.jsonl line 7"."""
    values: dict[str, Any]


class RawRow(NamedTuple):
    """A row with its place; ``values`` is still a line of JSON where it comes from a JSONL file."""

    place: str
    values: bytes | dict[str, Any]

    def parsed(self) -> Row:
        return Row(self.place, json_object(self.values, self.place) if isinstance(self.values, bytes) else self.values)


def look_up(row: Row, column: str, key: str) -> Any:
    """The value of a column; dots reach inside dicts, and with a number inside lists."""
    if column in row.values:
        return row.values[column]
    value: Any = row.values
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _no_such_column(row.place, column, key, _column_names(row.values))
    return value


def _no_such_column(place: str, column: str, key: str, names: list[str]) -> UserError:
    near = difflib.get_close_matches(column, names, n=1)
    remedy = f"; set {key}" + (
        " (or task.verifier=none, where there are no answers)" if key == "task.answer_column" else ""
    )
    suggestion = f"; did you mean {near[0]!r}?" if near else remedy
    listing = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return UserError(f"{place} has no column {column!r} ({key}); it has: {listing or 'none'}{suggestion}")


def _column_names(values: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in values.items():
        names.append(f"{prefix}{name}")
        if isinstance(value, dict):
            names += _column_names(value, f"{prefix}{name}.")
    return names


def read_rows(config: TaskConfig, source: str, key: str) -> Iterator[RawRow]:
    path = Path(source).expanduser()
    if path.exists():
        for name, value in (
            ("subset", config.subset or None),
            ("split", config.split if config.split != "train" else None),
        ):
            if value is not None:
                raise UserError(f"task.{name} = {value!r} is for hub data sets, but {key} = {source!r} is a local path")
        for file in _files_of(path, key):
            yield from _read_jsonl(file) if file.suffix == ".jsonl" else _read_parquet(config, file)
    else:
        name, _, split = source.partition(":")
        named = not Path(name).exists() and (not split or _SPLIT.fullmatch(split))
        require_hub_id(name if named else source, key, "file or folder")
        yield from _read_hub(config, name, split or config.split, key)


def _files_of(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{key} = {str(path)!r}: the folder holds no .jsonl or .parquet file")
        return files
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{key} = {str(path)!r} is neither a .jsonl nor a .parquet file; convert it to one of them")
    return [path]


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield RawRow(f"{path.name} line {number}", line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_parquet(config: TaskConfig, path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _top_columns(config, file.schema_arrow.names, path.name)
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path.name} row {number}", values)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None


def _read_hub(config: TaskConfig, name: str, split: str, key: str) -> Iterator[RawRow]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config.subset or None, split=split)
    except Exception as error:  # network, permission, unknown name, subset or split: dozens of types, one remedy
        raise UserError(
            f"{key} = {name!r} is not a local path, and the hub has no split {split!r} of it ({first_line(error)}); "
            f"check the name, or download it and give the path of a .jsonl or .parquet file or a folder of them"
        ) from None
    rows = rows.select_columns(_top_columns(config, rows.column_names, name))
    number = 0
    for batch in rows.iter(_BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield RawRow(f"{name} ({split}) row {number}", dict(zip(batch, values, strict=True)))


def _top_columns(config: TaskConfig, names: list[str], place: str) -> list[str]:
    """The columns that must be read so that the recipe's two, which may lie inside them, can be looked up."""
    needed: dict[str, None] = {}
    for key, column in (("task.prompt_column", config.prompt_column), ("task.answer_column", config.answer_column)):
        if key == "task.answer_column" and config.verifier == NO_VERIFIER:
            continue
        top = column if column in names else column.partition(".")[0]
        if top not in names:
            raise _no_such_column(place, column, key, names)
        needed[top] = None
    return list(needed)
