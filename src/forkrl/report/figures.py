"""The figures of a run, as matplotlib Figures: they know nothing of HTML."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from forkrl.report.run_data import Floats, RunData, Series
from forkrl.report.style import (
    BLUE,
    GREEN,
    MUTED,
    PERCENT,
    PURPLE,
    SIZE_INCHES,
    VERMILION,
    error_bars,
    finish,
    panels,
)

FEW_POINTS = 40


class Line(NamedTuple):
    """How one metric is drawn."""

    metric: str
    label: str
    color: str
    style: str = "-"


def learning_curve(run: RunData) -> Figure:
    """Accuracy against step: training responses, and held-out problems with 95% intervals."""
    figure, (axes,) = panels(1)
    _draw_accuracy(axes, run, "")
    finish(axes, "accuracy", bottom=0)
    return figure


def accuracy_by_part(run: RunData) -> Figure:
    """The learning curve of each part of a mixed task, one above the other."""
    width, height = SIZE_INCHES
    figure, plots = panels(len(run.parts), (width, max(height, 1.3 * len(run.parts) + 0.6)))
    for number, (axes, part) in enumerate(zip(plots, run.parts, strict=True), start=1):
        _draw_accuracy(axes, run, f"/{part}")
        finish(axes, shortened(part), bottom=0, last=number == len(run.parts), legend=number == 1)
        axes.yaxis.label.set_parse_math(False)  # a part's name is no formula
    return figure


def levels(run: RunData) -> Figure:
    """The level of difficulty of each curriculum against step."""
    figure, (axes,) = panels(1)
    styles = itertools.cycle(itertools.product(("-", "--", ":"), (BLUE, VERMILION, GREEN, PURPLE)))
    for name, (style, color) in zip(run.level_names, styles, strict=False):
        series = run.series(name)
        label = shortened(name.removeprefix("task/level").strip("/")) or "level"
        axes.step(series.steps, series.values, where="post", color=color, linestyle=style, linewidth=1.7, label=label)
    finish(axes, "level", bottom=0)
    legend = axes.get_legend()
    for text in legend.get_texts() if legend is not None else ():
        text.set_parse_math(False)  # a part's name is no formula
    return figure


def shortened(name: str, limit: int = 22) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def entropy_curves(run: RunData) -> Figure:
    """Entropy against step: all tokens, selected and unselected ones, and the threshold between them."""
    figure, (axes,) = panels(1)
    lines = [
        Line("entropy/selected_mean", "selected", VERMILION),
        Line("entropy/threshold", "threshold", MUTED, ":"),
        Line("entropy/mean", "all", BLUE),
        Line("entropy/unselected_mean", "unselected", GREEN, "--"),
    ]
    _draw(axes, run, lines)
    finish(axes, "entropy (nats)", bottom=0)
    return figure


def kept_fraction(run: RunData) -> Figure:
    """Share of response tokens that carried gradient: of all, of good responses, of bad ones."""
    figure, (axes,) = panels(1)
    lines = [
        Line("selection/kept_fraction_positive", "advantage > 0", GREEN, "--"),
        Line("selection/kept_fraction_negative", "advantage < 0", PURPLE, ":"),
        Line("selection/kept_fraction", "all responses", BLUE),
    ]
    _draw(axes, run, lines)
    axes.yaxis.set_major_formatter(PERCENT)
    finish(axes, "tokens kept", bottom=0)
    return figure


def response_length(run: RunData) -> Figure:
    """Mean response length, and the fraction of responses cut at the limit."""
    figure, (above, below) = panels(2)
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
    finish(above, "tokens", bottom=0, last=False)
    finish(below, "cut at limit", bottom=0, legend=False)
    return figure


def gradient(run: RunData) -> Figure:
    """Gradient norm before clipping, and the fraction of trained tokens whose ratio was clipped."""
    figure, (above, below) = panels(2)
    _draw(above, run, [Line("grad/norm", "norm", BLUE)])
    limit = run.setting("optimizer.max_grad_norm")
    if isinstance(limit, int | float) and len(run.series("grad/norm")):
        above.axhline(limit, color=MUTED, linestyle=":", linewidth=1.2, label=f"clipped at {limit:g}")
    _draw(below, run, [Line("loss/clip_fraction", "clipped", VERMILION)])
    below.yaxis.set_major_formatter(PERCENT)
    finish(above, "gradient norm", bottom=0, last=False)
    finish(below, "ratio clipped", bottom=0, legend=False)
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
    figure, (axes,) = panels(1)
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
    finish(axes, "share of tokens (log)", xlabel="entropy (nats)")
    return figure


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


def _draw_accuracy(axes: Axes, run: RunData, part: str) -> None:
    """Training and held-out accuracy, of all prompts or, with "/PART", of those of one part."""
    _draw(axes, run, [Line(f"reward/accuracy{part}", "training responses", MUTED)])
    held_out = run.series(f"eval/accuracy{part}")
    if len(held_out):
        low = _aligned(run, held_out, f"eval/accuracy_low{part}")
        high = _aligned(run, held_out, f"eval/accuracy_high{part}")
        bars = error_bars(held_out.values, low, high)
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


def _aligned(run: RunData, series: Series, name: str) -> Floats:
    """``name`` at the steps of ``series``; NaN where it was not recorded."""
    return np.array([run.metrics[int(step)].get(name, np.nan) for step in series.steps], dtype=float)
