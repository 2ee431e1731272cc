"""A titled figure with the numbers behind it, for any page."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.sampling import evenly_spaced
from forkrl.report.svg import inline_svg
from forkrl.report.visible_text import visible

MAX_TABLE_ROWS = 200
_FORMULA_STARTS = ("=", "+", "-", "@")


@dataclass(frozen=True, slots=True)
class FigureSection:
    """A titled figure, a plain sentence or two about it, and its table, all ready for the page.

    ``svg`` is empty when there is a table only, or nothing at all; ``text_columns`` are the places of columns that
    hold text, which stands to the left.
    """

    title: str
    caption: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_rows: int
    csv_name: str
    csv_uri: str
    missing: tuple[str, ...] = ()
    text_columns: frozenset[int] = frozenset()
    open_table: bool = False


def figure_section(
    title: str,
    caption: str,
    figure: Figure | None,
    table: pd.DataFrame,
    name: str,
    missing: Sequence[str] = (),
    *,
    open_table: bool = False,
    outlines: bool = False,
) -> FigureSection:
    """A figure and the numbers behind it.

    The page shows at most ``MAX_TABLE_ROWS`` rows, evenly spaced, and says so; the file to download has all. Cells may
    be text that a model wrote: it is made visible here. The index of the table is left out.

    Args:
        title: a few words.
        caption: what is seen, in a sentence or two.
        figure: drawn as SVG; None for a table alone. Text of a model in it must be drawn with ``parse_math=False``.
        table: numbers and texts, one row a point; empty when nothing was recorded.
        name: letters, digits and dashes, unique in the page: the file to download is ``name.csv``.
        missing: names of what was not recorded, said under the figure.
        open_table: show the table without a click, and over the page's whole width.
        outlines: draw letters as outlines, for figures that place each letter (word clouds).
    """
    columns = [visible(str(column)) for column in table.columns]
    shown = table.iloc[evenly_spaced(len(table), MAX_TABLE_ROWS)]
    return FigureSection(
        title=title,
        caption=caption,
        svg="" if figure is None else inline_svg(figure, name, outlines=outlines),
        columns=tuple(columns),
        rows=tuple(tuple(map(_cell, row)) for row in shown.itertuples(index=False, name=None)),
        num_rows=len(table),
        csv_name=f"{name}.csv",
        csv_uri=_csv_uri(columns, table),
        missing=tuple(missing),
        text_columns=frozenset(i for i in range(len(columns)) if table.iloc[:, i].map(_is_text).any()),
        open_table=open_table or figure is None,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _cell(value: Any) -> str:
    if _is_missing(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value)).replace("\n", "⏎")


def _csv_uri(columns: Sequence[str], table: pd.DataFrame) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_csv_cell, columns))
    writer.writerows(map(_csv_cell, row) for row in table.itertuples(index=False, name=None))
    return "data:text/csv;base64," + base64.b64encode(buffer.getvalue().encode()).decode()


def _csv_cell(value: Any) -> Any:
    """Text as the page shows it, with an apostrophe before what a spreadsheet would run as a formula.

    A single sign is text to every spreadsheet, and a frequent token, so it stays as it is.
    """
    if _is_missing(value):
        return ""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if len(text) > 1 and text.startswith(_FORMULA_STARTS) else text
