"""The page of an analysis: where a model forks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from forkrl.report import analysis_figures
from forkrl.report.fork_view import ForkView, Frame, ShownPrompt, View
from forkrl.report.page import Card, Page
from forkrl.report.sections import FigureSection, figure_section
from forkrl.report.token_forks import describe_choice
from forkrl.report.visible_text import visible_token

TYPE_ROWS = 100


def analysis_page(
    facts: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    shown: Sequence[ShownPrompt],
    *,
    notes: Sequence[str],
    provenance: Sequence[tuple[str, str]],
    command: str,
) -> Page:
    """What the page says.

    Args:
        facts: as in analysis.json.
        tables: the frames of ``forkrl.analysis`` by the names of their CSV files.
        shown: prompts whose responses can be looked at.
        notes: what was left out.
        provenance: where the numbers come from.
        command: the command line.
    """
    return Page(
        name=str(facts["model"]),
        kind="analysis",
        verdict=_verdict(facts),
        figures=_figures(facts, tables),
        notes=notes,
        cards=_cards(facts),
        forks=ForkView(
            views=[View("responses", "Responses", describe_choice(len(shown), facts["prompts"]), [Frame("", shown)])],
            lead=f"The keys visit the forks: tokens written with more than {facts['threshold']:.3g} nats of entropy.",
            mark=facts["threshold"],
        ),
        provenance=provenance,
        command=command,
        figures_title="Patterns",
        source="the analysis folder's tokens/ and responses/",
    )


def _verdict(facts: Mapping[str, Any]) -> str:
    return (
        f"At temperature {facts['temperature']:g}, {facts['share_below_0.01']:.1%} of {facts['tokens']:,.0f} tokens "
        f"were written with less than 0.01 nats of entropy; the fifth with the most has more than "
        f"{facts['percentile_80']:.3g} nats "
        f"(the paper's Qwen3-8B at temperature 1: 50.6% and 0.672)."
    )


def _cards(facts: Mapping[str, Any]) -> list[Card]:
    cards = [
        Card(
            "Tokens", f"{facts['tokens']:,.0f}", note=f"{facts['responses']:,} responses, {facts['prompts']:,} prompts"
        ),
        Card(
            "Below 0.01 nats", f"{facts['share_below_0.01']:.1%}", note="of tokens; the paper at temperature 1: 50.64%"
        ),
        Card("80th percentile", f"{facts['percentile_80']:.3g} nats", note="the paper at temperature 1: 0.672"),
        Card("Mean entropy", f"{facts['mean']:.3g} nats", note=f"the highest is {facts['max']:.3g}"),
    ]
    if facts["accuracy"] is not None:
        interval = f"95% [{100 * facts['accuracy_low']:.1f}, {100 * facts['accuracy_high']:.1f}]"
        cards.append(Card("Accuracy", f"{facts['accuracy']:.1%}", note=interval))
    return cards


def _figures(facts: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> list[FigureSection]:
    threshold, types = facts["threshold"], tables["types"]
    sections = [
        figure_section(
            "Entropy of all tokens",
            f"Count of tokens (log scale). {facts['share_below_0.01']:.2%} lie below 0.01 nats; the 80th percentile is "
            f"{facts['percentile_80']:.3f} nats.",
            analysis_figures.entropy_histogram(tables["histogram"], threshold),
            tables["histogram"],
            "histogram",
        ),
        figure_section(
            "Where the forks lie",
            "Share of forks and mean entropy along the response, with 95% bands clustered by prompt.",
            analysis_figures.fork_positions(tables["positions"]),
            tables["positions"],
            "positions",
        ),
        *_correctness_figures(tables),
    ]
    for highest, word in ((True, "highest"), (False, "lowest")):
        if types.empty:
            break
        end = types.head(TYPE_ROWS) if highest else types.iloc[::-1].head(TYPE_ROWS)
        sections.append(
            figure_section(
                f"Types of {word} mean entropy",
                f"Token types seen at least {facts['min_count']} times ({len(types):,} of them); larger: {word}.",
                analysis_figures.word_cloud(types, highest=highest),
                _with_marks(end, "text"),
                f"types-{word}",
            )
        )
    sections.append(
        figure_section(
            "What stands before a fork",
            f"Pairs of tokens seen at least {facts['min_count']} times, by the number of forks right after them.",
            None,
            _with_marks(tables["contexts"].head(TYPE_ROWS), "context"),
            "contexts",
            () if len(tables["contexts"]) else ("a pair of tokens seen so often (--min-count)",),
            open_table=True,
        )
    )
    return sections


def _with_marks(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table with a mark for every space of a text column: " 8" and "8" are different tokens."""
    return table.assign(**{column: [visible_token(text).replace(" ", "␣") for text in table[column]]})


def _correctness_figures(tables: Mapping[str, pd.DataFrame]) -> list[FigureSection]:
    correctness, density = tables["correctness"], tables["density"]
    if correctness.empty:
        return []
    difference, within = (correctness.iloc[row] for row in (2, 3))
    return [
        figure_section(
            "Correct and incorrect responses",
            f"Correct minus incorrect: {_estimate(difference, 'mean_entropy')} nats over all tokens; within the "
            f"{within['count']:.0f} prompts that have both: {_estimate(within, 'mean_entropy')} nats.",
            analysis_figures.correct_against_incorrect(correctness),
            correctness,
            "correctness",
        ),
        figure_section(
            "Fork density and correctness",
            "Responses in equal parts by the share of forks among their tokens, and how many of each part are correct.",
            analysis_figures.density_against_correctness(density),
            density,
            "density",
        ),
    ]


def _estimate(row: pd.Series, column: str) -> str:
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    if math.isnan(row[column]):
        return "unknown"
    return f"{row[column]:+.3f}" + ("" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]")
