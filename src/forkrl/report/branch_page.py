"""The page of ``forkrl branch``: how much one fork decides, the branches in their responses, and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.fork_view import Branch, ForkView, Frame, ShownPrompt, ShownResponse, View
from forkrl.report.formatting import evenly_spaced, interval_of, outcome, percent
from forkrl.report.page import Card, Page, Section, about, interval_card
from forkrl.report.plots import INK, PERCENT, Curve, Panel, column_curve, plot
from forkrl.store.results import Results

MAX_PROMPTS = 24
MAX_POINTS = 2000
RATE_BINS = 10
FORK_PERCENTILE = 80.0


KINDS = {
    "fork": ("forks", "one fork decides"),
    "random": ("random others", "a random other token"),
    "low": ("low entropy", "a token of low entropy"),
}
"""Kind of position: plot label, and name in the headline."""


def branch_page(results: Results, rows: Sequence[Mapping[str, Any]]) -> Page:
    """``rows``: the responses, each with prompt_text, tokens, entropy, logprobs, score, finished."""
    facts, tables = results.facts, results.tables
    scale = f"{facts['continuations']:,} continuations of {facts['branches']:,} branches"
    size = f"in {facts['responses']:,} responses to {facts['prompts']:,} of {facts['prompts_available']:,} prompts"
    return Page(
        **about(results),
        kind="what a fork is worth",
        sections=_sections(tables),
        sections_title="What one token decides",
        cards=[
            *(
                interval_card(
                    f"Decided at {KINDS[row['kind']][0]}", interval_of(row, "share"), "of the outcome's variance"
                )
                for _, row in tables["kinds"].iterrows()
            ),
            interval_card(
                "Accuracy", interval_of(facts, "accuracy"), f"temperature {results.settings['temperature']:g}"
            ),
            Card("Positions", f"{facts['positions']:,}", note=f"{size}; {scale}"),
        ],
        forks=_fork_view(tables["branches"], rows, facts["prompts"]),
        source="this folder's parts/ and tables/",
    )


def branch_headline(tables: Mapping[str, pd.DataFrame]) -> str:
    """How much of the outcome one fork decides, compared with the controls, with intervals."""
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


def _sections(tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    positions, histogram, kinds = tables["positions"], rate_histogram(tables["branches"]), tables["kinds"]
    few = f" Of {len(positions):,} positions {MAX_POINTS:,} are drawn." if len(positions) > MAX_POINTS else ""
    estimates = [f"{name}{end}" for name in ("natural", "forced", "gain") for end in ("", "_low", "_high")]
    differences = tables["differences"]
    made = [
        Section(
            "By kind of position",
            "Natural: the variance of the success rates with the model's own probabilities, which is what this choice "
            "decides of what is still open; where the model is certain, that is nothing. Forced: with equal weights; "
            "large also where a slip that the model never makes would derail the response. Both less the noise of "
            "sampling. Share: natural over the whole variance of the outcome.",
            "branch-kinds",
            kinds,
            spread_by_kind(kinds),
            printed=kinds[["kind", "positions", "entropy", *estimates]],
        ),
        Section(
            "Against entropy",
            "The natural spread of every position, which is noisy and may fall below 0, and the means of bins of "
            f"entropy with intervals clustered by prompt.{few}{_relation(tables['relation'])}",
            "branch-entropy",
            tables["bins"],
            natural_against_entropy(positions, tables["bins"]),
            printed=tables["relation"],
        ),
        Section(
            "Success rates of branches",
            "The share of branches in each tenth of the success rate, regardless of their probability.",
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
            differences,
            printed=differences[["against", "responses", *estimates]] if len(differences) else None,
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
    mean, low, high = interval_of(relation.set_index("measure").loc["natural"], "spearman")
    if math.isnan(mean):
        return ""
    ends = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f" Spearman's rank correlation: {mean:.2f}{ends}."


def _fork_view(branches: pd.DataFrame, rows: Sequence[Mapping[str, Any]], num_prompts: int) -> ForkView:
    prompts: dict[int, ShownPrompt] = {}
    by_response = dict(list(branches.groupby(["prompt", "sample"])))
    numbers = sorted({row["prompt"] for row in rows})[:MAX_PROMPTS]
    for row in (row for row in rows if row["prompt"] in numbers):
        prompt = prompts.setdefault(row["prompt"], ShownPrompt(row["prompt_text"], "", []))
        prompt.responses = [*prompt.responses, _shown(row, by_response[row["prompt"], row["sample"]])]
        prompt.outcome = outcome([response.score for response in prompt.responses])
    note = f"The first {len(prompts):,} of {num_prompts:,} prompts, in order: none was picked for its looks."
    lead = (
        "Underlined tokens are the positions where alternatives were forced; choose one to see its branches: what was "
        "tried, how probable it was, and how often its continuations came out right."
    )
    entropy = np.concatenate([row["entropy"] for row in rows])
    view = View("Branches", note, [Frame("", list(prompts.values()))])
    return ForkView([view], lead, mark=float(np.percentile(entropy, FORK_PERCENTILE)))


def _shown(row: Mapping[str, Any], branches: pd.DataFrame) -> ShownResponse:
    tried: dict[int, list[Branch]] = {}
    columns = ["position", "token", "probability", "rate", "rate_low", "rate_high", "count"]
    for position, *values in branches[columns].itertuples(index=False, name=None):
        tried.setdefault(int(position), []).append(Branch(*values))
    return ShownResponse(
        label=f"Response {row['sample'] + 1}",
        tokens=row["tokens"],
        entropy=[row["entropy"]],
        logprobs=row["logprobs"],
        branches=tried,
        score=row["score"],
        finished=row["finished"],
    )


def natural_against_entropy(positions: pd.DataFrame, bins: pd.DataFrame) -> Figure:
    """At most ``MAX_POINTS`` positions, which are noisy and may be negative, and entropy bin means with intervals."""
    shown = positions.iloc[evenly_spaced(len(positions), MAX_POINTS)]
    curves = [
        Curve(points["entropy"], points["natural"], label, style="", marker=None, alpha=0.45)
        for name, (label, _) in KINDS.items()
        if len(points := shown[shown["kind"] == name])
    ]
    means = column_curve(bins, bins["entropy"], "natural", "mean, 95%", color=INK, style="", marker="D")
    return plot([Panel("variance it decides", [*curves, means], bottom=None, hline=(0, ""))], "entropy (nats)")


def spread_by_kind(kinds: pd.DataFrame) -> Figure:
    place = np.arange(len(kinds), dtype=float)
    curves = [
        column_curve(kinds, place + offset, name, f"{name}, 95%", style="", marker=None)
        for name, offset in (("natural", -0.1), ("forced", 0.1))
    ]
    names = [KINDS[kind][0] for kind in kinds["kind"]]
    return plot([Panel("variance of success rates", curves, bottom=None, names=names, hline=(0, ""))], "")


def rate_histogram(branches: pd.DataFrame) -> pd.DataFrame:
    """Share of branches per tenth of success rate: columns from, to, and one per kind."""
    edges = np.linspace(0, 1, RATE_BINS + 1)
    table = pd.DataFrame({"from": edges[:-1], "to": edges[1:]})
    for kind in (kind for kind in KINDS if (branches["kind"] == kind).any()):
        counts, _ = np.histogram(branches.loc[branches["kind"] == kind, "rate"], edges)
        table[kind] = counts / counts.sum()
    return table


def branch_rates(histogram: pd.DataFrame) -> Figure:
    edges = [*histogram["from"], 1.0]
    curves = [
        Curve(edges, histogram[name], label, kind="stairs") for name, (label, _) in KINDS.items() if name in histogram
    ]
    return plot([Panel("share of branches", curves, PERCENT, PERCENT)], "success rate of the branch")
