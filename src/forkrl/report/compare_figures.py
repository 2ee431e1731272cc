"""The figures of ``forkrl compare``, as matplotlib Figures, from ``comparison.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from forkrl.report.eval_figures import Ends, ends, log_tokens
from forkrl.report.style import BLUE, GRID, INK, MUTED, PERCENT, VERMILION, error_bars, finish, panels

Rows = Sequence[Mapping[str, Any]]
POINTS = FuncFormatter(lambda value, _: f"{100 * value:+.3g}" if value else "0")
_SIDES = (("a", "A", BLUE, "--"), ("b", "B", VERMILION, "-"))


def difference_forest(benchmarks: Rows, pooled: Mapping[str, Any] | None) -> Figure:
    """The paired difference of accuracy of every benchmark and of their mean, as it is and at equal spending."""
    rows = [(each["title"], each) for each in benchmarks]
    if pooled is not None:
        rows.append(("mean", pooled))
    figure, (axes,) = panels(1, (5.2, 1.1 + 0.5 * len(rows)))
    places = -np.arange(len(rows), dtype=float)
    measures = (
        ("accuracy", "as they are", BLUE, "o", 0.12),
        ("length_matched", "at equal spending", VERMILION, "s", -0.12),
    )
    for measure, label, color, marker, aside in measures:
        found = [ends(row[measure]["difference"]) for _, row in rows]
        means = [each.mean for each in found]
        axes.plot(means, places + aside, color=color, marker=marker, linestyle="", markersize=5, label=label, zorder=3)
        axes.errorbar(
            means, places + aside, color=color, linestyle="", capsize=3, elinewidth=1.5, zorder=3,
            xerr=error_bars(means, [each.low for each in found], [each.high for each in found]),
        )  # fmt: skip
    axes.axvline(0, color=MUTED, linewidth=1)
    if pooled is not None:
        axes.axhline(places[-1] + 0.5, color=GRID, linewidth=1)
    axes.xaxis.set_major_formatter(POINTS)
    finish(axes, "", xlabel="accuracy of B minus A, points")
    axes.set_yticks(places, [title for title, _ in rows], parse_math=False)
    axes.set_ylim(places[-1] - 0.5, 0.5)
    return figure


def budget_curves(benchmarks: Rows) -> Figure:
    """Accuracy of both against the budget of tokens, with 95% bands, one plot a benchmark."""

    def draw(axes: Axes, row: Mapping[str, Any]) -> None:
        tokens = [each["tokens"] for each in row["budget"]]
        for side, label, color, style in _SIDES:
            _line(axes, tokens, [ends(each[side]) for each in row["budget"]], label, color, style)
        log_tokens(axes)

    return _one_plot_each(benchmarks, draw, "tokens a response may take")


def spending_curves(benchmarks: Rows) -> Figure:
    """Accuracy of both against the mean of the tokens spent, up to the smaller mean length, one plot a benchmark."""

    def draw(axes: Axes, row: Mapping[str, Any]) -> None:
        spent = [each["spent"] for each in row["equal_spending"]]
        for side, label, color, style in _SIDES:
            values = [float(each[side]) for each in row["equal_spending"]]
            axes.plot(spent, values, color=color, linestyle=style, linewidth=1.7, label=label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

    return _one_plot_each(benchmarks, draw, "mean tokens spent on a response")


def _one_plot_each(benchmarks: Rows, draw: Callable[[Axes, Mapping[str, Any]], None], xlabel: str) -> Figure:
    """Two columns of small plots, each with an axis of its own."""
    columns = 1 if len(benchmarks) == 1 else 2
    height = -(-len(benchmarks) // columns)
    figure = Figure(figsize=(5.2, 1.0 + (1.9 if columns == 1 else 1.55) * height), layout="constrained")
    figure.patch.set_visible(False)
    cells = figure.subplots(height, columns, squeeze=False).ravel()
    for index, (axes, row) in enumerate(zip(cells, benchmarks, strict=False)):
        draw(axes, row)
        axes.yaxis.set_major_formatter(PERCENT)
        finish(axes, "accuracy" if index % columns == 0 else "", bottom=0, xlabel=xlabel, legend=index == 0)
        if index < len(benchmarks) - columns:
            axes.set_xlabel("")
        axes.tick_params(labelsize=8)
        axes.text(
            0.02,
            0.97,
            row["title"],
            transform=axes.transAxes,
            ha="left",
            va="top",
            fontsize=9,
            color=INK,
            parse_math=False,
        )
    for axes in cells[len(benchmarks) :]:
        axes.set_visible(False)
    return figure


def _line(axes: Axes, x: Sequence[float], estimates: Sequence[Ends], label: str, color: str, style: str) -> None:
    axes.plot(x, [each.mean for each in estimates], color=color, linestyle=style, linewidth=1.7, label=label)
    axes.fill_between(
        x, [each.low for each in estimates], [each.high for each in estimates], color=color, alpha=0.13, linewidth=0
    )
