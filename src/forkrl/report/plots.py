"""The figures of all pages: curves in panels, forests of intervals, word clouds, and SVG output.

Colours are those of Okabe and Ito, safe for colour blindness; line styles differ for print. Every colour is a constant
of this file, so that a page can map each to its theme.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D
from numpy.typing import ArrayLike
from wordcloud import WordCloud

from forkrl.report.formatting import visible, visible_token
from forkrl.stats.intervals import Estimate

INK, MUTED, GRID = "#22252b", "#6b7280", "#e3e5ea"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b0568c"
LOOKS = (
    (BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"),
    (MUTED, "-", "v"), (INK, "--", "P"), (BLUE, ":", "X"), (VERMILION, "-", "<"),
)  # fmt: skip
"""By curve index: colour, line style, marker."""
WIDTH, HEIGHT = 5.2, 2.9  # inches; report.css scales 9-point text to at least 11 pixels
FONT_SIZE = 9
_LEGEND: dict[str, Any] = {
    "frameon": False, "fontsize": FONT_SIZE, "labelcolor": INK, "handlelength": 1.6, "columnspacing": 1.3,
}  # fmt: skip
_LEGEND_HANDLE, _LEGEND_CHARACTER, _LEGEND_ROW = 0.5, 0.075, 0.18  # inches
CLOUD_WORDS = 100
_CLOUD_PIXELS = (1040, 480)
_LARGEST_WORD, _SMALLEST_WORD = 110, 0.25  # pixels; share of the largest at which the hundredth word is legible

Kind = Literal["line", "band", "steps", "stairs"]
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
POINTS = FuncFormatter(lambda value, _: f"{100 * value:+.3g}" if value else "0")
COUNT = FuncFormatter(lambda value, _: f"{value:,.0f}")


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Values with their 95% interval in ``low`` and ``high`` if given (NaN: unknown).

    Colour, style and marker default to those of the curve's index in the panel (``LOOKS``). ``kind``: "line" has error
    bars, "band" a shaded interval, "steps" changes after each point, "stairs" is a histogram with bin edges as ``x``.
    """

    x: ArrayLike
    y: ArrayLike
    label: str = ""
    color: str | None = None
    style: str | None = None
    marker: str | None = ""
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    kind: Kind = "line"
    alpha: float = 1.0


def column_curve(table: pd.DataFrame, x: ArrayLike, column: str, label: str = "", **look: Any) -> Curve:
    return Curve(
        x, table[column].to_numpy(float), label, low=table[f"{column}_low"], high=table[f"{column}_high"], **look
    )


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One pair of axes.

    ``y_format``, ``x_format``: None for plain numbers. ``bottom``: lower end of the y axis, None for automatic.
    ``names``: labels of the x positions 0, 1, …. ``log``: "x", "y" or "". ``vline``, ``hline``: a value and its label.
    """

    ylabel: str
    curves: Sequence[Curve]
    y_format: FuncFormatter | None = None
    x_format: FuncFormatter | None = None
    bottom: float | None = 0
    title: str = ""
    names: Sequence[str] = ()
    log: str = ""
    vline: tuple[float, str] | None = None
    hline: tuple[float, str] | None = None
    legend: bool = True


def empty_figure(height: float = HEIGHT) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_visible(False)
    return figure


def plot(panels: Sequence[Panel], xlabel: str = "step", *, columns: int = 1, height: float = HEIGHT) -> Figure:
    """Stacked panels with a shared x axis; with several ``columns``, each panel has its own."""
    figure, count = empty_figure(height), len(panels)
    shared, grid = columns == 1 and count > 1, columns > 1
    cells = figure.subplots(-(-count // columns), columns, sharex=shared, squeeze=False).ravel()
    for place, (axes, panel) in enumerate(zip(cells, panels, strict=False)):
        for curve, look in zip(panel.curves, itertools.cycle(LOOKS), strict=False):
            _draw(axes, curve, look)
        if panel.vline is not None:
            axes.axvline(panel.vline[0], color=VERMILION, linewidth=1.4, linestyle=":", label=panel.vline[1] or None)
        if panel.hline is not None:
            axes.axhline(panel.hline[0], color=MUTED, linewidth=1.2, linestyle=":", label=panel.hline[1] or None)
        _scale(axes, panel)
        last = place + columns >= count
        legend = panel.legend and not grid
        finish(axes, panel.ylabel, xlabel if last and not grid else "", bottom=panel.bottom, legend=legend)
        if xlabel == "step":
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        if panel.title:
            title = axes.set_title(panel.title, loc="right", fontsize=FONT_SIZE, color=INK, pad=2)
            title.set_parse_math(False)
    for axes in cells[count:]:
        axes.set_visible(False)
    if grid:
        figure.supxlabel(xlabel, color=MUTED, fontsize=FONT_SIZE)
        if cells[0].get_legend_handles_labels()[1]:
            handles, labels = cells[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=_legend_columns(labels), **_LEGEND)
    rows = max((_legend_rows(axes.get_legend_handles_labels()[1]) for axes in cells), default=0)
    figure.set_figheight(height + _LEGEND_ROW * max(0, rows - 2))
    return figure


def _legend_columns(labels: Sequence[str]) -> int:
    """As many as fit next to each other."""
    longest = max(map(len, labels), default=1)
    return max(1, min(4, int(WIDTH / (_LEGEND_HANDLE + _LEGEND_CHARACTER * longest))))


def _legend_rows(labels: Sequence[str]) -> int:
    return -(-len(labels) // _legend_columns(labels))


def _draw(axes: Axes, curve: Curve, default: tuple[str, str, str]) -> None:
    chosen = zip((curve.color, curve.style, curve.marker), default, strict=True)
    color, style, marker = (other if own is None else own for own, other in chosen)
    look: dict[str, Any] = {"color": color, "linestyle": style, "linewidth": 1.7}
    look["label"] = plain(ellipsis(curve.label, 32)) if curve.label else "_nolegend_"
    if curve.kind == "stairs":
        axes.stairs(np.asarray(curve.y), np.asarray(curve.x), **look)
        return
    look |= {"marker": marker, "markersize": 5.5 if marker == "." else 4.5, "alpha": curve.alpha}
    look["clip_on"] = not (marker and curve.kind == "line")  # draw markers at 0 or 100% whole
    if curve.kind == "steps":
        axes.step(curve.x, curve.y, where="post", **look)
    elif curve.low is None or curve.high is None:
        axes.plot(curve.x, curve.y, **look)
    elif curve.kind == "band":
        axes.plot(curve.x, curve.y, **look)
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    else:
        bars = error_bars(curve.y, curve.low, curve.high)
        axes.errorbar(curve.x, curve.y, bars, capsize=3, elinewidth=1.4, zorder=3, **look)


def _scale(axes: Axes, panel: Panel) -> None:
    if "x" in panel.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
    if "y" in panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    if panel.names:
        axes.set_xticks(range(len(panel.names)), list(panel.names))
        axes.set_xlim(-0.5, len(panel.names) - 0.5)
    if panel.y_format is not None:
        axes.yaxis.set_major_formatter(panel.y_format)
    if panel.x_format is not None:
        axes.xaxis.set_major_formatter(panel.x_format)


def finish(axes: Axes, ylabel: str, xlabel: str, *, bottom: float | None = None, legend: bool = True) -> None:
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0, labelsize=FONT_SIZE)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=FONT_SIZE, parse_math=False)
    axes.set_xlabel(xlabel, color=MUTED, fontsize=FONT_SIZE)
    if bottom is not None:
        axes.set_ylim(bottom=bottom if axes.get_yscale() == "linear" else None)
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    handles, labels = axes.get_legend_handles_labels()
    if legend and labels:
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.1}
        axes.legend(handles, labels, ncols=_legend_columns(labels), **place, **_LEGEND)


def forest(
    names: Sequence[str], measures: Sequence[tuple[str, Sequence[Estimate], float]], x_format: FuncFormatter
) -> tuple[Figure, Axes]:
    """Estimates with intervals, one row per name; measures: label, one estimate per name, vertical offset."""
    figure = empty_figure(1.1 + 0.55 * len(names))
    axes = figure.subplots()
    for (label, found, offset), (color, _, marker) in zip(measures, LOOKS, strict=False):
        means, rows = [each.mean for each in found], offset - np.arange(len(names))
        axes.plot(means, rows, color=color, marker=marker, linestyle="", markersize=5.5, zorder=3, label=plain(label))
        bars = error_bars(means, [each.low for each in found], [each.high for each in found])
        axes.errorbar(means, rows, xerr=bars, color=color, linestyle="", capsize=3, elinewidth=1.5, zorder=3)
    axes.xaxis.set_major_formatter(x_format)
    axes.set_yticks(-np.arange(len(names)), list(names), parse_math=False)
    axes.set_ylim(0.45 - len(names), 0.45)
    return figure, axes


def error_bars(values: ArrayLike, low: ArrayLike, high: ArrayLike) -> npt.NDArray[np.float64]:
    """Error bar lengths ``[2, N]``, down and up. NaN draws no bar; rounding never gives a negative length."""
    values_N, low_N, high_N = (np.asarray(ends, dtype=np.float64) for ends in (values, low, high))
    bars: npt.NDArray[np.float64] = np.fmax(np.stack([values_N - low_N, high_N - values_N]), 0)
    return bars


def plain(text: str) -> str:
    """Legend text without mathtext or a leading underscore, which would hide it."""
    return text.replace("$", r"\$").lstrip("_") or " "


def ellipsis(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def word_cloud(types: pd.DataFrame, *, highest: bool) -> Figure:
    """Types from ``token_types`` of highest or lowest mean entropy, the most extreme largest (paper: figure 2b, 2c)."""
    chosen = (types if highest else types.iloc[::-1]).head(CLOUD_WORDS)
    font = findfont("DejaVu Sans")
    known = FT2Font(font).get_charmap()
    weights: dict[str, float] = {}
    for place, text in enumerate(chosen["text"]):
        word = visible_token(text.strip() or text).strip() or "␣"
        drawable = "".join(char if ord(char) in known else f"⟨{ord(char):04X}⟩" for char in word)
        weights.setdefault(drawable, 1 - (1 - _SMALLEST_WORD) * place / max(len(chosen) - 1, 1))
    width, height = _CLOUD_PIXELS
    figure = Figure(figsize=(WIDTH, WIDTH * height / width))
    figure.patch.set_visible(False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    if not weights:
        return figure
    cloud = WordCloud(
        font_path=font, width=width, height=height, max_font_size=_LARGEST_WORD, prefer_horizontal=1.0,
        relative_scaling=1.0, random_state=1, margin=6,
    )  # fmt: skip
    cloud.generate_from_frequencies(weights)
    frame = [np.array([[0, 0], [width, height]])]
    for (word, weight), size, (top, left), _, _ in cloud.layout_:
        outline = TextPath((0, 0), word, size=size, prop=FontProperties(fname=font))
        ink = outline.get_extents()
        # The layout gives the ink's corner in pixels from the top; outlines have y upwards.
        corner = Affine2D().translate(-ink.x0, -ink.y1).scale(1, -1).translate(left, top)
        shape = corner.transform_path(outline)
        frame.append(np.asarray(shape.vertices))
        color = VERMILION if highest else BLUE
        axes.add_patch(PathPatch(shape, color=color, alpha=0.55 + 0.45 * weight, linewidth=0))
    (left, top), (right, bottom) = np.min(np.vstack(frame), axis=0) - 1, np.max(np.vstack(frame), axis=0) + 1
    axes.set(xlim=(left, right), ylim=(bottom, top))  # outlines are slightly wider than in the layout
    return figure


_THEME_VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", BLUE: "var(--blue)", VERMILION: "var(--vermilion)",
    GREEN: "var(--green)", PURPLE: "var(--purple)",
}  # fmt: skip
_NOT_FOR_PAGES = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element: ids prefixed with ``name``, colours as theme variables, text kept as text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "forkrl"}), warnings.catch_warnings():
        # Browser fonts have glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = _NOT_FOR_PAGES.sub("", buffer.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    # The page sets the size; the view box keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for color, variable in _THEME_VARIABLES.items():
        text = text.replace(color, variable)
    return visible(re.sub(r"\n\s*", "\n", text).strip())


def standalone_svg(figure: Figure) -> str:
    """The figure as an SVG file on white, the same bytes for the same figure."""
    buffer = io.StringIO()
    figure.patch.set_visible(True)
    with matplotlib.rc_context({"svg.hashsalt": "forkrl"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return buffer.getvalue()
