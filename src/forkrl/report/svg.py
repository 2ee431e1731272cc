"""Matplotlib figures as small inline SVG that follows the theme of the page."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.figure import Figure

from forkrl.report import figures

_THEME_VARIABLES = {
    figures.INK: "var(--ink)",
    figures.MUTED: "var(--muted)",
    figures.GRID: "var(--line)",
    figures.BLUE: "var(--blue)",
    figures.VERMILION: "var(--vermilion)",
    figures.GREEN: "var(--green)",
    figures.PURPLE: "var(--purple)",
}
_NOT_FOR_PAGES = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element: ids prefixed with ``name``, colours as variables of the page's theme."""
    buffer = io.StringIO()
    # Text stays text ("none"): crisp at any zoom, in the font of the page, and a fraction of the size of outlines.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "forkrl"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = _NOT_FOR_PAGES.sub("", buffer.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    # The page gives the size; the view box keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for color, variable in _THEME_VARIABLES.items():
        text = text.replace(color, variable)
    return re.sub(r"\n\s*", "\n", text).strip()
