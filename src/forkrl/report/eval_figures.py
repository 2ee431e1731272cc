"""The figures of an evaluation, as matplotlib Figures, from the benchmarks of ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from forkrl.report.style import BLUE, GREEN, INK, MUTED, PERCENT, PURPLE, VERMILION, error_bars, finish, panels

Benchmarks = Sequence[Mapping[str, Any]]
Floats = npt.NDArray[np.float64]
Paper = Mapping[str, Mapping[str, tuple[float, float]]]

LINES = (
    (BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"),
    (MUTED, "-", "v"), (INK, "--", "P"), (BLUE, ":", "X"), (VERMILION, "-", "<"),
)  # fmt: skip
SIZE_MARKERS = ("o", "s", "^", "D")
FEW_LINES = 3
"""Up to so many lines are drawn with their intervals; with more the table has them."""
TOKENS = FuncFormatter(lambda value, _: f"{value:,.0f}")


class Ends(NamedTuple):
    """An estimate for drawing: NaN where nothing is known."""

    mean: float
    low: float
    high: float


def ends(estimate: Mapping[str, float | None] | None) -> Ends:
    """An estimate of a JSON file, where null stands for NaN, or for an estimate that there is not."""
    given = estimate or {}
    values = (given.get(name) for name in Ends._fields)
    return Ends(*(math.nan if value is None else float(value) for value in values))


def accuracy_beside_paper(benchmarks: Benchmarks, paper: Paper) -> Figure:
    """Accuracy of each benchmark with its interval, and beneath it the paper's, hollow on all tokens, full on forks.

    Args:
        benchmarks: of ``results.json``.
        paper: by benchmark and model size, percent after training on all tokens and on forks.
    """
    figure, (axes,) = panels(1, (5.2, 1.1 + 0.55 * len(benchmarks)))
    places = -np.arange(len(benchmarks), dtype=float)
    found = [ends(each["accuracy"]) for each in benchmarks]
    means = [each.mean for each in found]
    axes.plot(means, places, color=BLUE, marker="o", linestyle="", markersize=6, zorder=3, label="this model")
    axes.errorbar(
        means, places, xerr=error_bars(means, [each.low for each in found], [each.high for each in found]),
        color=BLUE, linestyle="", capsize=3, elinewidth=1.6, zorder=3,
    )  # fmt: skip
    _mark_paper(axes, places, benchmarks, paper)
    axes.xaxis.set_major_formatter(PERCENT)
    finish(axes, "", xlabel="accuracy")
    axes.set_yticks(places, [each["title"] for each in benchmarks], parse_math=False)
    axes.set_ylim(places[-1] - 0.55, 0.4)
    axes.set_xlim(0, 1)
    return figure


def _mark_paper(axes: Axes, places: Floats, benchmarks: Benchmarks, paper: Paper) -> None:
    """The paper's figures under those of the model, a marker for each of its model sizes."""
    sizes = list(dict.fromkeys(size for each in benchmarks for size in paper.get(each["name"], {})))
    for size, marker in zip(sizes, SIZE_MARKERS, strict=False):
        rows = [
            (place - 0.3, paper[each["name"]][size])
            for place, each in zip(places, benchmarks, strict=True)
            if size in paper.get(each["name"], {})
        ]
        for index, (color, face, label) in enumerate(((MUTED, "none", None), (VERMILION, VERMILION, size))):
            axes.plot(
                [pair[index] / 100 for _, pair in rows], [place for place, _ in rows], color=color, marker=marker,
                linestyle="", markersize=4.5, markerfacecolor=face, label=label, clip_on=False,
            )  # fmt: skip


def pass_and_majority(benchmarks: Benchmarks) -> Figure:
    """pass@k, and beneath it maj@k of benchmarks whose verifier names answers, against k on a logarithmic scale."""
    voting = any(each["maj@k"] for each in benchmarks)
    figure, axes = panels(1 + voting, (5.2, 2.9 + 1.6 * voting))
    for name, panel in zip(("pass@k", "maj@k"), axes, strict=False):
        for index, each in enumerate(benchmarks):
            curve = each[name] or {}
            points = [(int(k), ends(estimate)) for k, estimate in curve.items()]
            _curve(panel, index, len(benchmarks), points, each["title"])
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(TOKENS)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(PERCENT)
        finish(panel, name, bottom=0, xlabel="k", last=panel is axes[-1], legend=panel is axes[0])
    return figure


def accuracy_against_budget(benchmarks: Benchmarks) -> Figure:
    """Accuracy if every longer response counted as wrong, against the budget in tokens, on a logarithmic scale."""
    figure, (axes,) = panels(1)
    for index, each in enumerate(benchmarks):
        points = [(row["tokens"], ends(row["accuracy"])) for row in each["budget"]]
        _curve(axes, index, len(benchmarks), points, each["title"], markers=False)
    log_tokens(axes)
    axes.yaxis.set_major_formatter(PERCENT)
    finish(axes, "accuracy", bottom=0, xlabel="tokens a response may take")
    return figure


def length_distributions(benchmarks: Benchmarks) -> Figure:
    """Share of right and of wrong responses by length, one plot a benchmark, each as high as its highest column."""
    figure, axes = panels(len(benchmarks), (5.2, 1.1 + 0.75 * len(benchmarks)))
    for each, panel in zip(benchmarks, axes, strict=True):
        lengths = each["lengths"]
        for name, color, style in (("right", GREEN, "-"), ("wrong", VERMILION, "--")):
            counts = np.asarray(lengths[name], dtype=np.float64)
            if counts.sum():
                share = counts / counts.sum()
                panel.stairs(share, lengths["edges"], color=color, linestyle=style, linewidth=1.6, label=name)
        panel.xaxis.set_major_formatter(TOKENS)
        finish(panel, "", bottom=0, xlabel="tokens", last=panel is axes[-1], legend=panel is axes[0])
        panel.set_yticks([])
        panel.text(
            1, 0.95, each["title"], transform=panel.transAxes, ha="right", va="top", fontsize=9, color=INK,
            parse_math=False,
        )  # fmt: skip
    return figure


def log_tokens(axes: Axes) -> None:
    """A logarithmic x axis of tokens, with numbers in full."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(TOKENS)
    axes.xaxis.set_minor_locator(NullLocator())


def _curve(
    axes: Axes, index: int, count: int, points: Sequence[tuple[float, Ends]], title: str, *, markers: bool = True
) -> None:
    """One line; with its intervals where there are few lines."""
    if not points:
        return
    color, style, marker = LINES[index % len(LINES)]
    x, estimates = [x for x, _ in points], [estimate for _, estimate in points]
    (line,) = axes.plot(
        x, [each.mean for each in estimates], color=color, linestyle=style, marker=marker if markers else "",
        markersize=3.5, linewidth=1.7,
    )  # fmt: skip
    line.set_label(plain(title))
    if count <= FEW_LINES:
        axes.fill_between(
            x, [each.low for each in estimates], [each.high for each in estimates], color=color, alpha=0.13, linewidth=0
        )


def plain(text: str) -> str:
    """Text as a legend takes it: no mathematics in it, and no leading underscore, which would hide it."""
    return text.replace("$", r"\$").lstrip("_") or " "
