"""Parts of a table in Parquet files that appear all at once; a damaged one is named with its remedy."""

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
    """A Parquet writer whose file appears at ``path`` all at once, when everything is in it."""
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
    """Write rows as one file, all at once."""
    with writing_parquet(path, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema))


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged part into one line for the user.

    Raises:
        UserError: names the part, and how to rebuild it.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); remove it and run the same command again, which rebuilds it"
        ) from error


def part_path(folder: Path, index: int) -> Path:
    """The file of a part."""
    return folder / f"part-{index:05d}.parquet"


def part_paths(table: Path) -> list[Path]:
    """The files of a table, in order."""
    if table.is_file():
        return [table]
    paths = sorted(table.glob("part-*.parquet"))
    if not paths:
        raise ValueError(f"{table}: holds no part-*.parquet")
    return paths
