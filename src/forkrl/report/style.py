"""The look that all figures share.

Colours are those of Okabe and Ito, told apart by the colour-blind; line styles differ too, for print. Every colour is a
constant of this file, so that a page can map each to its own theme.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

INK, MUTED, GRID = "#22252b", "#6b7280", "#e3e5ea"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b0568c"
SIZE_INCHES = (5.2, 2.9)
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")


def panels(count: int, size_inches: tuple[float, float] = SIZE_INCHES) -> tuple[Figure, list[Axes]]:
    """An empty figure of ``count`` plots above one another that share their x axis."""
    figure = Figure(figsize=size_inches, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


def error_bars(values: ArrayLike, low: ArrayLike, high: ArrayLike) -> npt.NDArray[np.float64]:
    """What ``errorbar`` draws for intervals given by their ends: ``[2, N]`` lengths, downwards and upwards.

    A missing end (NaN) draws no bar; a value outside its own interval (rounding) gets no negative one.
    """
    values_N, low_N, high_N = (np.asarray(ends, dtype=np.float64) for ends in (values, low, high))
    bars: npt.NDArray[np.float64] = np.fmax(np.stack([values_N - low_N, high_N - values_N]), 0)
    return bars


def finish(
    axes: Axes,
    ylabel: str,
    *,
    bottom: float | None = None,
    xlabel: str = "step",
    last: bool = True,
    legend: bool = True,
) -> None:
    """Give axes the common look, once everything is drawn: no frame, a light grid, the legend above.

    Args:
        ylabel: with its unit.
        bottom: lower end of the y axis; None leaves it.
        xlabel: "step" also keeps the ticks whole.
        last: False for a plot that shares the x axis of one beneath it.
    """
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0, labelsize=9)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=9)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    if last:
        axes.set_xlabel(xlabel, color=MUTED, fontsize=9)
    if xlabel == "step":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    handles, labels = axes.get_legend_handles_labels()
    if legend and len(labels) > 0:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=4,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.3,
            borderaxespad=0.1,
        )
