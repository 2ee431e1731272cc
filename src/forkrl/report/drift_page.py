"""The page of ``forkrl drift``: how training changed entropy (paper: table 1, figures 4 and 5)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from forkrl.report.fork_view import ForkView, Frame, ShownPrompt, View, describe_choice
from forkrl.report.formatting import interval_of, percent
from forkrl.report.page import Card, Page, Section, about, interval_card
from forkrl.report.plots import (
    BLUE,
    FONT_SIZE,
    GREEN,
    MUTED,
    PERCENT,
    VERMILION,
    Curve,
    Panel,
    column_curve,
    ellipsis,
    empty_figure,
    error_bars,
    finish,
    plot,
)
from forkrl.store.results import Results

FORK_PERCENTILE = 80
_STEP = re.compile(r"step (\d+)")


def drift_page(results: Results, shown: Sequence[ShownPrompt], layers: Sequence[str]) -> Page:
    """``shown``: prompts with an entropy per layer; ``layers``: checkpoint names for the fork view's layer switch."""
    facts, percentiles = results.facts, results.tables["percentiles"]
    top = percentiles[f"percentile_{FORK_PERCENTILE}"]
    means, mark = percentiles["mean"], float(top.iloc[0])
    choice = describe_choice(len(shown), facts["prompts"])
    return Page(
        **about(results),
        kind="drift",
        sections=_sections(facts, results.tables),
        cards=[
            interval_card(
                "Overlap", interval_of(facts, "overlap"), "top positions of the last checkpoint and the first"
            ),
            Card("Mean entropy", f"{means.iloc[-1]:.3g}", f"{means.iloc[0]:.3g}", "nats, first and last checkpoint"),
            Card("80th percentile", f"{top.iloc[-1]:.3g}", f"{top.iloc[0]:.3g}", "nats"),
            Card("Tokens", f"{facts['tokens']:,}", note=f"{facts['prompts']:,} prompts, {len(means)} checkpoints"),
        ],
        forks=ForkView(
            [View("Responses of the last", choice, [Frame("", shown)], layers)],
            "The same tokens under every checkpoint: switch between them to see where the model grew more or less "
            f"certain. The keys visit tokens above {mark:.3g} nats, the 80th percentile of the first checkpoint.",
            mark,
        ),
        sections_title="How entropy moved",
        source="the drift folder's tokens/, responses/ and entropies/",
    )


def drift_headline(facts: Mapping[str, Any], change: pd.DataFrame) -> str:
    size, names = change["change"].abs(), facts["checkpoints"]
    top_share = size.iloc[-max(len(size) // 5, 1) :].sum() / max(size.sum(), 1e-12)
    return (
        f"At temperature {facts['temperature']:g}, from {names[0]} to {names[-1]}, "
        f"{percent(interval_of(facts, 'overlap'))} of the top {100 * facts['ratio']:g}% of positions stayed there (the "
        f"paper's 14B: 86.7%), and {top_share:.0%} of the change of entropy lies in the fifth of the tokens that had "
        "the most."
    )


def _sections(facts: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    overlap, change, percentiles = tables["overlap"], tables["change"], tables["percentiles"]
    noise, names = float((change["change_high"] - change["change_low"]).mean() / 2), facts["checkpoints"]
    return [
        Section(
            "Overlap of the top positions",
            f"Share of the top {100 * facts['ratio']:g}% of positions by entropy in common with the first and with the "
            "last checkpoint, with 95% intervals clustered by prompt (the paper's table 1).",
            "overlap",
            overlap,
            overlap_curves(overlap, facts["ratio"]),
            printed=overlap,
        ),
        Section(
            "Change by percentile",
            f"Mean change of entropy from {names[0]} to {names[-1]} in each percentile range of the first's "
            f"(figure 4); bars are 95% intervals, ±{noise:.2g} nats on average. What ranks high by chance tends to "
            "fall.",
            "change",
            change,
            change_by_percentile(change),
            printed=change[["from_percentile", "to_percentile", "change", "change_low", "change_high"]],
        ),
        Section(
            "Percentiles over training",
            "Percentiles of the entropy of the same tokens under each checkpoint (figure 5).",
            "percentiles",
            percentiles,
            percentile_curves(percentiles),
        ),
    ]


def overlap_curves(overlap: pd.DataFrame, ratio: float) -> Figure:
    """Top positions (share ``ratio``) in common with the first and last checkpoint, with 95% bars (table 1)."""
    places, xlabel = _places(overlap["checkpoint"])
    curves = [
        column_curve(overlap, places, "with_first", "with the first", marker="o"),
        column_curve(overlap, places, "with_last", "with the last", marker="o"),
    ]
    figure = plot([Panel(f"top {100 * ratio:g}% in common", curves, PERCENT, bottom=None)], xlabel)
    (axes,) = figure.axes
    lowest = float(np.nanmin(overlap[["with_first", "with_last", "with_first_low", "with_last_low"]].to_numpy(float)))
    bottom = max(0.0, math.floor(min(lowest, 0.95) * 20) / 20)  # whole multiples of 5, 2 or 1%
    axes.set_ylim(bottom, 1 + 0.02 * (1 - bottom))
    axes.yaxis.set_major_locator(
        MultipleLocator(next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if 1 - bottom <= 5.01 * s))
    )
    _name_places(axes, overlap["checkpoint"], places)
    return figure


def change_by_percentile(change: pd.DataFrame) -> Figure:
    """Mean entropy change per percentile range of the first checkpoint's entropy, with 95% bars (figure 4)."""
    figure = empty_figure()
    axes = figure.subplots()
    middle = (change["from_percentile"] + change["to_percentile"]) / 2
    width = float(change["to_percentile"].iloc[0] - change["from_percentile"].iloc[0])
    value = change["change"].to_numpy(float)
    axes.bar(middle, value, width=0.82 * width, color=np.where(value >= 0, VERMILION, BLUE).tolist(), alpha=0.8)
    if "change_low" in change:
        bars = error_bars(value, change["change_low"], change["change_high"])
        axes.errorbar(middle, value, bars, fmt="none", ecolor=MUTED, elinewidth=1.2, capsize=2)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xlim(0, 100)
    finish(axes, "change (nats)", "percentile of the first checkpoint's entropy")
    return figure


def percentile_curves(percentiles: pd.DataFrame) -> Figure:
    """Entropy percentiles across checkpoints (figure 5); high percentiles have light colours."""
    places, xlabel = _places(percentiles["checkpoint"])
    columns = [str(column) for column in percentiles if str(column).startswith("percentile_")]
    shades = matplotlib.colormaps["plasma"](np.linspace(0.25, 0.8, len(columns)))  # readable on light and dark
    curves = [
        *(
            Curve(places, percentiles[name], "", to_hex(shade), "-", ".")
            for name, shade in zip(columns, shades, strict=True)
        ),
        Curve(places, percentiles["mean"], "mean", GREEN, ":"),
    ]
    figure = plot([Panel("entropy (nats)", curves)], xlabel)
    (axes,) = figure.axes
    room, above = max(float(percentiles[columns].to_numpy().max()), 1e-9) / 14, float("inf")
    for column in reversed(columns):  # label the right ends where there is room, highest first
        value = float(percentiles[column].iloc[-1])
        if above - value >= room:
            above, name = value, column.removeprefix("percentile_")
            axes.annotate(
                name, (places[-1], value), (5, 0), textcoords="offset points", va="center", fontsize=FONT_SIZE,
                color=MUTED,
            )  # fmt: skip
    _name_places(axes, percentiles["checkpoint"], places)
    return figure


def _places(checkpoints: pd.Series) -> tuple[list[int], str]:
    """x positions of the checkpoints with the axis label: their steps, else evenly spaced."""
    steps = [_STEP.fullmatch(str(name)) for name in checkpoints]
    if all(steps):
        return [int(step[1]) for step in steps if step], "step"
    return list(range(len(steps))), "checkpoint"


def _name_places(axes: Axes, checkpoints: pd.Series, places: Sequence[int]) -> None:
    """Ticks at checkpoints, both ends included, as many as fit."""
    if axes.get_xlabel() == "checkpoint":
        axes.margins(x=0.15)  # names are wider than numbers
    last, room = places[-1], (places[-1] - places[0]) / 6
    shown = [0]
    for number, place in enumerate(places[:-1]):
        if place - places[shown[-1]] >= room and last - place >= room:
            shown.append(number)
    shown += [len(places) - 1] if len(places) > 1 else []
    names = [ellipsis(_STEP.sub(r"\1", str(checkpoints.iloc[number])), 70 // len(shown)) for number in shown]
    axes.set_xticks([places[number] for number in shown], names, parse_math=False)
