"""Accuracy, length and broken outputs against the temperature at forks and elsewhere (arXiv 2506.01939, Fig. 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forkrl.report.style import BLUE, MUTED, PERCENT, VERMILION, error_bars, finish, panels

_SWEEPS = (
    ("high", "low", "at forks (1 elsewhere)", VERMILION, "-", "o"),
    ("low", "high", "elsewhere (1 at forks)", BLUE, "--", "s"),
)
_ASIDE = 0.06
"""The two sweeps stand this far to the left and right of their temperature, so that neither bar hides the other."""


def accuracy_against_temperature(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 3: accuracy with 95% intervals, one line where forks get the temperature, one elsewhere.

    Temperatures stand at even distances, so that 0 and 0.05 can be told apart.

    Args:
        table: as ``forkrl.analysis.temperature_table`` gives it.
    """
    figure, (axes,) = panels(1)
    _draw(axes, table, "accuracy")
    axes.yaxis.set_major_formatter(PERCENT)
    finish(axes, "accuracy", bottom=0, xlabel="temperature")
    return figure


def length_and_broken(table: pd.DataFrame) -> Figure:
    """Below it: mean length, and the share of broken outputs, with 95% intervals."""
    figure, (above, below) = panels(2)
    _draw(above, table, "length")
    _draw(below, table, "broken")
    below.yaxis.set_major_formatter(PERCENT)
    finish(above, "tokens", bottom=0, xlabel="temperature", last=False)
    finish(below, "broken", bottom=0, xlabel="temperature", legend=False)
    return figure


def surprise_against_temperature(table: pd.DataFrame) -> Figure:
    """How unlikely the unscaled model finds what was written, nats per token."""
    figure, (axes,) = panels(1)
    _draw(axes, table, "surprise")
    finish(axes, "nats per token", bottom=0, xlabel="temperature")
    return figure


def sweep_rows(table: pd.DataFrame, varied: str) -> pd.DataFrame:
    """The settings in which ``varied`` ("high" or "low") takes every temperature and the other is 1, by temperature."""
    fixed = {"high": "low", "low": "high"}[varied]
    return table[table[fixed] == 1].sort_values(varied)


def _draw(axes: Axes, table: pd.DataFrame, name: str) -> None:
    """Both sweeps of one quantity; the unscaled model is where they meet."""
    temperatures = sorted({*table["high"], *table["low"]})
    for (varied, _, label, color, style, marker), side in zip(_SWEEPS, (-_ASIDE, _ASIDE), strict=True):
        rows = sweep_rows(table, varied)
        places = np.array([temperatures.index(value) for value in rows[varied]], dtype=float)
        values, low, high = (rows[column].to_numpy(float) for column in (name, f"{name}_low", f"{name}_high"))
        bars = error_bars(values, low, high)
        axes.errorbar(
            places + side,
            values,
            bars,
            color=color,
            linestyle=style,
            marker=marker,
            markersize=4.5,
            linewidth=1.7,
            capsize=3,
            elinewidth=1.3,
            label=label,
            clip_on=False,  # a share of 0 stands on the edge
        )
    if 1 in temperatures:
        axes.axvline(temperatures.index(1), color=MUTED, linewidth=0.9, linestyle=":", zorder=0)
    axes.set_xticks(range(len(temperatures)), [f"{value:g}" for value in temperatures])
