"""The figures of drift over training (paper: table 1, figures 4 and 5), from the data frames of ``forkrl.analysis``."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from forkrl.report.sampling import evenly_spaced
from forkrl.report.style import BLUE, GREEN, MUTED, PERCENT, VERMILION, error_bars, finish, panels


def overlap_curves(overlap: pd.DataFrame, ratio: float) -> Figure:
    """Share of top positions in common with the first and with the last checkpoint, with 95% bars (table 1).

    Args:
        overlap: from ``forkrl.analysis.overlap_table``.
        ratio: the share of positions that counts as top.
    """
    figure, (axes,) = panels(1)
    place = np.arange(len(overlap))
    for column, label, color, style in (
        ("with_first", "with the first", BLUE, "-"),
        ("with_last", "with the last", VERMILION, "--"),
    ):
        value = overlap[column].to_numpy(float)
        bars = error_bars(value, overlap[f"{column}_low"], overlap[f"{column}_high"])
        axes.errorbar(
            place, value, bars, color=color, linestyle=style, marker="o", markersize=4, capsize=3, label=label
        )
    axes.yaxis.set_major_formatter(PERCENT)
    _name_places(axes, overlap["checkpoint"].tolist())
    finish(axes, f"top {100 * ratio:g}% in common", xlabel="checkpoint")
    axes.set_ylim(top=1.004)  # the marker at 100% whole, and no tick beyond it
    return figure


def change_by_percentile(change: pd.DataFrame) -> Figure:
    """Mean change of entropy in each percentile range of the first checkpoint's, with 95% bars (figure 4).

    Args:
        change: from ``forkrl.analysis.entropy_change_by_percentile``.
    """
    figure, (axes,) = panels(1)
    middle = (change["from_percentile"] + change["to_percentile"]) / 2
    width = float(change["to_percentile"].iloc[0] - change["from_percentile"].iloc[0])
    value = change["change"].to_numpy(float)
    colors = np.where(value >= 0, VERMILION, BLUE)
    axes.bar(middle, value, width=0.82 * width, color=colors, alpha=0.8)
    if "change_low" in change:
        bars = error_bars(value, change["change_low"], change["change_high"])
        axes.errorbar(middle, value, bars, fmt="none", ecolor=MUTED, elinewidth=1.2, capsize=2)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xlim(0, 100)
    finish(axes, "change (nats)", xlabel="percentile of the first checkpoint's entropy", legend=False)
    return figure


def percentile_curves(percentiles: pd.DataFrame) -> Figure:
    """Percentiles of entropy over the checkpoints (figure 5), high ones in light colours.

    Args:
        percentiles: from ``forkrl.analysis.percentile_table``.
    """
    figure, (axes,) = panels(1)
    columns = [column for column in percentiles if str(column).startswith("percentile_")]
    place = np.arange(len(percentiles))
    for column, color in zip(columns, _ramp(len(columns)), strict=True):
        values = percentiles[column].to_numpy(float)
        axes.plot(place, values, color=color, linewidth=1.5, marker="o", markersize=2.4)
    axes.plot(place, percentiles["mean"], color=GREEN, linewidth=1.8, linestyle=":", label="mean")
    _label_lines(axes, percentiles, columns)
    _name_places(axes, percentiles["checkpoint"].tolist())
    finish(axes, "entropy (nats)", bottom=0, xlabel="checkpoint")
    return figure


def _label_lines(axes: Axes, percentiles: pd.DataFrame, columns: Sequence[str]) -> None:
    """Name the lines at their right ends where there is room, the highest first."""
    last = percentiles.iloc[-1]
    room = max(float(percentiles[list(columns)].to_numpy().max()), 1e-9) / 14
    above = float("inf")
    for column in reversed(columns):
        if above - last[column] >= room:
            above = float(last[column])
            name = str(column).removeprefix("percentile_")
            axes.annotate(
                name, (len(percentiles) - 1, above), (5, 0), textcoords="offset points", va="center",
                fontsize=8, color=MUTED,
            )  # fmt: skip


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    """Name at most six of the places, evenly spaced, both ends among them."""
    shown = evenly_spaced(len(names), 6)
    axes.set_xticks(shown, [names[place] for place in shown])
    for label in axes.get_xticklabels():
        label.set_parse_math(False)


def _ramp(count: int) -> list[str]:
    """Colours from dark to light that stand out from a light and a dark ground."""
    places: npt.NDArray[np.float64] = np.linspace(0.25, 0.8, count)
    return [to_hex(matplotlib.colormaps["plasma"](place)) for place in places]
