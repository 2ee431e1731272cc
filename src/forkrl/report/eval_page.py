"""The page of ``forkrl eval``: accuracy next to the paper's, pass@k, maj@k, budgets, lengths, sample responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.formatting import interval_of, percent
from forkrl.report.page import Card, Page, Section, Shelf, about, interval_card
from forkrl.report.plots import (
    COUNT,
    GREEN,
    HEIGHT,
    MUTED,
    PERCENT,
    VERMILION,
    Curve,
    Panel,
    column_curve,
    finish,
    forest,
    plot,
)
from forkrl.store.results import Results
from forkrl.types import FAILURES

Paper = Mapping[str, Mapping[str, tuple[float, float]]]
"""By benchmark and model size: accuracy in percent after training on all tokens and on forks."""
FEW_LINES = 3
"""Plots of more benchmarks than this have no intervals."""
_PAPER_CAPTION = (
    " Below each, for three sizes of Qwen3 base models, the paper's Acc@16: hollow after training on all tokens, full "
    "after training on forks; it gives no intervals."
)
_PASSES = {"pass": "pass", "maj": "majority"}
# Column names in tables on the page.
_ACCURACY = {"title": "benchmark", "questions": "questions", "samples": "samples", "accuracy": "accuracy"}
_LENGTHS = {
    "title": "benchmark", "length": "all", "length_right": "right", "length_wrong": "wrong", "length_gap": "gap",
}  # fmt: skip
_TROUBLE = {
    "title": "benchmark",
    "truncated": "cut at the limit",
    "unparsed": "no answer found",
    **{f"failed_{reason}": f"failed: {reason}" for reason in FAILURES},
    "entropy": "entropy, nats",
    "tokens_per_s": "tokens/s",
}


def eval_page(results: Results, shelves: Sequence[Shelf], paper: Paper) -> Page:
    sources = [
        (
            row["benchmark"],
            ", ".join(row[key] for key in ("hub", "revision", "fingerprint") if isinstance(row[key], str)),
        )
        for row in results.tables["benchmarks"].to_dict("records")
    ]
    page = Page(
        **about(results),
        kind="evaluation",
        sections=_sections(results.tables, paper),
        sections_title="Accuracy and length",
        cards=_cards(results),
        shelves=shelves,
        source="this folder's results.json and tables/",
    )
    return replace(page, provenance=[*page.provenance, *sources])


def eval_headline(benchmarks: pd.DataFrame, mean: pd.DataFrame) -> str:
    """Accuracy with its interval and response length, or only the benchmarks without any judged response, if any."""
    responses = benchmarks["questions"] * benchmarks["samples"]
    unjudged = [
        f"{row['title']}: none of the {count:,} responses could be judged"
        + (f"; the verifier's first error: {row['first_failure']}." if row["first_failure"] else ".")
        for row, count in zip(benchmarks.to_dict("records"), responses, strict=True)
        if sum(row[f"failed_{reason}"] for reason in FAILURES) == count
    ]
    if unjudged:
        return " ".join(unjudged)
    whole = (mean if len(mean) else benchmarks).iloc[0]
    accuracy = f"Acc@{benchmarks['samples'].iloc[0]} {percent(interval_of(whole, 'accuracy'))}"
    length = f"with {whole['length']:,.0f} tokens a response."
    if not len(mean):
        return f"{whole['title']}: {accuracy} on {whole['questions']:,} questions, {length}"
    ordered = benchmarks.sort_values("accuracy", kind="stable")
    named = " to ".join(f"{row['accuracy']:.1%} ({row['title']})" for _, row in ordered.iloc[[0, -1]].iterrows())
    return f"{accuracy} on average over {len(benchmarks)} benchmarks, from {named}, {length}"


def eval_notes(benchmarks: pd.DataFrame) -> list[str]:
    notes = []
    for row in benchmarks.to_dict("records"):
        reasons = [f"{row[f'failed_{reason}']} by {reason}" for reason in FAILURES if row[f"failed_{reason}"]]
        if reasons:
            notes.append(
                f"{row['title']}: responses that could not be judged count as wrong ({', '.join(reasons)}); the same "
                f"command judges them again."
            )
        if row["unparsed"] > 0:
            notes.append(f"{row['title']}: no answer was found in {row['unparsed']:.1%} of the responses.")
        if row["notice"]:
            notes.append(row["notice"])
        if row["questions"] < row["available_questions"]:
            notes.append(f"{row['title']}: the first {row['questions']:,} of {row['available_questions']:,} questions.")
    return notes


def _cards(results: Results) -> list[Card]:
    benchmarks, mean = results.tables["benchmarks"], results.tables["mean"]
    whole, note = (mean if len(mean) else benchmarks).iloc[0], "mean of the benchmarks" if len(mean) else ""
    questions, samples = benchmarks["questions"].sum(), benchmarks["samples"].iloc[0]
    cut = (benchmarks["truncated"] * benchmarks["questions"]).sum() / questions
    limit = results.settings["max_response_tokens"]
    cards = [
        interval_card(f"Acc@{samples}", interval_of(whole, "accuracy"), note),
        Card(f"Len@{samples}", f"{whole['length']:,.0f} tokens", note=note),
        Card("Responses", f"{questions * samples:,}", note=f"to {questions:,} questions"),
        Card("Cut at the limit", f"{cut:.1%}", note=f"of all responses; the limit is {limit:,}"),
    ]
    if seconds := benchmarks["seconds"].sum():
        tokens = (benchmarks["tokens_per_s"] * benchmarks["seconds"]).sum()
        cards.append(Card("Speed", f"{tokens / seconds:,.0f} tokens/s", note=results.settings["engine"]))
    return cards


def _sections(tables: Mapping[str, pd.DataFrame], paper: Paper) -> list[Section]:
    benchmarks = tables["benchmarks"]
    compared = benchmarks[benchmarks["benchmark"].isin(list(paper))]
    few = "" if len(benchmarks) > FEW_LINES else " Bands: 95%, clustered by question."
    found = [
        Section(
            "Accuracy",
            f"Bars: 95% Wilson intervals, clustered by question.{'' if compared.empty else _PAPER_CAPTION}",
            "eval-accuracy",
            select(benchmarks, _ACCURACY),
            accuracy_and_paper(benchmarks, paper),
            printed=_printed(tables),
        ),
        Section(
            "pass@k and maj@k",
            "pass@k: at least one of k responses is right. maj@k: the most frequent answer of k responses is right "
            f"(right answers are one, ties share). Both are means over all ways to draw k of the responses.{few}",
            "eval-pass-majority",
            tables["passes"],
            pass_and_majority(tables),
        ),
        Section(
            "Accuracy against token budget",
            f"What is left if every response longer than the budget counts as wrong.{few} Spent: the mean of what a "
            "response takes of the budget.",
            "eval-budget",
            tables["budget"],
            accuracy_against_budget(tables),
        ),
        Section(
            "Length of right and wrong responses",
            "Each as shares of its own. Gap: how much longer wrong responses are than right ones to the same question, "
            "so that hard questions, which have longer responses, do not make it.",
            "eval-lengths",
            select(benchmarks, _LENGTHS),
            length_distributions(tables),
        ),
    ]
    if len(compared):
        found.append(_paper_section(compared, paper))
    unanswered = tables.get("unanswered", pd.DataFrame())
    if len(unanswered):
        caption = (
            "Up to three responses of each benchmark in which no answer was found, by their ends; docs/evaluate.md "
            "says what may help."
        )
        printed = unanswered.drop(columns="question")
        found.append(Section("Responses without an answer", caption, "eval-unanswered", unanswered, printed=printed))
    caption = "Shares of all responses. A failed response is one that the verifier could not judge; it counts as wrong."
    return [*found, Section("What went wrong", caption, "eval-trouble", select(benchmarks, _TROUBLE))]


def select(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """The columns that exist, renamed; an estimate includes its interval columns."""
    columns = {f"{old}{end}": f"{new}{end}" for old, new in names.items() for end in ("", "_low", "_high")}
    return table[[name for name in columns if name in table]].rename(columns=columns)


def _printed(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    benchmarks = tables["benchmarks"]
    passes = tables["passes"].drop_duplicates("benchmark", keep="last")  # those of the largest k
    passes = passes.set_index("benchmark").reindex(benchmarks["benchmark"])
    return select(benchmarks, {name: title for name, title in _ACCURACY.items() if name != "samples"}).assign(
        tokens=benchmarks["length"],
        **{f"{name}@{passes['k'].iloc[0]}": passes[column].to_numpy() for name, column in _PASSES.items()},
        truncated=benchmarks["truncated"],
        unparsed=benchmarks["unparsed"],
        unjudged=benchmarks[[f"failed_{reason}" for reason in FAILURES]].sum(axis=1),
    )


def _paper_section(benchmarks: pd.DataFrame, paper: Paper) -> Section:
    table = pd.DataFrame(
        {"benchmark": row["title"], "this model": percent(interval_of(row, "accuracy"))}
        | {f"{size}, all tokens → forks": f"{a:.2f} → {b:.2f}" for size, (a, b) in paper[row["benchmark"]].items()}
        for row in benchmarks.to_dict("records")
    )
    caption = (
        "The paper's Table 2 (arXiv 2506.01939v2), Acc@16 in percent at temperature 1 of Qwen3 base models after RL; "
        "no seeds, no intervals, and the longer responses after training on forks are not controlled for."
    )
    return Section("Compared with the paper's Table 2", caption, "eval-paper", table, printed=table)


def accuracy_and_paper(benchmarks: pd.DataFrame, paper: Paper) -> Figure:
    """Accuracy of each benchmark with its interval; below it the paper's: hollow for all tokens, filled for forks."""
    rows = benchmarks.to_dict("records")
    found = [interval_of(row, "accuracy") for row in rows]
    figure, axes = forest([row["title"] for row in rows], [("this model", found, 0.0)], PERCENT)
    sizes = list(dict.fromkeys(size for row in rows for size in paper.get(row["benchmark"], {})))
    for size, marker in zip(sizes, ("o", "s", "^", "D"), strict=False):
        pairs = [
            (-place - 0.3, paper[row["benchmark"]][size])
            for place, row in enumerate(rows)
            if size in paper.get(row["benchmark"], {})
        ]
        for index, (color, face, label) in enumerate(((MUTED, "none", None), (VERMILION, VERMILION, size))):
            axes.plot(
                [pair[index] / 100 for _, pair in pairs], [place for place, _ in pairs], color=color, marker=marker,
                linestyle="", markersize=4.5, markerfacecolor=face, label=label, clip_on=False,
            )  # fmt: skip
    axes.set_xlim(0, 1)
    finish(axes, "", "accuracy")
    return figure


def pass_and_majority(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """pass@k, and maj@k where the verifier names answers, against k (log scale)."""
    passes = tables["passes"]
    panels = [
        Panel(f"{name}@k", curves, PERCENT, COUNT, legend=name == "pass", log="x")
        for name, column in _PASSES.items()
        if (curves := list(_by_benchmark(tables, "passes", "k", column)))
    ]
    figure = plot(panels, "k", height=HEIGHT + 1.6 * (len(panels) - 1))
    for axes in figure.axes:
        axes.set_xticks(sorted(set(passes["k"])))
    return figure


def accuracy_against_budget(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy if every longer response counts as wrong, against the token budget (log scale)."""
    curves = list(_by_benchmark(tables, "budget", "tokens", "accuracy", marker=""))
    return plot([Panel("accuracy", curves, PERCENT, COUNT, log="x")], "tokens a response may take")


def _by_benchmark(
    tables: Mapping[str, pd.DataFrame], table: str, x: str, column: str, marker: str | None = None
) -> Iterator[Curve]:
    benchmarks = tables["benchmarks"]
    for name, title in zip(benchmarks["benchmark"], benchmarks["title"], strict=True):
        rows = tables[table][tables[table]["benchmark"] == name].dropna(subset=column)
        if len(rows):
            curve = column_curve(rows, rows[x], column, title, marker=marker, kind="band")
            yield curve if len(benchmarks) <= FEW_LINES else replace(curve, low=None, high=None)


def length_distributions(tables: Mapping[str, pd.DataFrame]) -> Figure:
    benchmarks, panels = tables["benchmarks"], list[Panel]()
    for name, title in zip(benchmarks["benchmark"], benchmarks["title"], strict=True):
        bins = tables["lengths"][tables["lengths"]["benchmark"] == name]
        edges = [*bins["from"], bins["to"].iloc[-1]]
        curves = [
            Curve(edges, bins[column] / bins[column].sum(), column, color, kind="stairs")
            for column, color in (("right", GREEN), ("wrong", VERMILION))
            if bins[column].sum()
        ]
        panels.append(Panel("share", curves, PERCENT, COUNT, title=title, legend=not panels))
    return plot(panels, "tokens", height=1.3 + 0.95 * len(benchmarks))
