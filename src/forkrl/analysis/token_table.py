"""The token table: one row per response token, in Parquet parts that are processed in bounded memory.

A folder ``tokens/`` of parts is one data set that ``pandas.read_parquet`` can read. A row group holds whole responses;
responses to one prompt are consecutive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from forkrl.errors import UserError
from forkrl.store.parquet import part_paths, reading_parquet

TOP = 5
"""Alternatives stored per position."""
TOKEN_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("prompt", pa.int32(), nullable=False),  # index, from 0
        pa.field("sample", pa.int32(), nullable=False),  # index among the responses to the prompt, from 0
        pa.field("position", pa.int32(), nullable=False),  # from 0
        pa.field("length", pa.int32(), nullable=False),  # tokens in the whole response
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("text", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("entropy", pa.float32(), nullable=False),  # nats
        pa.field("logprob", pa.float32(), nullable=False),  # nats
        pa.field("rank", pa.int32(), nullable=False),  # 1: most likely
        pa.field("top_ids", pa.list_(pa.int32()), nullable=False),  # most likely first
        pa.field("top_texts", pa.list_(pa.string()), nullable=False),
        pa.field("top_probs", pa.list_(pa.float32()), nullable=False),
        pa.field("correct", pa.bool_()),  # null if the response was not judged
    ]
)

Tokens: TypeAlias = pd.DataFrame | str | Path
"""Rows of ``TOKEN_SCHEMA``: a data frame, or a Parquet folder or file."""


def token_batches(tokens: Tokens, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """The rows in order, in data frames of whole responses with at least ``columns``."""
    if isinstance(tokens, pd.DataFrame):
        if missing := [name for name in columns if name not in tokens]:
            raise ValueError(f"the table of tokens has no column {', '.join(missing)}")
        yield tokens
        return
    for path in part_paths(Path(tokens)):
        _require_columns(path, columns)
        with reading_parquet(path), pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=list(columns)).to_pandas()


def query(tokens: Tokens, columns: Sequence[str], sql: str, **parameters: float) -> pd.DataFrame:
    """Run SQL over the table ``tokens``, out of core; it may use ``columns`` and ``$name`` parameters.

    Single-threaded, so that the order of summation and hence every bit of the result is deterministic.
    """
    with duckdb.connect(config={"threads": 1}) as database:
        if isinstance(tokens, pd.DataFrame):
            if missing := [name for name in columns if name not in tokens]:
                raise ValueError(f"the table of tokens has no column {', '.join(missing)}")
            database.register("tokens", tokens[list(columns)])
        else:
            paths = part_paths(Path(tokens))
            for path in paths:
                _require_columns(path, columns)
            database.read_parquet([str(path) for path in paths]).create_view("tokens")
        try:
            return database.execute(sql, {name: float(value) for name, value in parameters.items()}).df()
        except duckdb.Error:
            for path in [] if isinstance(tokens, pd.DataFrame) else paths:
                with reading_parquet(path):
                    pq.read_table(path, columns=list(columns))
            raise


def _require_columns(path: Path, columns: Sequence[str]) -> None:
    with reading_parquet(path):
        present = pq.read_schema(path).names
    if missing := [name for name in columns if name not in present]:
        raise UserError(f"{path}: has no column {', '.join(missing)}; remove it and run the same command again")


def tokens_of_prompts(tokens: Path, numbers: Collection[int]) -> pd.DataFrame:
    wanted = pa.array(sorted(numbers), pa.int32())
    found = []
    for path in part_paths(tokens):
        with reading_parquet(path), pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                # Filter before conversion: the data frame's lists would keep the whole row group alive.
                found.append(table.filter(pc.is_in(table["prompt"], wanted)).combine_chunks())
    return pa.concat_tables(found).unify_dictionaries().to_pandas()


def read_tokens(tokens: str | Path, columns: Iterable[str] | None = None) -> pd.DataFrame:
    """The whole table in memory. A million tokens take about 200 MB with all columns, 4 MB per numeric column."""
    names = list(columns) if columns is not None else TOKEN_SCHEMA.names
    return pd.concat(list(token_batches(tokens, names)), ignore_index=True)
