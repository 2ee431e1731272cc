"""One self-contained HTML page for every command: commands fill in a ``Page``; only this module knows HTML."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
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
from forkrl.report.formatting import evenly_spaced, percent, plain, script_json, visible
from forkrl.report.plots import inline_svg
from forkrl.stats.intervals import Estimate
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
    """One number of the run; ``before`` is empty if there is only one."""

    title: str
    value: str
    before: str = ""
    note: str = ""


def interval_card(title: str, estimate: Estimate, note: str = "", **sign: str) -> Card:
    value, _, ends = percent(estimate, **sign).partition(" ")
    return Card(title, value, note="; ".join(part for part in (ends and f"95% {ends}", note) if part))


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A titled plot, a table, or both.

    The page shows at most ``MAX_TABLE_ROWS`` evenly spaced rows and says so; the CSV download has all. Cells may hold
    raw model text. The table's index is ignored.

    Args:
        title: a few words.
        caption: one or two sentences.
        name: letters, digits and dashes, unique in the page; the download is ``name.csv``.
        table: one row per point; may be empty.
        figure: None: table only. Draw model text with ``parse_math=False``.
        missing: names of metrics that were not recorded.
        printed: table for the terminal; None: the section is on the page only.
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
    """Responses to the questions of one benchmark, without token measurements.

    A question has ``question`` (its id), ``outcome``, ``prompt`` and ``answer`` (either may be empty) and
    ``responses``, each with ``outcome`` ("right", "wrong" or "failed"), ``facts`` (a few words each) and ``text``.
    """

    title: str
    note: str
    questions: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Page:
    """The content of a page. Any text may be hostile: rendering makes it visible and escapes it.

    Args:
        name: the heading.
        kind: such as "training run", "analysis" or "drift".
        headline: the main result in one sentence.
        sections: plots and tables, in reading order.
        status: a sentence on unfinished work; may be empty.
        notes: sentences on what is missing, damaged or left out.
        cards: the few numbers under the headline.
        forks: the fork view, if any.
        shelves: sample responses, one shelf per benchmark.
        settings: groups of (key, value, differs from the default).
        provenance: versions, commit, data.
        command: the command line that was run.
        reproduce: a command line that reproduces the work.
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
    """Write the page atomically and return its path."""
    write_text(path, render_page(page))
    return path


def _script(*names: str) -> str:
    return '"use strict";\n(() => {\n' + "".join(map(_template, names)) + "})();\n"


def _template(name: str) -> str:
    return files("forkrl.report").joinpath("templates", name).read_text(encoding="utf-8")


def _marks(data: Mapping[str, Any]) -> str:
    """The legend of the marks and notation that the fork view uses."""
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
