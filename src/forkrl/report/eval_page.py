"""The page of ``forkrl eval``: accuracy beside the paper's, pass@k and maj@k, budgets, lengths, responses to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl.report.eval_figures import (
    FEW_LINES,
    Paper,
    accuracy_against_budget,
    accuracy_beside_paper,
    ends,
    length_distributions,
    pass_and_majority,
)
from forkrl.report.page import Card, Page, write_page
from forkrl.report.reading import ReadQuestion, ReadResponse, Shelf, shortened
from forkrl.report.sections import FigureSection, figure_section

Results = Mapping[str, Any]
Shown = Mapping[str, Sequence[Mapping[str, Any]]]
_SETTINGS = ("model", "engine", "prompt_format", "samples", "temperature", "max_response_tokens", "seed")

_PAPER = (
    " Beneath, for three sizes of Qwen3 base models, the paper's Acc@16: hollow after training on all tokens, full "
    "after training on forks; it gives no intervals."
)


def write_eval_page(
    folder: Path,
    results: Results,
    *,
    average: Results | None = None,
    shown: Shown | None = None,
    paper: Paper | None = None,
) -> Path:
    """Write ``report.html`` of an evaluation.

    Args:
        folder: where it goes.
        results: as ``results.json`` holds them (schema forkrl-eval/2).
        average: ``accuracy`` and ``length`` over the benchmarks, each an estimate; None for a single one.
        shown: by benchmark, questions to read: ``question``, ``prompt``, ``answer``, ``accuracy`` and ``responses``,
            each with ``sample``, ``score``, ``failure``, ``answer``, ``tokens``, ``finished`` and ``text``.
        paper: Table 2 by benchmark and model size: percent after training on all tokens and on forks.

    Raises:
        UserError: the page cannot be written.
    """
    return write_page(folder / "report.html", eval_page(results, average=average, shown=shown or {}, paper=paper or {}))


def eval_page(results: Results, *, average: Results | None, shown: Shown, paper: Paper) -> Page:
    """What the page says of an evaluation; arguments as ``write_eval_page``."""
    return Page(
        name=str(results["model"]),
        kind="evaluation",
        verdict=eval_verdict(results, average),
        figures=_sections(results["benchmarks"], paper),
        figures_title="How well, and at what length",
        notes=_notes(results["benchmarks"]),
        cards=_cards(results, average),
        shelves=[_shelf(each, shown[each["name"]]) for each in results["benchmarks"] if shown.get(each["name"])],
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


def eval_verdict(results: Results, average: Results | None) -> str:
    """Accuracy with its interval, over all benchmarks or of the one, and the length of the responses."""
    benchmarks, samples = results["benchmarks"], results["samples"]
    if unjudged := unjudged_benchmarks(benchmarks):
        return " ".join(unjudged)
    if average is None:
        (each,) = benchmarks
        return (
            f"{each['title']}: Acc@{samples} {percent(each['accuracy'])} on {each['questions']:,} questions, with "
            f"{ends(each['length']).mean:,.0f} tokens a response."
        )
    ordered = sorted(benchmarks, key=lambda each: float(each["accuracy"]["mean"]))
    named = " to ".join(f"{ends(each['accuracy']).mean:.1%} ({each['title']})" for each in (ordered[0], ordered[-1]))
    return (
        f"Acc@{samples} {percent(average['accuracy'])} on average over {len(benchmarks)} benchmarks, from {named}, "
        f"with {ends(average['length']).mean:,.0f} tokens a response."
    )


def percent(estimate: Mapping[str, float | None] | None, sign: str = "") -> str:
    """An estimate in percent with its interval; ``sign`` is "+" for a difference."""
    mean, low, high = (100 * value for value in ends(estimate))
    if math.isnan(mean):
        return "–"
    unit = "" if sign else "%"
    return (
        f"{mean:{sign}.1f}{unit}" if math.isnan(low) else f"{mean:{sign}.1f}{unit} [{low:{sign}.1f}, {high:{sign}.1f}]"
    )


def columns(name: str, estimate: Mapping[str, float | None] | None) -> dict[str, float]:
    """An estimate as three columns of a table."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends(estimate), strict=True))


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
        there = each.get("available_questions") or each["questions"]
        if each["questions"] < there:
            notes.append(f"{each['title']}: the first {each['questions']:,} of {there:,} questions.")
    return notes


def _cards(results: Results, average: Results | None) -> list[Card]:
    benchmarks, samples = results["benchmarks"], results["samples"]
    whole = average or benchmarks[0]
    means = "mean of the benchmarks" if average else ""
    total = sum(each["questions"] for each in benchmarks) * samples
    cut = sum(each["truncated"] * each["questions"] for each in benchmarks) * samples / total
    cards = [
        Card(f"Acc@{samples}", *_value_and_interval(percent(whole["accuracy"]), means)),
        Card(f"Len@{samples}", f"{ends(whole['length']).mean:,.0f} tokens", note=means),
        Card("Responses", f"{total:,}", note=f"to {total // samples:,} questions"),
        Card(
            "Cut at the limit", f"{cut:.1%}", note=f"of all responses; the limit is {results['max_response_tokens']:,}"
        ),
    ]
    seconds = sum(each.get("seconds") or 0 for each in benchmarks)
    if seconds:
        tokens = sum((each.get("tokens_per_s") or 0) * (each.get("seconds") or 0) for each in benchmarks)
        cards.append(Card("Speed", f"{tokens / seconds:,.0f} tokens/s", note=str(results.get("engine", ""))))
    return cards


def _value_and_interval(text: str, note: str) -> tuple[str, str, str]:
    """Of a card: the value, nothing before it, and the interval in the note."""
    value, _, interval = text.partition(" ")
    return value, "", "; ".join(part for part in (f"95% {interval}" if interval else "", note) if part)


def _sections(benchmarks: Sequence[Results], paper: Paper) -> list[FigureSection]:
    compared = any(each["name"] in paper for each in benchmarks)
    few = "" if len(benchmarks) > FEW_LINES else " Bands: 95%, clustered by question."
    sections = [
        figure_section(
            "Accuracy",
            f"Bars: 95% Wilson intervals, clustered by question.{_PAPER if compared else ''}",
            accuracy_beside_paper(benchmarks, paper),
            pd.DataFrame([_accuracy_row(each) for each in benchmarks]),
            "eval-accuracy",
        ),
        figure_section(
            "pass@k and maj@k",
            "pass@k: at least one of k responses is right. maj@k: the most frequent answer of k responses is right "
            f"(right answers are one, ties share). Both are means over all ways to draw k of the responses.{few}",
            pass_and_majority(benchmarks),
            pd.DataFrame([row for each in benchmarks for row in _curve_rows(each)]),
            "eval-pass-majority",
        ),
        figure_section(
            "Accuracy against token budget",
            f"What is left if every response longer than the budget counts as wrong.{few} Spent: the mean of what a "
            "response takes of the budget.",
            accuracy_against_budget(benchmarks),
            pd.DataFrame([row for each in benchmarks for row in _budget_rows(each)]),
            "eval-budget",
        ),
        figure_section(
            "Length of right and wrong responses",
            "Each as shares of its own. Gap: how much longer wrong responses are than right ones to the same question, "
            "so that hard questions, which have longer responses, do not make it.",
            length_distributions(benchmarks),
            pd.DataFrame([_length_row(each) for each in benchmarks]),
            "eval-lengths",
        ),
    ]
    return [*sections, *_paper_section(benchmarks, paper), _trouble_section(benchmarks)]


def _accuracy_row(each: Results) -> dict[str, Any]:
    counts = {"benchmark": each["title"], "questions": each["questions"], "samples": each["samples"]}
    return counts | columns("accuracy", each["accuracy"])


def _curve_rows(each: Results) -> list[dict[str, Any]]:
    votes = each["maj@k"] or {}
    return [
        {"benchmark": each["title"], "k": int(k)} | columns("pass", estimate) | columns("majority", votes.get(k))
        for k, estimate in each["pass@k"].items()
    ]


def _budget_rows(each: Results) -> list[dict[str, Any]]:
    return [
        {"benchmark": each["title"], "tokens": row["tokens"], "spent": float(row["spent"])}
        | columns("accuracy", row["accuracy"])
        for row in each["budget"]
    ]


def _length_row(each: Results) -> dict[str, Any]:
    row: dict[str, Any] = {"benchmark": each["title"]}
    for name, key in (("all", "length"), ("right", "length_right"), ("wrong", "length_wrong"), ("gap", "length_gap")):
        row |= columns(name, each[key])
    return row


def _paper_section(benchmarks: Sequence[Results], paper: Paper) -> list[FigureSection]:
    rows = []
    for each in (each for each in benchmarks if each["name"] in paper):
        row: dict[str, Any] = {"benchmark": each["title"], "this model": percent(each["accuracy"])}
        for size, (before, after) in paper[each["name"]].items():
            row[f"{size}, all tokens → forks"] = f"{before:.2f} → {after:.2f}"
        rows.append(row)
    if not rows:
        return []
    caption = (
        "The paper's Table 2 (arXiv 2506.01939v2), Acc@16 in percent at temperature 1 of Qwen3 base models after RL; "
        "no seeds, no intervals, and the longer responses after training on forks are not controlled for."
    )
    return [figure_section("Beside the paper's Table 2", caption, None, pd.DataFrame(rows), "eval-paper")]


def _trouble_section(benchmarks: Sequence[Results]) -> FigureSection:
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
    return figure_section("What went wrong", caption, None, pd.DataFrame(rows), "eval-trouble")


def _shelf(each: Results, questions: Sequence[Mapping[str, Any]]) -> Shelf:
    note = f"{len(questions)} of {each['questions']:,} questions, from the hardest to the easiest"
    return Shelf(each["title"], note, [_read_question(question, each["samples"]) for question in questions])


def _read_question(question: Mapping[str, Any], samples: int) -> ReadQuestion:
    return ReadQuestion(
        name=question["question"],
        outcome=f"{question['accuracy']:.0%} of {samples} right",
        prompt=shortened(question["prompt"]),
        answer=shortened(question["answer"]),
        responses=[_read_response(response) for response in question["responses"]],
    )


def _read_response(response: Mapping[str, Any]) -> ReadResponse:
    outcome = "failed" if response["failure"] else "right" if response["score"] == 1 else "wrong"
    facts = [f"sample {response['sample'] + 1}", f"{response['tokens']:,} tokens"]
    if not response["finished"]:
        facts.append("cut at the limit")
    if response["failure"]:
        facts.append(response["failure"])
    elif response["answer"] is not None:
        facts.append(f"answered {shortened(response['answer'], 200)}" if response["answer"] else "no answer found")
    return ReadResponse(outcome, facts, shortened(response["text"]))


def _provenance(results: Results) -> list[tuple[str, str]]:
    rows = [(f"version of {name}", str(version)) for name, version in results.get("versions", {}).items()]
    for each in results["benchmarks"]:
        parts = [str(each[key]) for key in ("hub", "revision") if each.get(key)]
        fingerprint = f"fingerprint {each['fingerprint']}" if each.get("fingerprint") else ""
        rows.append((each["name"], ", ".join([*parts, *([fingerprint] if fingerprint else [])])))
    return rows
