"""One self-contained HTML page, the same for every command.

A page is plain data (``Page``): commands fill it in, and only this module knows HTML.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from forkrl.report.colors import token_colors
from forkrl.report.fork_data import fork_data
from forkrl.report.fork_view import ForkView
from forkrl.report.formatting import evenly_spaced, interval, percent, plain, script_json, visible
from forkrl.report.plots import inline_svg
from forkrl.stats.intervals import Estimate, as_columns
from forkrl.store.atomic import write_text
from forkrl.store.results import Results, csv_cell, csv_text

MAX_TABLE_ROWS = 200
_FORK_SCRIPTS = ("fork_model.js", "fork_blocks.js", "fork_tip.js", "fork_controls.js")
_COUNTDOWN = re.compile(r"\d+( \d+)+:\d+\?")
_MARKS = {
    "⏎": "⏎ is a line break",
    "⇥": "⇥ a tab",
    "⟨⟩": "⟨⟩ a token without text",
    "⟨U+": "⟨U+…⟩ a character that acts without being seen",
}
_BYTE_MARK = re.compile(r"⟨[0-9A-F]{2}( [0-9A-F]{2})*⟩")


@dataclass(frozen=True, slots=True)
class Card:
    """One number of the run: ``before`` is empty when there is only one."""

    title: str
    value: str
    before: str = ""
    note: str = ""


def interval_card(title: str, estimate: Estimate, note: str = "", **sign: str) -> Card:
    """An estimate in percent, its interval in the note."""
    value, _, ends = percent(estimate, **sign).partition(" ")
    return Card(title, value, note="; ".join(part for part in (ends and f"95% {ends}", note) if part))


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A titled plot, a table, or both.

    The page shows at most ``MAX_TABLE_ROWS`` rows, evenly spaced, and says so; the CSV file to download has all. Cells
    may be text that a model wrote: it is made visible when the page is rendered. The index of the table is left out.

    Args:
        title: a few words.
        caption: what is seen, in a sentence or two.
        name: letters, digits and dashes, unique in the page: the file to download is ``name.csv``.
        table: numbers and texts, one row a point; empty when nothing was recorded.
        figure: None: the table alone. Text of a model in it must be drawn with ``parse_math=False``.
        missing: names of what was not recorded, said under the plot.
        printed: a table for the terminal; None: the section is only on the page.
    """

    title: str
    caption: str
    name: str
    table: pd.DataFrame
    figure: Figure | None = None
    missing: Sequence[str] = ()
    printed: pd.DataFrame | None = None


@dataclass(frozen=True, slots=True)
class Shelf:
    """Whole responses to read, where tokens were not measured: the questions of one benchmark, and which these are.

    A question has ``question`` (its id), ``outcome``, ``prompt`` and ``answer`` (either may be empty) and
    ``responses``, each with ``outcome`` ("right", "wrong" or "failed"), ``facts`` (a few words each) and ``text``.
    """

    title: str
    note: str
    questions: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says. Every text may be hostile: it is made visible and escaped when the page is rendered.

    Args:
        name: what the page is about, its heading.
        kind: such as "training run", "analysis" or "drift".
        headline: one sentence on top: what was found.
        sections: plots and tables, in reading order.
        status: a sentence on work that is not finished; may be empty.
        notes: what is missing, damaged or left out, a sentence each.
        cards: the few numbers under the headline.
        forks: None: the page has no fork view.
        shelves: responses to read, one shelf a benchmark.
        settings: groups of (key, value, differs from the default).
        provenance: versions, commit, data: what the numbers come from.
        command: the command line that was run.
        reproduce: a command line that does the same again.
        sections_title: heading of the sections.
        source: what the page was made from, for the footer.
    """

    name: str
    kind: str
    headline: str
    sections: Sequence[Section]
    status: str = ""
    notes: Sequence[str] = ()
    cards: Sequence[Card] = ()
    forks: ForkView | None = None
    shelves: Sequence[Shelf] = ()
    settings: Sequence[tuple[str, Sequence[tuple[str, str, bool]]]] = ()
    provenance: Sequence[tuple[str, str]] = ()
    command: str = ""
    reproduce: str = ""
    sections_title: str = "How it went"
    source: str = ""


def about(results: Results) -> dict[str, Any]:
    """Fields of ``Page`` that every command fills from its results alike."""
    command = results.schema.removeprefix("forkrl-").partition("/")[0]
    given = ((key, value) for key, value in results.settings.items() if value not in ("", None, [], {}))
    return {
        "name": str(results.settings["model"]),
        "headline": results.headline,
        "notes": results.notes,
        "settings": [(command, [(key, plain(value), False) for key, value in given])],
        "provenance": list(results.versions.items()),
        "command": results.command,
    }


def table_of(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A table of JSON rows; an estimate (mean, low, high) becomes three columns."""
    return pd.DataFrame(
        {
            column: number
            for name, value in row.items()
            for column, number in (
                as_columns(name, interval(value)) if isinstance(value, Mapping) else {name: value}
            ).items()
        }
        for row in rows
    )


def render_page(page: Page) -> str:
    """The page as HTML text."""
    data = fork_data(page.forks) if page.forks is not None and page.forks.views else None
    script = Markup(_script("page.js", *(_FORK_SCRIPTS if data is not None else ())))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    return environment.get_template("report.html").render(
        page=page,
        sections=[render_section(section) for section in page.sections],
        marks=_marks(data) if data is not None else "",
        marked=any(differs for _, rows in page.settings for _, _, differs in rows),
        data=Markup(script_json(data)) if data is not None else None,
        style=Markup(_template("report.css") + token_colors()),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_page(path: Path, page: Page) -> Path:
    """Write the page, whole or not at all, and return its path."""
    write_text(path, render_page(page))
    return path


def _script(*names: str) -> str:
    """The scripts as one, in a scope of its own."""
    return '"use strict";\n(() => {\n' + "".join(map(_template, names)) + "})();\n"


def _template(name: str) -> str:
    return files("forkrl.report").joinpath("templates", name).read_text(encoding="utf-8")


def _marks(data: Mapping[str, Any]) -> str:
    """What the marks and the notation in the fork view mean; only of those that are there."""
    texts = "\0".join(data["texts"])
    found = [meaning for mark, meaning in _MARKS.items() if mark in texts]
    if any("\u2400" <= character <= "\u2421" for character in texts):
        found.append("␛ and its like a control character")
    if _BYTE_MARK.search(texts):
        found.append("⟨E6 95⟩ bytes of a character that several tokens make up, which the first of them shows")
    sentences = f" {'; '.join(found)}." if found else ""
    prompts = (prompt["prompt"] for view in data["views"] for frame in view["frames"] for prompt in frame["prompts"])
    if any(_COUNTDOWN.fullmatch(prompt) for prompt in prompts):
        sentences += (
            " A Countdown problem 2 5 9:90? asks for 90 from 2, 5 and 9. In a response, [9 10] are the numbers that "
            "remain after a step, 19:90 compares a result with the target, ; tries again, ! claims success, ? gives up."
        )
    return sentences


def render_section(section: Section) -> dict[str, Any]:
    """A section as the template takes it: its plot as SVG, its table as cells and as a CSV file."""
    table = section.table
    columns = [visible(str(column)) for column in table.columns]
    texts = {place for place in range(len(columns)) if any(isinstance(each, str) for each in table.iloc[:, place])}
    written = [
        *map(str, table.columns),
        *(each for place in texts for each in table.iloc[:, place] if isinstance(each, str)),
    ]
    missing = f" Not recorded: {', '.join(section.missing)}." if section.missing else ""
    shown = table.iloc[evenly_spaced(len(table), MAX_TABLE_ROWS)]
    return {
        "title": section.title,
        "caption": f"{section.caption}{missing}".strip(),
        "svg": "" if section.figure is None else inline_svg(section.figure, section.name),
        "columns": columns,
        "text_columns": texts,
        "rows": [tuple(map(_cell, row)) for row in shown.itertuples(index=False, name=None)],
        "num_rows": len(table),
        "csv_name": f"{section.name}.csv",
        "csv_uri": "data:text/csv;base64," + base64.b64encode(csv_text(table).encode()).decode(),
        "has_json": any(csv_cell(text) != text for text in written),
    }


def _is_missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _cell(value: Any) -> str:
    if _is_missing(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value)).replace("\n", "⏎")
