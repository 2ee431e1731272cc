"""``results.json`` and ``tables/*.csv``: what is written reads back, and no text in them can act."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forkrl.errors import UserError
from forkrl.store.parquet import write_rows
from forkrl.store.results import Results, csv_text, read_results, read_table, write_results

TEXTS = [
    " wait", "\n\n", "=1+1", "+", "-1", "@a", '"', '""', "", " ", "9", "1e5", "nan", "NA", "null", "None", "True",
    "inf", "a,b", "\x1b[2J", "\u202e", "数", "<0xE6><0x95>", "[1]", "'", "é", "\t=1", "\u2028", "\r", "0x1", "1_000",
    " =1",
]  # fmt: skip


def test_every_text_keeps_to_its_line_and_reads_back(tmp_path: Path) -> None:
    table = pd.DataFrame({"token": TEXTS, "=count": range(len(TEXTS))})
    text = csv_text(table)
    assert len(text.splitlines()) == len(TEXTS) + 1
    for cells in csv.reader(io.StringIO(text)):
        assert not cells[0].lstrip().startswith(("=", "+", "-", "@")) and all(map(str.isprintable, cells))
    (tmp_path / "t.csv").write_text(text)
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), table, check_dtype=False)
    plain = pd.read_csv(tmp_path / "t.csv")["token"].tolist()  # any other program reads texts too
    assert [each if each == text else json.loads(each) for each, text in zip(plain, TEXTS, strict=True)] == TEXTS


@pytest.mark.parametrize("texts", [["1", "2"], ["nan", "null"], ["True", "False"]])
def test_a_column_of_texts_alone_stays_text(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "t.csv").write_text(csv_text(pd.DataFrame({"token": texts})))
    assert read_table(tmp_path / "t.csv")["token"].tolist() == texts


def test_numbers_read_back_to_the_last_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(99) * 10.0 ** np.arange(-49, 50)
    table = pd.DataFrame({"x": values, "n": range(99)})
    table.loc[3, "x"], table.loc[4, "x"] = math.nan, math.inf
    table["scores"] = [[0.0, 1.0]] * 99
    table["correct"] = pd.Series([True, None, False] * 33, dtype=object)
    (tmp_path / "t.csv").write_text(csv_text(table))
    again = read_table(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(again[["x", "n"]], table[["x", "n"]])
    assert json.loads(again["scores"][5]) == [0.0, 1.0]
    assert [None if each != each else each for each in again["correct"]] == [True, None, False] * 33


def written(folder: Path) -> Results:
    return write_results(
        folder, "forkrl-x/1", settings={"seed": 1}, headline="Found.", notes=["One."],
        facts={"accuracy": math.nan, "n": 2}, tables={"a": pd.DataFrame({"x": [1.5]}), "empty": pd.DataFrame()},
    )  # fmt: skip


def test_results_read_as_they_were_written(tmp_path: Path) -> None:
    results = written(tmp_path)
    assert (results.schema, results.headline, results.notes) == ("forkrl-x/1", "Found.", ["One."])
    assert (results.settings, results.facts) == ({"seed": 1}, {"accuracy": None, "n": 2})
    assert results.tables["a"]["x"].tolist() == [1.5] and results.tables["empty"].empty
    assert {"forkrl", "torch"} <= results.versions.keys()
    assert results.command.startswith("forkrl") and results.folder == tmp_path


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("results.json", "{", "results.json: cannot be read"),
        ("results.json", "[]", "results.json: is not a JSON object"),
        ("results.json", "{}", "results.json: another version of ForkRL wrote it"),
        ("tables/a.csv", 'x\n"""', "a.csv: cannot be read"),
        ("tables/a.csv", None, "a.csv: cannot be read"),
    ],
)
def test_damaged_results_are_refused_in_a_line(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    written(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_results(tmp_path)


def test_a_table_with_a_cell_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("a\n" + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"long\.csv: cannot be read"):
        read_table(tmp_path / "long.csv")


def test_rows_are_written_with_their_schema(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("step", pa.int32(), nullable=False), ("score", pa.float32())])
    write_rows(tmp_path / "rows.parquet", [{"step": 1, "score": 0.5}], schema)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.schema.equals(schema) and table.to_pylist() == [{"step": 1, "score": 0.5}]
