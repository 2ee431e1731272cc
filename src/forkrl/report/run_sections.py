"""The figures of a training run's page, with the numbers behind each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from forkrl.report import figures
from forkrl.report.run_data import RunData
from forkrl.report.sections import FigureSection, figure_section

PAPER_LOW_ENTROPY = 0.01  # nats; the paper finds 50.64% of tokens below it (Qwen3-8B, section 3)


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
        "Training accuracy is that of the sampled responses of each step; held-out problems are the same each time, "
        "unless a note on this page says that evaluations changed.",
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
    learning, entropy, *others = [_curve_section(run, curve) for curve in _CURVES]
    parts = [_curve_section(run, curve) for curve in _part_curves(run)]
    return [learning, *parts, entropy, _histogram_section(run), *others]


def _part_curves(run: RunData) -> list[_Curve]:
    """What a mixed task, and one with a curriculum, have besides."""
    curves = []
    if run.parts:
        areas = ("reward/accuracy", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")
        curves.append(
            _Curve(
                "parts",
                "Accuracy by part",
                "The same for each part of the mixed task; held-out accuracy with a 95% interval clustered by problem.",
                tuple(f"{area}/{part}" for part in run.parts for area in areas),
                figures.accuracy_by_part,
            )
        )
    if run.level_names:
        curves.append(
            _Curve(
                "levels",
                "Level of difficulty",
                "Where each curriculum stood after the step.",
                tuple(run.level_names),
                figures.levels,
            )
        )
    return curves


def _curve_section(run: RunData, curve: _Curve) -> FigureSection:
    missing = tuple(name for name in curve.metrics if not len(run.series(name)))
    present = [name for name in curve.metrics if name not in missing]
    rows = {step: row for step, row in run.metrics.items() if any(name in row for name in present)}
    columns = {name: [row.get(name) for row in rows.values()] for name in present}
    table = pd.DataFrame({"step": list(rows), **columns})
    figure = curve.draw(run) if present else None
    return figure_section(curve.title, curve.caption, figure, table, curve.name, missing)


def _histogram_section(run: RunData) -> FigureSection:
    samples = list(run.evals) or list(run.train[-1:])
    kept = [(f"step {sample.step}", entropy) for sample in samples if len(entropy := sample.entropy)]
    title = "Entropy histogram"
    if not kept:
        return figure_section(title, "", None, pd.DataFrame(), "histogram", ("rollouts/*.parquet",))
    labels, entropies = [label for label, _ in kept], [entropy for _, entropy in kept]
    threshold = run.series("entropy/threshold")
    last = float(threshold.values[-1]) if len(threshold) else None
    source = "held-out responses" if run.evals else "training responses"
    facts = "; ".join(
        f"{label}: {len(entropy):,} tokens, {np.mean(entropy < PAPER_LOW_ENTROPY):.1%} below {PAPER_LOW_ENTROPY} nats, "
        f"80th percentile {np.percentile(entropy, 80):.3f} nats"
        for label, entropy in kept
    )
    edges, counts = figures.histogram_counts(entropies)
    low, high = zip(*pairwise(edges), strict=True)
    columns = {f"tokens, {label}": count.astype(int) for label, count in zip(labels, counts, strict=True)}
    table = pd.DataFrame({"from (nats)": low, "to (nats)": high, **columns})
    temperature = run.settings.get("eval" if run.evals else "rollout", {}).get("temperature")
    measured = "" if temperature is None else f", entropies at temperature {temperature or 1:g}"
    figure = figures.entropy_histogram(entropies, labels, last)
    missing = () if len(threshold) else ("entropy/threshold",)
    return figure_section(title, f"All written {source}{measured}. {facts}.", figure, table, "histogram", missing)
