"""The page of ``forkrl analyze``: where a model forks (paper: figure 2, and more)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.fork_view import ForkView, Frame, ShownPrompt, View, describe_choice
from forkrl.report.formatting import interval_of, visible_token
from forkrl.report.page import Card, Page, Section, about, interval_card
from forkrl.report.plots import BLUE, PERCENT, Curve, Panel, column_curve, plot, word_cloud
from forkrl.stats.intervals import Estimate
from forkrl.store.results import Results

TYPE_ROWS, PRINTED_TYPES = 100, 8
_PAPER = "the paper's Qwen3-8B at temperature 1: "


def analyze_page(results: Results, shown: Sequence[ShownPrompt]) -> Page:
    facts = results.facts
    choice = describe_choice(len(shown), facts["prompts"])
    cards = [
        Card(
            "Tokens", f"{facts['tokens']:,.0f}", note=f"{facts['responses']:,} responses, {facts['prompts']:,} prompts"
        ),
        Card("Below 0.01 nats", f"{facts['share_below_0.01']:.2%}", note=f"of tokens; {_PAPER}50.64%"),
        Card("80th percentile", f"{facts['percentile_80']:.3f} nats", note=f"{_PAPER}0.672"),
        Card("Mean entropy", f"{facts['mean']:.3g} nats", note=f"the highest is {facts['max']:.3g}"),
    ]
    if facts["accuracy"] is not None:
        cards.append(interval_card("Accuracy", interval_of(facts, "accuracy")))
    return Page(
        **about(results),
        kind="analysis",
        sections=_sections(facts, results.tables),
        cards=cards,
        forks=ForkView(
            [View("Responses", choice, [Frame("", shown)])],
            f"The keys visit the forks: tokens written with more than {facts['threshold']:.3g} nats of entropy.",
            facts["threshold"],
        ),
        sections_title="Patterns",
        source="the analysis folder's tokens/ and responses/",
    )


def analyze_headline(facts: Mapping[str, Any]) -> str:
    """The model's certainty at the tokens it wrote, next to the paper's figures."""
    return (
        f"At temperature {facts['temperature']:g}, {facts['share_below_0.01']:.1%} of {facts['tokens']:,.0f} tokens "
        f"were written with less than 0.01 nats of entropy; the fifth with the most has more than "
        f"{facts['percentile_80']:.3g} nats (the paper's Qwen3-8B at temperature 1: 50.6% and 0.672)."
    )


def _sections(facts: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    types, contexts, min_count = tables["types"], tables["contexts"], facts["min_count"]
    found = [
        Section(
            "Entropy of all tokens",
            f"Count of tokens (log scale). {facts['share_below_0.01']:.2%} lie below 0.01 nats; the 80th percentile is "
            f"{facts['percentile_80']:.3f} nats.",
            "histogram",
            tables["histogram"],
            entropy_histogram(tables["histogram"], facts["threshold"]),
        ),
        Section(
            "Where the forks lie",
            "Share of forks and mean entropy along the response, with 95% bands clustered by prompt.",
            "positions",
            tables["positions"],
            fork_positions(tables["positions"]),
        ),
        *_correctness(tables["correctness"], tables["density"]),
    ]
    for word, ordered in (("highest", types), ("lowest", types.iloc[::-1])):
        if len(types):
            caption = f"Token types seen at least {min_count} times ({len(types):,} of them); larger: {word}."
            cloud = word_cloud(types, highest=word == "highest")
            table = _with_marks(ordered.head(TYPE_ROWS), "text")
            printed = table.head(PRINTED_TYPES)[["text", "count", "mean_entropy", "fork_share"]]
            title = f"Types of {word} mean entropy"
            found.append(Section(title, caption, f"types-{word}", table, cloud, printed=printed))
    caption = f"Pairs of tokens seen at least {min_count} times, by the number of forks right after them."
    missing = () if len(contexts) else ("a pair of tokens seen that often (--min-count)",)
    table = _with_marks(contexts.head(TYPE_ROWS), "context")
    return [*found, Section("What comes before a fork", caption, "contexts", table, missing=missing)]


def _with_marks(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mark spaces in a text column: " 8" and "8" are different tokens."""
    return table.assign(**{column: [visible_token(text).replace(" ", "␣") for text in table[column]]})


def _correctness(correctness: pd.DataFrame, density: pd.DataFrame) -> list[Section]:
    if correctness.empty:
        return []
    difference, within = (correctness.iloc[row] for row in (2, 3))
    return [
        Section(
            "Correct and incorrect responses",
            f"Correct minus incorrect: {_nats(difference)} nats over all tokens; within the {within['count']:.0f} "
            f"prompts that have both: {_nats(within)} nats.",
            "correctness",
            correctness,
            correct_against_incorrect(correctness),
        ),
        Section(
            "Fork density and correctness",
            "Responses in equal parts by the share of forks among their tokens, and how many of each part are correct.",
            "density",
            density,
            density_against_correctness(density),
        ),
    ]


def _nats(row: pd.Series) -> str:
    mean, low, high = interval_of(row, "mean_entropy")
    if np.isnan(mean):
        return "unknown"
    return f"{mean:+.3f}" + ("" if np.isnan(low) else f" [{low:+.3f}, {high:+.3f}]")


def entropy_histogram(histogram: pd.DataFrame, threshold: float) -> Figure:
    """Tokens per entropy bin, log scale, with the fork threshold in nats (figure 2a)."""
    edges = np.append(histogram["low"].to_numpy(), histogram["high"].iloc[-1])
    curves = [
        Curve(edges, np.where(counts > 0, counts, np.nan), label, kind="stairs")
        for column, label in (("tokens", "all"), ("correct", "correct responses"), ("incorrect", "incorrect"))
        if (counts := histogram[column].to_numpy(float)).any()
    ]
    mark = (threshold, f"forks above {threshold:.2f}")
    return plot([Panel("tokens (log)", curves, bottom=None, log="y", vline=mark)], "entropy (nats)")


def fork_positions(positions: pd.DataFrame) -> Figure:
    middle = (positions["low"] + positions["high"]) / 2
    shares, entropies = (
        column_curve(positions, middle, column, marker=".", kind="band") for column in ("fork_share", "mean_entropy")
    )
    panels = [Panel("forks", [shares], PERCENT), Panel("entropy (nats)", [entropies], x_format=PERCENT)]
    return plot(panels, "position in the response")


def correct_against_incorrect(correctness: pd.DataFrame) -> Figure:
    """Means of correct and incorrect responses with 95% intervals; the table must not be empty."""
    panels = [
        Panel(
            label,
            [point(place, interval_of(correctness.iloc[place], column)) for place in (0, 1)],
            form,
            bottom=None,
            names=["correct", "incorrect"],
        )
        for column, label, form in (("mean_entropy", "mean entropy (nats)", None), ("fork_share", "forks", PERCENT))
    ]
    figure = plot(panels, "", columns=2)
    for axes in figure.axes:
        axes.margins(y=0.25)
    return figure


def density_against_correctness(density: pd.DataFrame) -> Figure:
    """Accuracy by fork density in equal parts, with 95% intervals; the table must not be empty."""
    points = [point(place, interval_of(row, "accuracy")) for place, (_, row) in enumerate(density.iterrows())]
    names = [f"{100 * low:.1f}–{100 * high:.1f}%" for low, high in zip(density["low"], density["high"], strict=True)]
    return plot([Panel("correct", points, PERCENT, names=names)], "forks among the tokens of a response")


def point(place: float, estimate: Estimate) -> Curve:
    mean, low, high = ([value] for value in estimate)
    return Curve([place], mean, "", BLUE, "", "o", low, high)
