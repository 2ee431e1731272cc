"""Matplotlib figures as small inline SVG that follows the theme of the page."""

from __future__ import annotations

import io
import re
import warnings

import matplotlib
from matplotlib.figure import Figure

from forkrl.report import style
from forkrl.report.visible_text import visible

_THEME_VARIABLES = {
    style.INK: "var(--ink)",
    style.MUTED: "var(--muted)",
    style.GRID: "var(--line)",
    style.BLUE: "var(--blue)",
    style.VERMILION: "var(--vermilion)",
    style.GREEN: "var(--green)",
    style.PURPLE: "var(--purple)",
}
_NOT_FOR_PAGES = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)


def inline_svg(figure: Figure, name: str, outlines: bool = False) -> str:
    """The figure as an ``<svg>`` element: ids prefixed with ``name``, colours as variables of the page's theme.

    Text stays text: crisp at any zoom, in the font of the page, and a fraction of the size of outlines. With
    ``outlines`` letters are drawn as shapes instead, for figures whose layout depends on their exact widths.
    """
    buffer = io.StringIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "path" if outlines else "none", "svg.hashsalt": "forkrl"}),
        warnings.catch_warnings(),
    ):
        if not outlines:  # the fonts of whoever reads the page have the letters that matplotlib's lacks
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
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
    return visible(re.sub(r"\n\s*", "\n", text).strip())
