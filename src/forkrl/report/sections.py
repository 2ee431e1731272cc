"""The figures of the page with the numbers behind each."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from forkrl.report import figures
from forkrl.report.run_data import RunData, evenly_spaced
from forkrl.report.svg import inline_svg

MAX_TABLE_ROWS = 200
PAPER_LOW_ENTROPY = 0.01  # nats; the paper finds 50.64% of tokens below it (Qwen3-8B, section 3)

Cell = float | int | str | None


@dataclass(frozen=True, slots=True)
class FigureSection:
    """A titled figure, one plain sentence about it, and its table. ``svg`` is empty when there was nothing to draw."""

    title: str
    caption: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_rows: int
    csv_name: str
    csv_uri: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Curve:
    name: str
    title: str
    caption: str
    metrics: tuple[str, ...]
    draw: Callable[[RunData], Figure]


_CURVES = (
    _Curve(
        "learning",
        "Learning curve",
        "Training accuracy is that of the sampled responses of each step; held-out problems are the same each time.",
        ("reward/accuracy", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"),
        figures.learning_curve,
    ),
    _Curve(
        "entropy",
        "Entropy",
        "Mean entropy of the tokens that carried gradient, of the others, and of all; and the threshold between them.",
        ("entropy/mean", "entropy/selected_mean", "entropy/unselected_mean", "entropy/threshold"),
        figures.entropy_curves,
    ),
    _Curve(
        "kept",
        "Tokens kept",
        "What the run really did: the fraction of response tokens that carried gradient, by the sign of the advantage.",
        ("selection/kept_fraction", "selection/kept_fraction_positive", "selection/kept_fraction_negative"),
        figures.kept_fraction,
    ),
    _Curve(
        "length",
        "Response length",
        "Mean tokens per response, and the fraction that ran into the limit without a stop token.",
        ("response/length", "response/truncated_fraction", "eval/length", "eval/truncated_fraction"),
        figures.response_length,
    ),
    _Curve(
        "gradient",
        "Gradient and clipping",
        "Gradient norm before clipping, and the fraction of trained tokens whose probability ratio was clipped.",
        ("grad/norm", "loss/clip_fraction"),
        figures.gradient,
    ),
)


def figure_sections(run: RunData) -> list[FigureSection]:
    """Every figure of the page, in reading order."""
    curves = [_curve_section(run, curve) for curve in _CURVES]
    return [*curves[:2], _histogram_section(run), *curves[2:]]


def _curve_section(run: RunData, curve: _Curve) -> FigureSection:
    missing = tuple(name for name in curve.metrics if not len(run.series(name)))
    present = [name for name in curve.metrics if name not in missing]
    rows: list[list[Cell]] = [
        [step, *(row.get(name) for name in present)]
        for step, row in run.metrics.items()
        if any(name in row for name in present)
    ]
    svg = inline_svg(curve.draw(run), curve.name) if present else ""
    return _section(curve.title, curve.caption, svg, ["step", *present], rows, curve.name, missing)


def _histogram_section(run: RunData) -> FigureSection:
    samples = list(run.evals) or list(run.train[-1:])
    entropies = [sample.entropy for sample in samples]
    kept = [(sample, entropy) for sample, entropy in zip(samples, entropies, strict=True) if len(entropy)]
    title = "Entropy histogram"
    if not kept:
        return _section(title, "", "", [], [], "histogram", ("rollouts/*.parquet",))
    labels = [f"step {sample.step}" for sample, _ in kept]
    threshold = run.series("entropy/threshold")
    last = float(threshold.values[-1]) if len(threshold) else None
    source = "held-out responses" if run.evals else "training responses"
    facts = "; ".join(
        f"{label}: {len(entropy):,} tokens, {np.mean(entropy < PAPER_LOW_ENTROPY):.1%} below {PAPER_LOW_ENTROPY} nats, "
        f"80th percentile {np.percentile(entropy, 80):.3f} nats"
        for label, (_, entropy) in zip(labels, kept, strict=True)
    )
    edges, counts = figures.histogram_counts([entropy for _, entropy in kept])
    rows: list[list[Cell]] = [
        [float(low), float(high), *(int(count[i]) for count in counts)] for i, (low, high) in enumerate(pairwise(edges))
    ]
    figure = figures.entropy_histogram([entropy for _, entropy in kept], labels, last)
    missing = () if len(threshold) else ("entropy/threshold",)
    columns = ["from (nats)", "to (nats)", *(f"tokens, {label}" for label in labels)]
    return _section(
        title, f"All written {source}. {facts}.", inline_svg(figure, "histogram"), columns, rows, "histogram", missing
    )


def _section(
    title: str,
    caption: str,
    svg: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    name: str,
    missing: tuple[str, ...],
) -> FigureSection:
    shown = [rows[i] for i in evenly_spaced(len(rows), MAX_TABLE_ROWS)]
    return FigureSection(
        title=title,
        caption=caption,
        svg=svg,
        columns=tuple(columns),
        rows=tuple(tuple(_cell(value) for value in row) for row in shown),
        num_rows=len(rows),
        csv_name=f"{name}.csv",
        csv_uri=_csv_uri(columns, rows),
        missing=missing,
    )


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv_uri(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return "data:text/csv;base64," + base64.b64encode(buffer.getvalue().encode()).decode()
