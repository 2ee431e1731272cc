"""The page of ``forkrl branch``: what one fork decides, the branches where they were tried, and the plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.fork_view import Branch, ForkView, Frame, ShownPrompt, ShownResponse, View
from forkrl.report.formatting import evenly_spaced, interval_of, outcome, percent
from forkrl.report.page import Card, Page, Section, interval_card
from forkrl.report.plots import (
    INK,
    PERCENT,
    Curve,
    Panel,
    column_curve,
    plot,
)

MAX_PROMPTS = 24
MAX_POINTS = 2000
RATE_BINS = 10
FORK_PERCENTILE = 80.0


KINDS = {
    "fork": ("forks", "one fork decides"),
    "random": ("random others", "a random other token"),
    "low": ("low entropy", "a token of low entropy"),
}
"""Each kind of position, as a label and in the headline."""


@dataclass(frozen=True, slots=True, eq=False)
class BranchResults:
    """What was found.

    Args:
        rows: the responses, each with prompt_text, tokens, entropy, logprobs, score, finished and its branches.
        branches, spreads, tables: as ``forkrl.analysis.branching`` gives them (tables: kinds, differences, relation,
            bins, tokens).
        facts: the counts of the summary.
    """

    rows: Sequence[Mapping[str, Any]]
    branches: pd.DataFrame
    spreads: pd.DataFrame
    tables: Mapping[str, pd.DataFrame]
    facts: Mapping[str, Any]


def branch_page(found: BranchResults, **about: Any) -> Page:
    """The page of a branching; ``about``: name, settings, provenance and command of the page."""
    failures, unjudged = found.facts["verifier_failures"], found.facts.get("unjudged", "")
    return Page(
        kind="what a fork is worth",
        headline=f"{unjudged[0].upper()}{unjudged[1:]}." if unjudged else branch_headline(found.tables),
        sections=_sections(found),
        sections_title="What one token decides",
        notes=[f"{failures:,} continuations could not be verified; they count as wrong."] if failures else [],
        cards=_cards(found),
        forks=_fork_view(found),
        source="this folder's parts/ and branches.json",
        **about,
    )


def branch_headline(tables: Mapping[str, pd.DataFrame]) -> str:
    """How much of the outcome one fork decides, against the controls, with intervals."""
    kinds, differences = tables["kinds"], tables["differences"]
    if kinds["share"].isna().all():
        return "Nothing is decided anywhere: every continuation had the same outcome."
    parts = [f"{KINDS[row['kind']][1]} {percent(interval_of(row, 'share'))}" for _, row in kinds.iterrows()]
    sentence = f"Of the outcome's variance {', '.join(parts)} (95% intervals)."
    against = differences[differences["against"] == "random"] if len(differences) else differences
    if not len(against) or math.isnan(against.iloc[0]["natural_low"]):
        return sentence
    _, low, high = interval_of(against.iloc[0], "natural")
    if low > 0 or high < 0:
        return f"{sentence} Within a response forks decide {'more' if low > 0 else 'less'} than its other tokens."
    return f"{sentence} Whether forks decide more than other tokens of the same response is not settled."


def _cards(found: BranchResults) -> list[Card]:
    facts = found.facts
    shares = [
        interval_card(f"Decided at {KINDS[row['kind']][0]}", interval_of(row, "share"), "of the outcome's variance")
        for _, row in found.tables["kinds"].iterrows()
    ]
    scale = f"{facts['continuations']:,} continuations of {facts['branches']:,} branches"
    return [*shares, Card("Positions", f"{facts['positions']:,}", note=f"in {facts['responses']:,} responses; {scale}")]


def _sections(found: BranchResults) -> list[Section]:
    tables, histogram = found.tables, rate_histogram(found.branches)
    few = f" Of {len(found.spreads):,} positions {MAX_POINTS:,} are drawn." if len(found.spreads) > MAX_POINTS else ""
    made = [
        Section(
            "By kind of position",
            "Natural: the variance of the success rates with the model's own probabilities, which is what this choice "
            "decides of what is still open; where the model is certain, that is nothing. Forced: with equal weights; "
            "large also where a slip that the model never makes would derail the response. Both less the noise of "
            "sampling. Share: natural over the whole variance of the outcome.",
            "branch-kinds",
            tables["kinds"],
            spread_by_kind(tables["kinds"]),
        ),
        Section(
            "Against entropy",
            "The natural spread of every position, which is noisy and may fall below 0, and the means of bins of "
            f"entropy with intervals clustered by prompt.{few}{_relation(tables['relation'])}",
            "branch-entropy",
            tables["bins"],
            natural_against_entropy(found.spreads, tables["bins"]),
        ),
        Section(
            "Success rates of branches",
            "The share of branches in each tenth of the success rate, whatever their probability.",
            "branch-rates",
            histogram,
            branch_rates(histogram),
        ),
        Section(
            "Forks against the controls of the same response",
            "Mean at the forks of a response minus mean at its control positions, over responses that have both. "
            "Range: best minus worst branch; gain: best minus taken; chosen on one half of the continuations and "
            "measured on the other.",
            "branch-differences",
            tables["differences"],
        ),
    ]
    if len(tokens := tables["tokens"]):
        spread = [f"{name}{end}" for name in ("share", "natural") for end in ("", "_low", "_high")]
        caption = (
            "Forks by the token that was taken there, most decisive first: entropy says how undecided the model is, "
            "not how much depends on what it decides."
        )
        table = tokens[["token", "positions", "entropy", *spread]]
        made.append(Section("Which forks decide", caption, "branch-tokens", table))
    return made


def _relation(relation: pd.DataFrame) -> str:
    row = relation.set_index("measure").loc["natural"]
    if math.isnan(row["spearman"]):
        return ""
    ends = "" if math.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f" Spearman's rank correlation: {row['spearman']:.2f}{ends}."


def _fork_view(found: BranchResults) -> ForkView:
    prompts: dict[int, ShownPrompt] = {}
    by_response = dict(list(found.branches.groupby(["prompt", "response"])))
    numbers = sorted({row["prompt"] for row in found.rows})[:MAX_PROMPTS]
    for row in (row for row in found.rows if row["prompt"] in numbers):
        prompt = prompts.setdefault(row["prompt"], ShownPrompt(row["prompt_text"], "", []))
        prompt.responses = [*prompt.responses, _shown(row, by_response[row["prompt"], row["response"]])]
        prompt.outcome = outcome([response.score for response in prompt.responses])
    note = f"The first {len(prompts):,} of {found.facts['prompts']:,} prompts, in order: none was picked for its looks."
    lead = (
        "Underlined tokens are the positions where alternatives were forced; choose one to see its branches: what was "
        "tried, how probable it was, and how often its continuations came out right."
    )
    entropy = np.concatenate([row["entropy"] for row in found.rows])
    view = View("Branches", note, [Frame("", list(prompts.values()))])
    return ForkView([view], lead, mark=float(np.percentile(entropy, FORK_PERCENTILE)))


def _shown(row: Mapping[str, Any], branches: pd.DataFrame) -> ShownResponse:
    tried: dict[int, list[Branch]] = {}
    columns = ["position", "token", "probability", "rate", "low", "high", "count"]
    for position, *values in branches[columns].itertuples(index=False, name=None):
        tried.setdefault(int(position), []).append(Branch(*values))
    return ShownResponse(
        label=f"Response {row['response'] + 1}",
        tokens=row["tokens"],
        entropy=[row["entropy"]],
        logprobs=row["logprobs"],
        branches=tried,
        score=row["score"],
        finished=row["finished"],
    )


def natural_against_entropy(spreads: pd.DataFrame, bins: pd.DataFrame) -> Figure:
    """Natural spread of each position against its entropy, and the mean of each bin of entropy with its interval.

    At most ``MAX_POINTS`` positions are drawn, evenly spaced. Single positions are noisy and may lie below 0.
    """
    shown = spreads.iloc[evenly_spaced(len(spreads), MAX_POINTS)]
    curves = [
        Curve(points["entropy"], points["natural"], label, style="", marker=None, alpha=0.45)
        for name, (label, _) in KINDS.items()
        if len(points := shown[shown["kind"] == name])
    ]
    means = column_curve(bins, bins["entropy"], "natural", "mean, 95%", color=INK, style="", marker="D")
    return plot([Panel("variance it decides", [*curves, means], bottom=None, hline=(0, ""))], "entropy (nats)")


def spread_by_kind(kinds: pd.DataFrame) -> Figure:
    """Both spreads of each kind of position, means with intervals."""
    place = np.arange(len(kinds), dtype=float)
    curves = [
        column_curve(kinds, place + offset, name, f"{name}, 95%", style="", marker=None)
        for name, offset in (("natural", -0.1), ("forced", 0.1))
    ]
    names = [KINDS[kind][0] for kind in kinds["kind"]]
    return plot([Panel("variance of success rates", curves, bottom=None, names=names, hline=(0, ""))], "")


def rate_histogram(branches: pd.DataFrame) -> pd.DataFrame:
    """Share of each kind's branches in each tenth of the success rate: columns from, to, and one for each kind."""
    edges = np.linspace(0, 1, RATE_BINS + 1)
    table = pd.DataFrame({"from": edges[:-1], "to": edges[1:]})
    for kind in (kind for kind in KINDS if (branches["kind"] == kind).any()):
        counts, _ = np.histogram(branches.loc[branches["kind"] == kind, "rate"], edges)
        table[kind] = counts / counts.sum()
    return table


def branch_rates(histogram: pd.DataFrame) -> Figure:
    """How the success rates of branches are distributed, for each kind of position."""
    edges = [*histogram["from"], 1.0]
    curves = [
        Curve(edges, histogram[name], label, kind="stairs") for name, (label, _) in KINDS.items() if name in histogram
    ]
    return plot([Panel("share of branches", curves, PERCENT, PERCENT)], "success rate of the branch")
