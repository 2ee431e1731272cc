"""Iterates over rows of JSONL and Parquet files, folders of them, and Hugging Face data sets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.config import TaskConfig
from forkrl.errors import UserError, first_line
from forkrl.model.locations import require_hub_id
from forkrl.tasks.json_lines import BadRows, json_object

NO_VERIFIER = "none"
_SUFFIXES = (".jsonl", ".parquet")
_SPLIT = re.compile(r"[\w.\-+%\[\]:]+")
_BATCH_ROWS = 1024


class Row(NamedTuple):
    place: str
    """Location for error messages: "train.jsonl line 7"."""
    values: dict[str, Any]


def read_rows(config: TaskConfig, source: str, key: str, bad: BadRows) -> Iterator[Row]:
    """The rows of a source with the recipe's columns; lines that are not JSON objects go to ``bad``."""
    path = Path(source).expanduser()
    if path.exists():
        for setting in ("subset", "split"):
            if setting in config.changed() and (value := getattr(config, setting)):
                raise UserError(
                    f"task.{setting} = {value!r} is for hub data sets, but {key} = {source!r} is a local path"
                )
        for file in _files_of(path, key):
            yield from _read_jsonl(file, bad) if file.suffix == ".jsonl" else _read_parquet(config, file)
    else:
        name, _, split = source.partition(":")
        is_hub_name = not Path(name).exists() and (not split or _SPLIT.fullmatch(split))
        require_hub_id(name if is_hub_name else source, key, "file or folder")
        yield from _read_hub(config, name, split or config.split, key)


def look_up(row: Row, column: str, key: str) -> Any:
    """The value of a column; dots select nested fields or, with a number, list items."""
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
    remedy = f"set {key}" + (" (or task.verifier=none, if there are no answers)" if key == "task.answer_column" else "")
    if near := difflib.get_close_matches(column, names, n=1):
        remedy = f"did you mean {near[0]!r}?"
    listing = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return UserError(f"{place} has no column {column!r} ({key}); it has: {listing or 'none'}; {remedy}")


def _column_names(values: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in values.items():
        names.append(f"{prefix}{name}")
        if isinstance(value, dict):
            names += _column_names(value, f"{prefix}{name}.")
    return names


def _files_of(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{key} = {str(path)!r}: the folder holds no .jsonl or .parquet file")
        return files
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{key} = {str(path)!r} is neither a .jsonl nor a .parquet file; convert it to one of them")
    return [path]


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path.name} line {number}"
                try:
                    values = json_object(line, place)
                except UserError as error:
                    bad.add(error)
                else:
                    yield Row(place, values)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_parquet(config: TaskConfig, path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns, number = _top_columns(config, file.schema_arrow.names, path.name), count(1)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                yield from (Row(f"{path.name} row {next(number)}", values) for values in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None


def _read_hub(config: TaskConfig, name: str, split: str, key: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config.subset or None, split=split)
    except Exception as error:  # network, permission, unknown name, subset or split: many types, one remedy
        raise UserError(
            f"{key} = {name!r} is not a local path, and the hub has no split {split!r} of it ({first_line(error)}); "
            f"check the name, or download it and give the path of a .jsonl or .parquet file or a folder of them"
        ) from None
    number = count(1)
    for batch in rows.select_columns(_top_columns(config, rows.column_names, name)).iter(_BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield Row(f"{name} ({split}) row {next(number)}", dict(zip(batch, values, strict=True)))


def _top_columns(config: TaskConfig, names: list[str], place: str) -> list[str]:
    """The top-level columns that contain the recipe's prompt and answer columns."""
    wanted = {"task.prompt_column": config.prompt_column}
    if config.verifier != NO_VERIFIER:
        wanted["task.answer_column"] = config.answer_column
    needed: dict[str, None] = {}
    for key, column in wanted.items():
        top = column if column in names else column.partition(".")[0]
        if top not in names:
            raise _no_such_column(place, column, key, names)
        needed[top] = None
    return list(needed)
