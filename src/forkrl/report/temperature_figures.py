"""Accuracy, length and broken outputs against the temperature at forks and elsewhere (arXiv 2506.01939, Fig. 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forkrl.report.style import BLUE, MUTED, PERCENT, VERMILION, error_bars, finish, panels

_SWEEPS = (
    ("high", "at forks ({:g} elsewhere)", VERMILION, "-", "o"),
    ("low", "elsewhere ({:g} at forks)", BLUE, "--", "s"),
)
_ASIDE = 0.06
"""The two sweeps stand this far to the left and right of their temperature, so that neither bar hides the other."""


def accuracy_against_temperature(table: pd.DataFrame, base: float = 1.0) -> Figure:
    """The paper's Fig. 3: accuracy with 95% intervals, one line where forks get the temperature, one elsewhere.

    Temperatures stand at even distances, so that 0 and 0.05 can be told apart.

    Args:
        table: as ``forkrl.analysis.temperature_table`` gives it.
        base: the temperature that the rest stays at.
    """
    figure, (axes,) = panels(1)
    _draw(axes, table, "accuracy", base)
    axes.yaxis.set_major_formatter(PERCENT)
    finish(axes, "accuracy", bottom=0, xlabel="temperature")
    return figure


def length_and_broken(table: pd.DataFrame, base: float = 1.0) -> Figure:
    """Below it: mean length, and the share of broken outputs, with 95% intervals."""
    figure, (above, below) = panels(2)
    _draw(above, table, "length", base)
    _draw(below, table, "broken", base)
    below.yaxis.set_major_formatter(PERCENT)
    finish(above, "tokens", bottom=0, xlabel="temperature", last=False)
    finish(below, "broken", bottom=0, xlabel="temperature", legend=False)
    return figure


def surprise_against_temperature(table: pd.DataFrame, base: float = 1.0) -> Figure:
    """How unlikely the unscaled model finds what was written, nats per token."""
    figure, (axes,) = panels(1)
    _draw(axes, table, "surprise", base)
    finish(axes, "nats per token", bottom=0, xlabel="temperature")
    return figure


def sweep_rows(table: pd.DataFrame, varied: str, base: float = 1.0) -> pd.DataFrame:
    """The settings in which ``varied`` ("high" or "low") takes every temperature and the other is ``base``, sorted."""
    fixed = {"high": "low", "low": "high"}[varied]
    return table[table[fixed] == base].sort_values(varied)


def _draw(axes: Axes, table: pd.DataFrame, name: str, base: float) -> None:
    """Both sweeps of one quantity; they meet at the baseline."""
    temperatures = sorted({*table["high"], *table["low"]})
    for (varied, label, color, style, marker), side in zip(_SWEEPS, (-_ASIDE, _ASIDE), strict=True):
        rows = sweep_rows(table, varied, base)
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
            label=label.format(base),
            clip_on=False,  # a share of 0 stands on the edge
        )
    if base in temperatures:
        axes.axvline(temperatures.index(base), color=MUTED, linewidth=0.9, linestyle=":", zorder=0)
    axes.set_xticks(range(len(temperatures)), [f"{value:g}" for value in temperatures])
