"""The page of ``forkrl eval``: accuracy and the paper's, pass@k and maj@k, budgets, lengths, responses to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.formatting import interval, percent
from forkrl.report.page import Card, Page, Section, Shelf, interval_card, table_of, write_page
from forkrl.report.plots import (
    COUNT,
    GREEN,
    HEIGHT,
    MUTED,
    PERCENT,
    VERMILION,
    Curve,
    Panel,
    finish,
    forest,
    plot,
)

Results = Mapping[str, Any]
Paper = Mapping[str, Mapping[str, tuple[float, float]]]
FEW_LINES = 3
"""With more benchmarks than this the intervals are in the table alone."""
_SETTINGS = ("model", "engine", "prompt_format", "samples", "temperature", "max_response_tokens", "seed")
_PAPER_CAPTION = (
    " Below each, for three sizes of Qwen3 base models, the paper's Acc@16: hollow after training on all tokens, full "
    "after training on forks; it gives no intervals."
)


def write_eval_page(
    folder: Path,
    results: Results,
    *,
    average: Results | None = None,
    shelves: Sequence[Shelf] = (),
    paper: Paper | None = None,
) -> Path:
    """Write ``report.html`` of an evaluation.

    Args:
        folder: where it goes.
        results: as ``results.json`` holds them (schema forkrl-eval/2).
        average: ``accuracy`` and ``length`` over the benchmarks, each an estimate; None for a single one.
        shelves: responses to read.
        paper: Table 2 by benchmark and model size: percent after training on all tokens and on forks.
    """
    return write_page(folder / "report.html", eval_page(results, average=average, shelves=shelves, paper=paper or {}))


def eval_page(results: Results, *, average: Results | None, shelves: Sequence[Shelf], paper: Paper) -> Page:
    """The page of an evaluation; arguments as ``write_eval_page``."""
    return Page(
        name=str(results["model"]),
        kind="evaluation",
        headline=eval_headline(results, average),
        sections=_sections(results["benchmarks"], paper),
        sections_title="Accuracy and length",
        notes=_notes(results["benchmarks"]),
        cards=_cards(results, average),
        shelves=shelves,
        settings=[("eval", [(key, str(results[key]), False) for key in _SETTINGS if key in results])],
        provenance=_provenance(results),
        command=str(results.get("command", "")),
        source="this folder's results.json",
    )


def unjudged_benchmarks(benchmarks: Sequence[Results]) -> list[str]:
    """A sentence for each benchmark of which no response could be judged: its accuracy of 0 measures nothing."""
    sentences = []
    for each in benchmarks:
        responses = each["questions"] * each["samples"]
        if sum(each["failures"].values()) == responses:
            error = f"; the verifier's first error: {each['first_failure']}" if each.get("first_failure") else ""
            sentences.append(f"{each['title']}: none of the {responses:,} responses could be judged{error}.")
    return sentences


def eval_headline(results: Results, average: Results | None) -> str:
    """Accuracy with its interval, over all benchmarks or of the one, and the length of the responses."""
    benchmarks, samples = results["benchmarks"], results["samples"]
    if unjudged := unjudged_benchmarks(benchmarks):
        return " ".join(unjudged)
    whole = average or benchmarks[0]
    accuracy = f"Acc@{samples} {percent(interval(whole['accuracy']))}"
    length = f"with {interval(whole['length']).mean:,.0f} tokens a response."
    if average is None:
        return f"{whole['title']}: {accuracy} on {whole['questions']:,} questions, {length}"
    ordered = sorted(benchmarks, key=lambda each: float(each["accuracy"]["mean"]))
    named = " to ".join(f"{each['accuracy']['mean']:.1%} ({each['title']})" for each in (ordered[0], ordered[-1]))
    return f"{accuracy} on average over {len(benchmarks)} benchmarks, from {named}, {length}"


def _notes(benchmarks: Sequence[Results]) -> list[str]:
    notes = []
    for each in benchmarks:
        if failures := sum(each["failures"].values()):
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in each["failures"].items())
            notes.append(
                f"{each['title']}: {failures:,} responses could not be judged ({reasons}); they count as wrong."
            )
        if each.get("notice"):
            notes.append(each["notice"])
        available = each.get("available_questions") or each["questions"]
        if each["questions"] < available:
            notes.append(f"{each['title']}: the first {each['questions']:,} of {available:,} questions.")
    return notes


def _cards(results: Results, average: Results | None) -> list[Card]:
    benchmarks, samples = results["benchmarks"], results["samples"]
    whole, means = average or benchmarks[0], "mean of the benchmarks" if average else ""
    total = sum(each["questions"] for each in benchmarks) * samples
    cut = sum(each["truncated"] * each["questions"] for each in benchmarks) * samples / total
    cards = [
        interval_card(f"Acc@{samples}", interval(whole["accuracy"]), means),
        Card(f"Len@{samples}", f"{interval(whole['length']).mean:,.0f} tokens", note=means),
        Card("Responses", f"{total:,}", note=f"to {total // samples:,} questions"),
        Card(
            "Cut at the limit", f"{cut:.1%}", note=f"of all responses; the limit is {results['max_response_tokens']:,}"
        ),
    ]
    if seconds := sum(each.get("seconds") or 0 for each in benchmarks):
        tokens = sum((each.get("tokens_per_s") or 0) * (each.get("seconds") or 0) for each in benchmarks)
        cards.append(Card("Speed", f"{tokens / seconds:,.0f} tokens/s", note=str(results.get("engine", ""))))
    return cards


def _sections(benchmarks: Sequence[Results], paper: Paper) -> list[Section]:
    compared = any(each["name"] in paper for each in benchmarks)
    few = "" if len(benchmarks) > FEW_LINES else " Bands: 95%, clustered by question."
    found = [
        Section(
            "Accuracy",
            f"Bars: 95% Wilson intervals, clustered by question.{_PAPER_CAPTION if compared else ''}",
            "eval-accuracy",
            table_of(
                {"benchmark": each["title"], **{name: each[name] for name in ("questions", "samples", "accuracy")}}
                for each in benchmarks
            ),
            accuracy_and_paper(benchmarks, paper),
        ),
        Section(
            "pass@k and maj@k",
            "pass@k: at least one of k responses is right. maj@k: the most frequent answer of k responses is right "
            f"(right answers are one, ties share). Both are means over all ways to draw k of the responses.{few}",
            "eval-pass-majority",
            table_of(
                {"benchmark": each["title"], "k": int(k), "pass": found, "majority": (each["maj@k"] or {}).get(k, {})}
                for each in benchmarks
                for k, found in each["pass@k"].items()
            ),
            pass_and_majority(benchmarks),
        ),
        Section(
            "Accuracy against token budget",
            f"What is left if every response longer than the budget counts as wrong.{few} Spent: the mean of what a "
            "response takes of the budget.",
            "eval-budget",
            table_of({"benchmark": each["title"], **row} for each in benchmarks for row in each["budget"]),
            accuracy_against_budget(benchmarks),
        ),
        Section(
            "Length of right and wrong responses",
            "Each as shares of its own. Gap: how much longer wrong responses are than right ones to the same question, "
            "so that hard questions, which have longer responses, do not make it.",
            "eval-lengths",
            table_of(
                {"benchmark": each["title"], "all": each["length"]}
                | {name: each[f"length_{name}"] or {} for name in ("right", "wrong", "gap")}
                for each in benchmarks
            ),
            length_distributions(benchmarks),
        ),
    ]
    if compared:
        found.append(_paper_section([each for each in benchmarks if each["name"] in paper], paper))
    return [*found, _trouble_section(benchmarks)]


def _paper_section(benchmarks: Sequence[Results], paper: Paper) -> Section:
    rows = [
        {"benchmark": each["title"], "this model": percent(interval(each["accuracy"]))}
        | {f"{size}, all tokens → forks": f"{a:.2f} → {b:.2f}" for size, (a, b) in paper[each["name"]].items()}
        for each in benchmarks
    ]
    caption = (
        "The paper's Table 2 (arXiv 2506.01939v2), Acc@16 in percent at temperature 1 of Qwen3 base models after RL; "
        "no seeds, no intervals, and the longer responses after training on forks are not controlled for."
    )
    return Section("Compared with the paper's Table 2", caption, "eval-paper", pd.DataFrame(rows))


def _trouble_section(benchmarks: Sequence[Results]) -> Section:
    reasons = list(dict.fromkeys(reason for each in benchmarks for reason in each["failures"]))
    rows = [
        {
            "benchmark": each["title"],
            "responses": each["questions"] * each["samples"],
            "cut at the limit": f"{each['truncated']:.1%}",
            "no answer found": "–" if each["unparsed"] is None else f"{each['unparsed']:.1%}",
            **{f"failed: {reason}": each["failures"].get(reason, 0) for reason in reasons},
            "entropy, nats": each["entropy"],
            "tokens/s": each.get("tokens_per_s"),
        }
        for each in benchmarks
    ]
    caption = "Shares of all responses. A failed response is one that the verifier could not judge; it counts as wrong."
    return Section("What went wrong", caption, "eval-trouble", pd.DataFrame(rows))


def _provenance(results: Results) -> list[tuple[str, str]]:
    rows = [(f"version of {name}", str(version)) for name, version in results.get("versions", {}).items()]
    for each in results["benchmarks"]:
        parts = [str(each[key]) for key in ("hub", "revision") if each.get(key)]
        parts += [f"fingerprint {each['fingerprint']}"] if each.get("fingerprint") else []
        rows.append((each["name"], ", ".join(parts)))
    return rows


def accuracy_and_paper(benchmarks: Sequence[Results], paper: Paper) -> Figure:
    """Accuracy of each benchmark with its interval; below it the paper's, hollow on all tokens, full on forks.

    Args:
        benchmarks: of ``results.json``.
        paper: by benchmark and model size, percent after training on all tokens and on forks.
    """
    found = [interval(each["accuracy"]) for each in benchmarks]
    figure, axes = forest([each["title"] for each in benchmarks], [("this model", found, 0.0)], PERCENT)
    sizes = list(dict.fromkeys(size for each in benchmarks for size in paper.get(each["name"], {})))
    for size, marker in zip(sizes, ("o", "s", "^", "D"), strict=False):
        rows = [
            (-place - 0.3, paper[each["name"]][size])
            for place, each in enumerate(benchmarks)
            if size in paper.get(each["name"], {})
        ]
        for index, (color, face, label) in enumerate(((MUTED, "none", None), (VERMILION, VERMILION, size))):
            axes.plot(
                [pair[index] / 100 for _, pair in rows], [place for place, _ in rows], color=color, marker=marker,
                linestyle="", markersize=4.5, markerfacecolor=face, label=label, clip_on=False,
            )  # fmt: skip
    axes.set_xlim(0, 1)
    finish(axes, "", "accuracy")
    return figure


def pass_and_majority(benchmarks: Sequence[Results]) -> Figure:
    """pass@k, and below it maj@k of benchmarks whose verifier names answers, against k on a logarithmic scale."""
    names = ["pass@k", *(["maj@k"] if any(each["maj@k"] for each in benchmarks) else [])]
    panels = []
    for name in names:
        points = [{int(k): found for k, found in (each[name] or {}).items()} for each in benchmarks]
        curves = _by_benchmark(benchmarks, points)
        panels.append(Panel(name, curves, PERCENT, COUNT, legend=name == names[0], log="x"))
    figure = plot(panels, "k", height=HEIGHT + 1.6 * (len(names) - 1))
    for axes in figure.axes:
        axes.set_xticks(sorted({int(k) for each in benchmarks for k in each["pass@k"]}))
    return figure


def accuracy_against_budget(benchmarks: Sequence[Results]) -> Figure:
    """Accuracy if every longer response counted as wrong, against the budget in tokens, on a logarithmic scale."""
    points = [{row["tokens"]: row["accuracy"] for row in each["budget"]} for each in benchmarks]
    curves = _by_benchmark(benchmarks, points, markers=False)
    return plot([Panel("accuracy", curves, PERCENT, COUNT, log="x")], "tokens a response may take")


def _by_benchmark(
    benchmarks: Sequence[Results], points: Sequence[Mapping[int, Any]], *, markers: bool = True
) -> list[Curve]:
    """One curve a benchmark from its estimates by x, with their intervals where there are few benchmarks."""
    marker, shaded = None if markers else "", len(benchmarks) <= FEW_LINES
    return [
        band(found, each["title"], marker=marker, shaded=shaded)
        for each, found in zip(benchmarks, points, strict=True)
        if found
    ]


def band(points: Mapping[int, Any], label: str, *, marker: str | None = "", shaded: bool = True) -> Curve:
    """Estimates by their x as a curve, with their intervals if ``shaded``."""
    mean, low, high = zip(*(interval(each) for each in points.values()), strict=True)
    curve = Curve(list(points), mean, label, marker=marker, kind="band")
    return replace(curve, low=low, high=high) if shaded else curve


def length_distributions(benchmarks: Sequence[Results]) -> Figure:
    """Share of right and of wrong responses by length, one plot a benchmark."""
    panels = []
    for each in benchmarks:
        counts = {name: np.asarray(each["lengths"][name], dtype=np.float64) for name in ("right", "wrong")}
        curves = [
            Curve(each["lengths"]["edges"], counts[name] / counts[name].sum(), name, color, kind="stairs")
            for name, color in (("right", GREEN), ("wrong", VERMILION))
            if counts[name].sum()
        ]
        panels.append(Panel("share", curves, PERCENT, COUNT, title=each["title"], legend=each is benchmarks[0]))
    return plot(panels, "tokens", height=1.3 + 0.95 * len(benchmarks))
