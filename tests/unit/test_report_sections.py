"""Figures and tables of a page: the numbers behind them are all there, and no cell of them can act."""

from __future__ import annotations

import base64
import csv
import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from forkrl.report import Page, Section, render_page
from forkrl.report.page import MAX_TABLE_ROWS, render_section
from forkrl.report.plots import inline_svg


def rows_of(section: dict[str, Any]) -> list[list[str]]:
    text = base64.b64decode(section["csv_uri"].partition("base64,")[2]).decode()
    return list(csv.reader(io.StringIO(text)))


def drawn() -> Figure:
    figure = Figure()
    figure.subplots().plot([0, 1], [0, 1])
    figure.text(0.5, 0.5, "Wait", parse_math=False)
    return figure


def test_numbers_are_short_in_the_page_and_whole_in_the_file() -> None:
    table = pd.DataFrame({"type": ["a", None], "count": [3, 4], "entropy": [1.23456789, np.nan]})
    section = render_section(Section("T", "C.", "types", table))
    assert section["rows"] == [("a", "3", "1.235"), ("–", "4", "–")]
    assert rows_of(section) == [["type", "count", "entropy"], ["a", "3", "1.23456789"], ["", "4", ""]]
    assert section["text_columns"] == {0}
    assert section["csv_name"] == "types.csv"


def test_a_cell_is_one_line_in_the_page_and_as_written_in_the_file() -> None:
    section = render_section(Section("T", "C.", "types", pd.DataFrame({"type": [".\n\n"]})))
    assert section["rows"] == [(".⏎⏎",)]
    assert rows_of(section)[1] == ['".\\n\\n"']


def test_long_tables_are_sampled_in_the_page_alone() -> None:
    table = pd.DataFrame({"x": range(1000)})
    long = Section("T", "C.", "long", table, drawn())
    section = render_section(long)
    assert (len(section["rows"]), section["rows"][0], section["rows"][-1]) == (MAX_TABLE_ROWS, ("0",), ("999",))
    assert len(rows_of(section)) == 1001
    assert "200 of 1,000 rows shown, evenly spaced; the file has all" in render_page(Page("p", "k", "v", [long]))


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=HYPERLINK(1)", '"=HYPERLINK(1)"'),
        ("+1+cmd|' /C calc'!A0", "\"+1+cmd|' /C calc'!A0\""),
        ("-1+1", '"-1+1"'),
        ("@SUM(A1)", '"@SUM(A1)"'),
        (" =1", '" =1"'),
        ("\t=1", '"\\t=1"'),
        ("\r=1", '"\\r=1"'),
        ("=", '"="'),
        ('a\nb,"c', '"a\\nb,\\"c"'),
        ('"', '"\\""'),
        ("\x00\ud800\u202e", '"\\u0000\\ud800\\u202e"'),
        ("é, 数", "é, 数"),
    ],
)
def test_no_cell_of_the_file_is_a_formula(text: str, cell: str) -> None:
    section = render_section(Section("T", "C.", "x", pd.DataFrame({"=1+1": [text]}, dtype=object)))
    assert rows_of(section) == [['"=1+1"'], [cell]]


def test_negative_numbers_stay_numbers() -> None:
    assert rows_of(render_section(Section("T", "", "x", pd.DataFrame({"x": [-1.5]})))) == [["x"], ["-1.5"]]


def test_cells_titles_and_captions_are_escaped_and_visible() -> None:
    hostile = "</td><script>x</script>\x1b\u202e{{7*7}}"
    section = Section(hostile, hostile, "x", pd.DataFrame({hostile: [hostile]}), drawn(), [hostile])
    page = render_page(Page("p", "k", "v", [section]))
    assert page.count("&lt;/td&gt;&lt;script&gt;x&lt;/script&gt;␛⟨U+202E⟩{{7*7}}") == 9
    assert page.count("<script>") == 1


def test_table_alone_stands_open_and_nothing_at_all_says_so() -> None:
    table = pd.DataFrame({"x": [1]})
    page = render_page(Page("p", "k", "v", [Section("T", "C.", "x", table)]))
    assert '<figure class="wide">' in page
    assert "<details open>" in page
    closed = render_page(Page("p", "k", "v", [Section("T", "C.", "x", table, drawn())]))
    assert "<details>" in closed
    nothing = render_page(Page("p", "k", "v", [Section("T", "", "x", pd.DataFrame(), missing=["grad/norm"])]))
    assert "Not recorded: grad/norm." in nothing
    assert "<table>" not in nothing


def test_letters_are_text() -> None:
    assert ">Wait</text>" in inline_svg(drawn(), "a")


def test_text_in_a_figure_is_visible_and_escaped() -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "</svg><script>\u202e", parse_math=False)
    svg = inline_svg(figure, "a")
    assert "<script" not in svg
    assert "&lt;/svg&gt;&lt;script&gt;⟨U+202E⟩" in svg
