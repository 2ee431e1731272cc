"""The figures of an analysis (paper: figure 2, and what it left out), from the data frames of ``forkrl.analysis``."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Affine2D
from wordcloud import WordCloud

from forkrl.report.style import BLUE, GREEN, MUTED, PERCENT, SIZE_INCHES, VERMILION, error_bars, finish, panels
from forkrl.report.visible_text import visible_token

CLOUD_WORDS = 100
_CLOUD_PIXELS = (1040, 480)
_LARGEST_WORD = 110  # pixels of these
_SMALLEST_WORD = 0.25  # of the largest: the hundredth must still be legible


def entropy_histogram(histogram: pd.DataFrame, threshold: float) -> Figure:
    """Tokens per entropy bin, log scale, with the entropy above which a token is a fork (figure 2a).

    Args:
        histogram: from ``forkrl.analysis.entropy_histogram``.
        threshold: nats.
    """
    figure, (axes,) = panels(1)
    edges = np.append(histogram["low"].to_numpy(), histogram["high"].iloc[-1])
    for column, label, color, style in (
        ("tokens", "all", BLUE, "-"),
        ("correct", "correct responses", GREEN, "--"),
        ("incorrect", "incorrect", MUTED, ":"),
    ):
        counts = histogram[column].to_numpy(float)
        if counts.any():
            shown = np.where(counts > 0, counts, np.nan)
            axes.stairs(shown, edges, color=color, linestyle=style, linewidth=1.6, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axvline(threshold, color=VERMILION, linewidth=1.4, linestyle=":", label=f"forks above {threshold:.2f}")
    finish(axes, "tokens (log)", xlabel="entropy (nats)")
    return figure


def word_cloud(types: pd.DataFrame, *, highest: bool) -> Figure:
    """The token types of highest (or lowest) mean entropy, the most extreme one largest (figure 2b, 2c).

    Args:
        types: from ``forkrl.analysis.token_types``, highest first; the first (or last) ``CLOUD_WORDS`` are drawn.
        highest: which end.
    """
    chosen = (types if highest else types.iloc[::-1]).head(CLOUD_WORDS)
    weights: dict[str, float] = {}
    for place, text in enumerate(chosen["text"]):
        word = visible_token(text.strip() or text).strip() or "␣"
        weights.setdefault(word, 1 - (1 - _SMALLEST_WORD) * place / max(len(chosen) - 1, 1))
    width, height = _CLOUD_PIXELS
    figure = Figure(figsize=(SIZE_INCHES[0], SIZE_INCHES[0] * height / width))
    figure.patch.set_visible(False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    if not weights:
        return figure
    font = findfont("DejaVu Sans")
    cloud = WordCloud(
        font_path=font,
        width=width,
        height=height,
        max_font_size=_LARGEST_WORD,
        prefer_horizontal=1.0,
        relative_scaling=1.0,
        random_state=1,
        margin=6,
    )
    cloud.generate_from_frequencies({_drawable(word, font): weight for word, weight in weights.items()})
    for (word, weight), size, (top, left), _, _ in cloud.layout_:
        outline = TextPath((0, 0), word, size=size, prop=FontProperties(fname=font))
        ink = outline.get_extents()
        # The layout gives the corner of the ink, in pixels from above; outlines are drawn upwards.
        corner = Affine2D().translate(-ink.x0, -ink.y1).scale(1, -1).translate(left, top)
        color = VERMILION if highest else BLUE
        axes.add_patch(PathPatch(corner.transform_path(outline), color=color, alpha=0.55 + 0.45 * weight, linewidth=0))
    return figure


def _drawable(word: str, font: str) -> str:
    """The word with the code points in place of characters that the font lacks."""
    known = FT2Font(font).get_charmap()
    return "".join(char if ord(char) in known else f"⟨{ord(char):04X}⟩" for char in word)


def fork_positions(positions: pd.DataFrame) -> Figure:
    """Share of forks, and mean entropy, along the response, with 95% bands.

    Args:
        positions: from ``forkrl.analysis.fork_positions``.
    """
    figure, (above, below) = panels(2)
    middle = (positions["low"] + positions["high"]) / 2
    for axes, column, color in ((above, "fork_share", VERMILION), (below, "mean_entropy", BLUE)):
        axes.fill_between(
            middle, positions[f"{column}_low"], positions[f"{column}_high"], color=color, alpha=0.18, linewidth=0
        )
        axes.plot(middle, positions[column], color=color, linewidth=1.7, marker="o", markersize=2.6)
    above.yaxis.set_major_formatter(PERCENT)
    below.xaxis.set_major_formatter(PERCENT)
    finish(above, "forks", bottom=0, last=False, legend=False)
    finish(below, "entropy (nats)", bottom=0, xlabel="position in the response", legend=False)
    return figure


def correct_against_incorrect(correctness: pd.DataFrame) -> Figure:
    """Mean entropy and share of forks of correct and incorrect responses, with 95% intervals.

    Args:
        correctness: from ``forkrl.analysis.correct_against_incorrect``, not empty.
    """
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    figure.patch.set_visible(False)
    left, right = figure.subplots(1, 2)
    rows = correctness.iloc[:2]
    for axes, column, label in ((left, "mean_entropy", "mean entropy (nats)"), (right, "fork_share", "forks")):
        for place, color in ((0, GREEN), (1, MUTED)):
            _interval(axes, place, rows.iloc[place], column, color)
        axes.set_xticks([0, 1], ["correct", "incorrect"])
        axes.set_xlim(-0.6, 1.6)
        axes.margins(y=0.25)
        finish(axes, label, xlabel="", legend=False)
    right.yaxis.set_major_formatter(PERCENT)
    return figure


def density_against_correctness(density: pd.DataFrame) -> Figure:
    """Accuracy of responses with few forks and with many, equal parts, with 95% intervals.

    Args:
        density: from ``forkrl.analysis.density_against_correctness``, not empty.
    """
    figure, (axes,) = panels(1)
    for place, row in density.iterrows():
        _interval(axes, int(place), row, "accuracy", BLUE)
    names = [f"{100 * low:.1f}–{100 * high:.1f}%" for low, high in zip(density["low"], density["high"], strict=True)]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.yaxis.set_major_formatter(PERCENT)
    finish(axes, "correct", bottom=0, xlabel="forks among the tokens of a response", legend=False)
    return figure


def _interval(axes: Axes, place: float, row: pd.Series, column: str, color: str) -> None:
    """A point with its interval."""
    bars = error_bars([row[column]], [row[f"{column}_low"]], [row[f"{column}_high"]])
    axes.errorbar([place], [row[column]], bars, color=color, marker="o", markersize=5, capsize=3, elinewidth=1.4)
