"""Atomically written Parquet files, and a UserError that names a damaged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forkrl.errors import UserError, first_line
from forkrl.store.atomic import explained_write_errors, fsync, temporary_beside


@contextmanager
def writing_parquet(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet writer whose file appears at ``path`` once complete."""
    temporary = temporary_beside(path)
    with explained_write_errors(path):
        try:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                yield writer
            fsync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    with writing_parquet(path, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema))


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn errors of a damaged part into a UserError that says how to rebuild it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); remove it and run the same command again, which rebuilds it"
        ) from error


def part_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def part_paths(table: Path) -> list[Path]:
    """The files of a table, in order."""
    if table.is_file():
        return [table]
    paths = sorted(table.glob("part-*.parquet"))
    if not paths:
        raise ValueError(f"{table}: holds no part-*.parquet")
    return paths
