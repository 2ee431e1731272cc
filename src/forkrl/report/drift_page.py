"""The page of a drift: how training moved entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from forkrl.report import drift_figures
from forkrl.report.fork_view import ForkView, Frame, ShownPrompt, View
from forkrl.report.page import Card, Page
from forkrl.report.sections import FigureSection, figure_section
from forkrl.report.token_forks import describe_choice

FORK_PERCENTILE = 80


def drift_page(
    facts: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    shown: Sequence[ShownPrompt],
    layers: Sequence[str],
    *,
    notes: Sequence[str],
    provenance: Sequence[tuple[str, str]],
    command: str,
) -> Page:
    """What the page says.

    Args:
        facts: as in drift.json.
        tables: "overlap", "change" and "percentiles".
        shown: prompts whose responses can be looked at, with an entropy for every layer.
        layers: names of the checkpoints that the fork view switches between.
        notes: what was left out.
        provenance: where the numbers come from.
        command: the command line.
    """
    mark = float(tables["percentiles"].iloc[0][f"percentile_{FORK_PERCENTILE}"])
    choice = describe_choice(len(shown), facts["prompts"])
    return Page(
        name=str(facts["model"]),
        kind="drift",
        verdict=_verdict(facts, tables["change"]),
        figures=_figures(facts, tables),
        notes=notes,
        cards=_cards(facts, tables),
        forks=ForkView(
            views=[View("responses", "Responses of the last", choice, [Frame("", shown)], layers)],
            lead=(
                "The same tokens under every checkpoint: switch between them to see where the model grew more or less "
                f"sure. The keys visit tokens above {mark:.3g} nats, the 80th percentile of the first checkpoint."
            ),
            mark=mark,
        ),
        provenance=provenance,
        command=command,
        figures_title="How entropy moved",
        source="the drift folder's tokens/, responses/ and entropies/",
    )


def _verdict(facts: Mapping[str, Any], change: pd.DataFrame) -> str:
    overlap = facts["overlap_of_last_with_first"]
    size = change["change"].abs()
    top_share = size.iloc[-max(len(size) // 5, 1) :].sum() / max(size.sum(), 1e-12)
    return (
        f"At temperature {facts['temperature']:g}, from {facts['first']} to {facts['last']}, "
        f"{overlap['share']:.1%} [{100 * overlap['low']:.1f}, "
        f"{100 * overlap['high']:.1f}] of the top {100 * facts['ratio']:g}% of positions stayed there (the paper's "
        f"14B: 86.7%), and {top_share:.0%} of the change of entropy lies in the fifth of the tokens that had the most."
    )


def _cards(facts: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> list[Card]:
    means = list(facts["mean_entropy"].values())
    percentiles = tables["percentiles"][f"percentile_{FORK_PERCENTILE}"]
    overlap = facts["overlap_of_last_with_first"]
    return [
        Card("Overlap", f"{overlap['share']:.1%}", note="of the last checkpoint's top positions with the first's"),
        Card("Mean entropy", f"{means[-1]:.3g}", f"{means[0]:.3g}", "nats, first and last checkpoint"),
        Card("80th percentile", f"{percentiles.iloc[-1]:.3g}", f"{percentiles.iloc[0]:.3g}", "nats"),
        Card("Tokens", f"{facts['tokens']:,}", note=f"{facts['prompts']:,} prompts, {len(means)} checkpoints"),
    ]


def _figures(facts: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> list[FigureSection]:
    overlap, change, percentiles = tables["overlap"], tables["change"], tables["percentiles"]
    noise = np.nan if "change_low" not in change else float((change["change_high"] - change["change_low"]).mean() / 2)
    return [
        figure_section(
            "Who stays at the top",
            f"Share of the top {100 * facts['ratio']:g}% of positions by entropy in common with the first and with the "
            "last checkpoint, with 95% intervals clustered by prompt (the paper's table 1).",
            drift_figures.overlap_curves(overlap, facts["ratio"]),
            overlap,
            "overlap",
        ),
        figure_section(
            "Change by percentile",
            f"Mean change of entropy from {facts['first']} to {facts['last']} in each percentile range of the first's "
            f"(figure 4); bars are 95% intervals, ±{noise:.2g} nats on average. What ranks high by chance tends to "
            "fall.",
            drift_figures.change_by_percentile(change),
            change,
            "change",
        ),
        figure_section(
            "Percentiles over training",
            "Percentiles of the entropy of the same tokens under each checkpoint (figure 5).",
            drift_figures.percentile_curves(percentiles),
            percentiles,
            "percentiles",
        ),
    ]
