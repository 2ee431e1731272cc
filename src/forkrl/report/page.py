"""One self-contained HTML page, for whatever command has something to show.

A page is plain data (``Page``): commands fill it in, and only this module knows HTML.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from forkrl.report.colors import token_colors
from forkrl.report.fork_data import fork_data
from forkrl.report.fork_view import ForkView
from forkrl.report.reading import Shelf
from forkrl.report.sections import FigureSection
from forkrl.report.visible_text import script_json, visible
from forkrl.store.atomic import write_text

_FORK_SCRIPTS = ("fork_model.js", "fork_blocks.js", "fork_tip.js", "fork_controls.js")


@dataclass(frozen=True, slots=True)
class Card:
    """One number of the run: ``before`` is empty when there is only one."""

    title: str
    value: str
    before: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says. Every text may be hostile: it is made visible and escaped when the page is rendered.

    Args:
        name: what the page is about, its heading.
        kind: such as "training run", "analysis" or "drift".
        verdict: one sentence on top: what was found.
        figures: in reading order.
        status: a sentence on work that is not finished; may be empty.
        notes: what is missing, damaged or left out, a sentence each.
        cards: the few numbers under the verdict.
        forks: None: the page has no fork view.
        shelves: responses to read, one shelf a benchmark.
        settings: sections of (key, value, differs from the default).
        provenance: versions, commit, data: what the numbers come from.
        command: the command line that was run.
        reproduce: a command line that does the same again.
        figures_title: heading of the figures.
        source: what the page was made from, for the footer.
    """

    name: str
    kind: str
    verdict: str
    figures: Sequence[FigureSection]
    status: str = ""
    notes: Sequence[str] = ()
    cards: Sequence[Card] = ()
    forks: ForkView | None = None
    shelves: Sequence[Shelf] = ()
    settings: Sequence[tuple[str, Sequence[tuple[str, str, bool]]]] = ()
    provenance: Sequence[tuple[str, str]] = ()
    command: str = ""
    reproduce: str = ""
    figures_title: str = "How it went"
    source: str = ""


def render_page(page: Page) -> str:
    """The page as HTML text."""
    has_views = page.forks is not None and len(page.forks.views) > 0
    script = Markup(_script("page.js", *(_FORK_SCRIPTS if has_views else ())))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible_value,
    )
    return environment.get_template("report.html").render(
        page=page,
        data=Markup(script_json(fork_data(page.forks))) if page.forks is not None and has_views else None,
        style=Markup(_template("report.css") + token_colors()),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_page(path: Path, page: Page) -> Path:
    """Write the page, whole or not at all, and return its path.

    Raises:
        UserError: the page cannot be written; an old one then stays as it was.
    """
    write_text(path, render_page(page))
    return path


def _visible_value(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _script(*names: str) -> str:
    """The scripts as one, in a scope of its own."""
    return '"use strict";\n(() => {\n' + "".join(map(_template, names)) + "})();\n"


def _template(name: str) -> str:
    return files("forkrl.report").joinpath("templates", name).read_text(encoding="utf-8")
