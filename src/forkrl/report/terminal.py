"""A page's headline, notes, cards and main tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from forkrl.errors import printable
from forkrl.report.page import Page


def describe_page(page: Page) -> str:
    lines = [page.headline, *(f"note: {note}" for note in page.notes)]
    if page.cards:
        lines += ["", *aligned([[card.title, _value(card.before, card.value), card.note] for card in page.cards])]
    for section in page.sections:
        if section.printed is not None and len(section.printed):
            lines += ["", f"{section.title}:", *aligned(table_cells(section.printed), numbers=True)]
    return "\n".join(map(printable, lines))


def table_cells(table: pd.DataFrame) -> list[list[str]]:
    """Header and rows as text; an estimate is one column: ``0.12 [0.1, 0.14]``."""
    columns = [str(name) for name in table.columns]
    ends = {f"{name}{end}" for name in columns for end in ("_low", "_high") if f"{name}_low" in columns}
    shown = [name for name in columns if name not in ends]
    return [
        [name.replace("_", " ") for name in shown],
        *([_cell(row, name, f"{name}_low" in columns) for name in shown] for row in table.to_dict("records")),
    ]


def _cell(row: dict[Any, Any], name: str, estimate: bool) -> str:
    cell = _number(row[name])
    if not estimate or pd.isna(row[f"{name}_low"]):
        return cell
    return f"{cell} [{_number(row[f'{name}_low'])}, {_number(row[f'{name}_high'])}]"


def _number(value: Any) -> str:
    if pd.isna(value):
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    rounded = float(f"{value:.4g}") if abs(value) < 1 else float(value)
    return f"{round(rounded, 4) + 0.0:.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"  # no -0.0


def _value(before: str, value: str) -> str:
    return f"{before} → {value}" if before else value


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Columns two blanks apart; ``numbers``: right-align all but the first."""
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(c.rjust(w) if numbers else c.ljust(w) for c, w in rest)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
