"""The page of ``forkrl branch``: what one fork decides, the branches where they were tried, and the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from forkrl.report.branch_figures import (
    KINDS,
    MAX_POINTS,
    branch_rates,
    natural_against_entropy,
    rate_histogram,
    spread_by_kind,
)
from forkrl.report.fork_view import Branch, ForkView, Frame, ShownPrompt, ShownResponse, View
from forkrl.report.page import Card, Page
from forkrl.report.sections import FigureSection, figure_section

MAX_PROMPTS = 24
FORK_PERCENTILE = 80.0
_CALLED = {"fork": "one fork decides", "random": "a random other token", "low": "a token of low entropy"}


@dataclass(frozen=True, slots=True, eq=False)
class BranchReport:
    """What a page is made from.

    Args:
        name: of the model.
        branches, spreads, tables: as ``forkrl.analysis.branching`` gives them (tables: kinds, differences, relation,
            bins, tokens).
        rows: the responses, each with prompt_text, tokens, entropy, logprobs, score, finished and its branches.
        facts: the counts of the summary.
        settings: what was asked, as (key, value).
        provenance: versions, data.
        command: the command line.
    """

    name: str
    branches: pd.DataFrame
    spreads: pd.DataFrame
    tables: Mapping[str, pd.DataFrame]
    rows: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    settings: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def branch_page(report: BranchReport) -> Page:
    """What the page says of a branching."""
    failures, unjudged = report.facts["verifier_failures"], report.facts.get("unjudged", "")
    return Page(
        name=report.name,
        kind="what a fork is worth",
        verdict=f"{unjudged[0].upper()}{unjudged[1:]}." if unjudged else branch_verdict(report.tables),
        figures=_sections(report),
        figures_title="What one token decides",
        notes=[f"{failures:,} continuations could not be verified; they count as wrong."] if failures else [],
        cards=_cards(report),
        forks=_fork_view(report),
        settings=[("branch", [(key, value, False) for key, value in report.settings.items()])],
        provenance=sorted(report.provenance.items()),
        command=report.command,
        source="this folder's parts/ and branches.json",
    )


def branch_verdict(tables: Mapping[str, pd.DataFrame]) -> str:
    """How much of the outcome one fork decides, against the controls, with intervals."""
    kinds = tables["kinds"].set_index("kind")
    if kinds["share"].isna().all():
        return "Nothing is decided anywhere: every continuation had the same outcome."
    parts = [f"{_CALLED[kind]} {_percent(kinds.loc[kind])}" for kind in kinds.index]
    sentence = f"Of the outcome's variance {', '.join(parts)} (95% intervals)."
    differences = tables["differences"]
    found = differences[differences["against"] == "random"] if len(differences) else differences
    if not len(found) or math.isnan(found.iloc[0]["natural_low"]):
        return sentence
    low, high = found.iloc[0]["natural_low"], found.iloc[0]["natural_high"]
    if low > 0:
        return f"{sentence} Within a response forks decide more than its other tokens."
    if high < 0:
        return f"{sentence} Within a response forks decide less than its other tokens."
    return f"{sentence} Whether forks decide more than other tokens of the same response is not settled."


def _percent(row: pd.Series, name: str = "share") -> str:
    mean, low, high = (round(100 * float(row[name + end]), 1) + 0.0 for end in ("", "_low", "_high"))  # no -0.0
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}%" if math.isnan(low) else f"{mean:.1f}% [{low:.1f}, {high:.1f}]"


def _cards(report: BranchReport) -> list[Card]:
    facts, kinds = report.facts, report.tables["kinds"]
    shares = [
        Card(
            f"Decided at {KINDS[row['kind']].label}",
            _percent(row).partition(" ")[0],
            note=f"of the outcome's variance, 95% {_percent(row).partition(' ')[2]}",
        )
        for _, row in kinds.iterrows()
    ]
    scale = f"{facts['continuations']:,} continuations of {facts['branches']:,} branches"
    return [*shares, Card("Positions", f"{facts['positions']:,}", note=f"in {facts['responses']:,} responses; {scale}")]


def _sections(report: BranchReport) -> list[FigureSection]:
    tables, histogram = report.tables, rate_histogram(report.branches)
    few = f" Of {len(report.spreads):,} positions {MAX_POINTS:,} are drawn." if len(report.spreads) > MAX_POINTS else ""
    return [
        figure_section(
            "By kind of position",
            "Natural: the variance of the success rates with the model's own probabilities, which is what this choice "
            "decides of what is still open; where the model is certain, that is nothing. Forced: with equal weights; "
            "large also where a slip that the model never makes would derail the response. Both less the noise of "
            "sampling. Share: natural over the whole variance of the outcome.",
            spread_by_kind(tables["kinds"]),
            tables["kinds"],
            "branch-kinds",
        ),
        figure_section(
            "Against entropy",
            "The natural spread of every position, which is noisy and may fall below 0, and the means of bins of "
            f"entropy with intervals clustered by prompt.{few} {_relation(tables['relation'])}",
            natural_against_entropy(report.spreads, tables["bins"]),
            tables["bins"],
            "branch-entropy",
        ),
        figure_section(
            "Success rates of branches",
            "The share of branches in each tenth of the success rate, whatever their probability.",
            branch_rates(histogram),
            histogram,
            "branch-rates",
        ),
        figure_section(
            "Forks against the controls of the same response",
            "Mean at the forks of a response minus mean at its control positions, over responses that have both. "
            "Range: best minus worst branch; gain: best minus taken; chosen on one half of the continuations and "
            "measured on the other.",
            None,
            tables["differences"],
            "branch-differences",
        ),
        *_token_section(tables["tokens"]),
    ]


def _token_section(tokens: pd.DataFrame) -> list[FigureSection]:
    if not len(tokens):
        return []
    columns = [
        "token",
        "positions",
        "entropy",
        "share",
        "share_low",
        "share_high",
        "natural",
        "natural_low",
        "natural_high",
    ]
    caption = (
        "Forks by the token that was taken there, most decisive first: entropy says how undecided the model is, not "
        "how much depends on what it decides."
    )
    return [figure_section("Which forks decide", caption, None, tokens[columns], "branch-tokens")]


def _relation(relation: pd.DataFrame) -> str:
    row = relation.set_index("measure").loc["natural"]
    if math.isnan(row["spearman"]):
        return ""
    ends = "" if math.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"Spearman's rank correlation: {row['spearman']:.2f}{ends}."


def _fork_view(report: BranchReport) -> ForkView:
    prompts: dict[int, ShownPrompt] = {}
    by_response = dict(list(report.branches.groupby(["prompt", "response"])))
    numbers = sorted({row["prompt"] for row in report.rows})[:MAX_PROMPTS]
    for row in (row for row in report.rows if row["prompt"] <= numbers[-1]):
        shown = _shown(row, by_response[row["prompt"], row["response"]])
        outcome = "right" if row["score"] == 1 else "wrong"
        if row["prompt"] not in prompts:
            prompts[row["prompt"]] = ShownPrompt(row["prompt_text"], outcome, [shown])
            continue
        known = prompts[row["prompt"]]
        mixed = known.outcome if known.outcome == outcome else "mixed"
        prompts[row["prompt"]] = ShownPrompt(known.prompt, mixed, [*known.responses, shown])
    note = (
        f"The first {len(prompts):,} of {report.facts['prompts']:,} prompts, in order: none was picked for its looks."
    )
    lead = (
        "Underlined tokens are the positions where alternatives were forced; choose one to see its branches: what was "
        "tried, how probable it was, and how often its continuations came out right."
    )
    entropy = np.concatenate([row["entropy"] for row in report.rows])
    view = View("branches", "Branches", note, [Frame("", list(prompts.values()))])
    return ForkView([view], lead, mark=float(np.percentile(entropy, FORK_PERCENTILE)))


def _shown(row: Mapping[str, Any], branches: pd.DataFrame) -> ShownResponse:
    tried: dict[int, list[Branch]] = {}
    columns = ("position", "token", "probability", "rate", "low", "high", "count")
    for position, *values in branches[list(columns)].itertuples(index=False, name=None):
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
