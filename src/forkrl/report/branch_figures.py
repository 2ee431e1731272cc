"""The figures of ``forkrl branch``, as matplotlib Figures. The tables are those of ``forkrl.analysis.branching``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forkrl.report.sampling import evenly_spaced
from forkrl.report.style import BLUE, GREEN, INK, MUTED, PERCENT, VERMILION, error_bars, finish, panels

MAX_POINTS = 2000
RATE_BINS = 10


class Kind(NamedTuple):
    """How one kind of position is drawn and called."""

    label: str
    color: str
    marker: str
    style: str


KINDS = {
    "fork": Kind("forks", VERMILION, "o", "-"),
    "random": Kind("random others", BLUE, "^", "--"),
    "low": Kind("low entropy", GREEN, "s", ":"),
}


def natural_against_entropy(spreads: pd.DataFrame, bins: pd.DataFrame) -> Figure:
    """Natural spread of each position against its entropy, and the mean of each bin of entropy with its interval.

    At most ``MAX_POINTS`` positions are drawn, evenly spaced. Single positions are noisy and may lie below 0.
    """
    figure, (axes,) = panels(1)
    shown = spreads.iloc[evenly_spaced(len(spreads), MAX_POINTS)]
    for name, kind in KINDS.items():
        points = shown[shown["kind"] == name]
        if len(points):
            axes.plot(
                points["entropy"], points["natural"], color=kind.color, marker=kind.marker, linestyle="",
                markersize=4, markeredgewidth=0, alpha=0.45, label=kind.label,
            )  # fmt: skip
    _interval_bars(axes, bins["entropy"].to_numpy(), bins, "natural", INK, "D", "mean, 95%")
    finish(axes, "variance it decides", xlabel="entropy (nats)")
    return figure


def spread_by_kind(kinds: pd.DataFrame) -> Figure:
    """Both spreads of each kind of position, means with intervals."""
    figure, (axes,) = panels(1)
    place = np.arange(len(kinds), dtype=float)
    for measure, offset, color, marker in (("natural", -0.1, BLUE, "o"), ("forced", 0.1, VERMILION, "s")):
        _interval_bars(axes, place + offset, kinds, measure, color, marker, f"{measure}, 95%")
    axes.set_xticks(place, [KINDS[kind].label for kind in kinds["kind"]])
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    finish(axes, "variance of success rates", xlabel="")
    return figure


def rate_histogram(branches: pd.DataFrame) -> pd.DataFrame:
    """Share of each kind's branches in each tenth of the success rate: columns from, to, and one for each kind."""
    edges = np.linspace(0, 1, RATE_BINS + 1)
    table = pd.DataFrame({"from": edges[:-1], "to": edges[1:]})
    for kind in (kind for kind in KINDS if (branches["kind"] == kind).any()):
        counts, _ = np.histogram(branches.loc[branches["kind"] == kind, "rate"], edges)
        table[kind] = counts / counts.sum()
    return table


def branch_rates(histogram: pd.DataFrame) -> Figure:
    """How the success rates of branches are distributed, for each kind of position."""
    figure, (axes,) = panels(1)
    edges = [*histogram["from"], 1.0]
    for name, kind in KINDS.items():
        if name in histogram:
            axes.stairs(histogram[name], edges, color=kind.color, linestyle=kind.style, linewidth=1.7, label=kind.label)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.xaxis.set_major_formatter(PERCENT)
    finish(axes, "share of branches", bottom=0, xlabel="success rate of the branch")
    return figure


def _interval_bars(
    axes: Axes, x: np.ndarray, table: pd.DataFrame, measure: str, color: str, marker: str, label: str
) -> None:
    mean = table[measure].to_numpy()
    ends = error_bars(mean, table[f"{measure}_low"], table[f"{measure}_high"])
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    axes.errorbar(
        x, mean, np.nan_to_num(ends), color=color, marker=marker, linestyle="", markersize=4.5,
        capsize=3, elinewidth=1.4, label=label, zorder=3,
    )  # fmt: skip
