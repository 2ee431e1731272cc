"""The figures of a run, as matplotlib Figures: they know nothing of HTML.

Colours are those of Okabe and Ito, told apart by the colour-blind; line styles differ too, for print. Every colour is a
constant of this file, so that a page can map each to its own theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from forkrl.report.run_data import Floats, RunData, Series

INK, MUTED, GRID = "#22252b", "#6b7280", "#e3e5ea"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b0568c"
SIZE_INCHES = (5.2, 2.9)
FEW_POINTS = 40
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")


class Line(NamedTuple):
    """How one metric is drawn."""

    metric: str
    label: str
    color: str
    style: str = "-"


def learning_curve(run: RunData) -> Figure:
    """Accuracy against step: training responses, and held-out problems with 95% intervals."""
    figure, (axes,) = _panels(1)
    _draw(axes, run, [Line("reward/accuracy", "training responses", MUTED)])
    held_out = run.series("eval/accuracy")
    if len(held_out):
        low = _aligned(run, held_out, "eval/accuracy_low")
        high = _aligned(run, held_out, "eval/accuracy_high")
        # A missing end (NaN) draws no bar; a value outside its own interval (rounding) gets no negative bar.
        bars = np.fmax(np.stack([held_out.values - low, high - held_out.values]), 0)
        axes.errorbar(
            held_out.steps,
            held_out.values,
            bars,
            color=BLUE,
            marker="o",
            markersize=4.5,
            linewidth=1.8,
            capsize=3,
            elinewidth=1.4,
            label="held out, 95% interval",
            zorder=3,
        )
    axes.yaxis.set_major_formatter(PERCENT)
    _finish(axes, "accuracy", bottom=0)
    return figure


def entropy_curves(run: RunData) -> Figure:
    """Entropy against step: all tokens, selected and unselected ones, and the threshold between them."""
    figure, (axes,) = _panels(1)
    lines = [
        Line("entropy/selected_mean", "selected", VERMILION),
        Line("entropy/threshold", "threshold", MUTED, ":"),
        Line("entropy/mean", "all", BLUE),
        Line("entropy/unselected_mean", "unselected", GREEN, "--"),
    ]
    _draw(axes, run, lines)
    _finish(axes, "entropy (nats)", bottom=0)
    return figure


def kept_fraction(run: RunData) -> Figure:
    """Share of response tokens that carried gradient: of all, of good responses, of bad ones."""
    figure, (axes,) = _panels(1)
    lines = [
        Line("selection/kept_fraction_positive", "advantage > 0", GREEN, "--"),
        Line("selection/kept_fraction_negative", "advantage < 0", PURPLE, ":"),
        Line("selection/kept_fraction", "all responses", BLUE),
    ]
    _draw(axes, run, lines)
    axes.yaxis.set_major_formatter(PERCENT)
    _finish(axes, "tokens kept", bottom=0)
    return figure


def response_length(run: RunData) -> Figure:
    """Mean response length, and the fraction of responses cut at the limit."""
    figure, (above, below) = _panels(2)
    _draw(above, run, [Line("response/length", "training", BLUE), Line("eval/length", "held out", VERMILION, "--")])
    _draw(
        below,
        run,
        [
            Line("response/truncated_fraction", "training", BLUE),
            Line("eval/truncated_fraction", "held out", VERMILION, "--"),
        ],
    )
    below.yaxis.set_major_formatter(PERCENT)
    _finish(above, "tokens", bottom=0, last=False)
    _finish(below, "cut at limit", bottom=0, legend=False)
    return figure


def gradient(run: RunData) -> Figure:
    """Gradient norm before clipping, and the fraction of trained tokens whose ratio was clipped."""
    figure, (above, below) = _panels(2)
    _draw(above, run, [Line("grad/norm", "norm", BLUE)])
    limit = run.setting("optimizer.max_grad_norm")
    if isinstance(limit, int | float) and len(run.series("grad/norm")):
        above.axhline(limit, color=MUTED, linestyle=":", linewidth=1.2, label=f"clipped at {limit:g}")
    _draw(below, run, [Line("loss/clip_fraction", "clipped", VERMILION)])
    below.yaxis.set_major_formatter(PERCENT)
    _finish(above, "gradient norm", bottom=0, last=False)
    _finish(below, "ratio clipped", bottom=0, legend=False)
    return figure


def histogram_counts(samples: Sequence[Floats], bins: int = 60) -> tuple[Floats, list[Floats]]:
    """Bin edges common to all samples (nats), and the count of each bin for each sample.

    A tiny negative entropy is rounding, and counts as 0.
    """
    top = max((float(sample.max()) for sample in samples if len(sample)), default=1.0)
    edges = np.linspace(0.0, max(top, 0.1), bins + 1)
    return edges, [np.histogram(np.maximum(sample, 0.0), edges)[0].astype(np.float64) for sample in samples]


def entropy_histogram(samples: Sequence[Floats], labels: Sequence[str], threshold: float | None) -> Figure:
    """Share of tokens per entropy bin, log scale, one outline a sample, with the run's last threshold (paper: Fig. 2a).

    Args:
        samples: entropies in nats, ``[N]`` each; N may differ, so shares are drawn.
        labels: one name a sample.
        threshold: nats, or None to mark nothing.
    """
    figure, (axes,) = _panels(1)
    edges, counts = histogram_counts(samples)
    for count, label, color, style in zip(counts, labels, (MUTED, BLUE), ("--", "-"), strict=False):
        share = count / max(count.sum(), 1)
        axes.stairs(np.where(share > 0, share, np.nan), edges, color=color, linestyle=style, linewidth=1.6, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PERCENT)
    if threshold is not None:
        axes.axvline(threshold, color=VERMILION, linewidth=1.4, linestyle=":", label=f"threshold {threshold:.2f}")
    _finish(axes, "share of tokens (log)", xlabel="entropy (nats)")
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


def _draw(axes: Axes, run: RunData, lines: Sequence[Line]) -> None:
    for line in lines:
        series = run.series(line.metric)
        if len(series):
            marker = "o" if len(series) <= FEW_POINTS else ""
            axes.plot(
                series.steps,
                series.values,
                color=line.color,
                linestyle=line.style,
                linewidth=1.7,
                marker=marker,
                markersize=2.6,
                label=line.label,
            )


def _aligned(run: RunData, series: Series, name: str) -> Floats:
    """``name`` at the steps of ``series``; NaN where it was not recorded."""
    return np.array([run.metrics[int(step)].get(name, np.nan) for step in series.steps], dtype=float)


def _finish(
    axes: Axes,
    ylabel: str,
    *,
    bottom: float | None = None,
    xlabel: str = "step",
    last: bool = True,
    legend: bool = True,
) -> None:
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
