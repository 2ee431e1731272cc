"""The page of ``forkrl compare``: how much better B is than A, also at equal tokens, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl.report.compare_figures import budget_curves, difference_forest, spending_curves
from forkrl.report.difference import is_clear, probability, signed_points
from forkrl.report.eval_figures import Ends, ends
from forkrl.report.eval_page import columns, percent
from forkrl.report.page import Card, Page, write_page
from forkrl.report.reading import shortened
from forkrl.report.sections import FigureSection, figure_section

Comparison = Mapping[str, Any]
SHOWN_CHARACTERS = 300


def write_compare_page(folder: Path, comparison: Comparison, prompts: Mapping[str, Mapping[str, str]]) -> Path:
    """Write ``report.html`` of a comparison.

    Args:
        folder: where it goes.
        comparison: as ``comparison.json`` holds it (schema forkrl-compare/1).
        prompts: by benchmark and id, the text of the questions that changed most; may lack any.

    Raises:
        UserError: the page cannot be written.
    """
    return write_page(folder / "report.html", compare_page(comparison, prompts))


def compare_page(comparison: Comparison, prompts: Mapping[str, Mapping[str, str]]) -> Page:
    """What the page says of a comparison; arguments as ``write_compare_page``."""
    a, b = comparison["a"], comparison["b"]
    return Page(
        name=f"{a['model']} → {b['model']}",
        kind="comparison",
        verdict=compare_verdict(comparison),
        figures=_sections(comparison, prompts),
        figures_title="How much better, and at what length",
        notes=comparison["notices"],
        cards=_cards(comparison),
        settings=[(f"{name}: {side['folder']}", _setting_rows(side)) for name, side in (("A", a), ("B", b))],
        provenance=[("version of forkrl", str(comparison["version"])), ("seed of resamples", str(comparison["seed"]))],
        command=str(comparison["command"]),
        source="comparison.json in this folder",
    )


def compare_verdict(comparison: Comparison) -> str:
    """The difference with its interval and p-value, and what is left of it where both spend the same tokens."""
    row = comparison["pooled"] or comparison["benchmarks"][0]
    count = len(comparison["benchmarks"])
    where = f"on average over {count} benchmarks" if count > 1 else f"on {row['title']}"
    difference = ends(row["accuracy"]["difference"])
    text = f"{_points(difference, where)}, {probability(row['p'])}."
    longer = ends(row["length"]["difference"])
    if not is_clear(longer.low, longer.high):
        return f"{text} Its responses are neither clearly longer nor shorter ({longer.mean:+,.0f} tokens)."
    change = "longer" if longer.mean > 0 else "shorter"
    matched = _points(ends(row["length_matched"]["difference"]), "where both spend the same tokens")
    return f"{text} Its responses are {abs(longer.mean):,.0f} tokens {change}. {matched}."


def _points(difference: Ends, where: str) -> str:
    """A difference of accuracy in words; better and worse only where its interval excludes 0."""
    mean, low, high = difference
    if not is_clear(low, high):
        return f"No clear difference {where}: B - A is {signed_points(mean, low, high)}"
    word, sign = ("better", 1) if mean > 0 else ("worse", -1)
    nearer, farther = sorted((100 * sign * low, 100 * sign * high))
    return f"B is {100 * abs(mean):.1f} points [{nearer:.1f}, {farther:.1f}] {word} than A {where}"


def _cards(comparison: Comparison) -> list[Card]:
    row = comparison["pooled"] or comparison["benchmarks"][0]
    accuracy, length, matched = row["accuracy"], row["length"], row["length_matched"]
    means = "mean of the benchmarks; " if comparison["pooled"] else ""
    return [
        Card("Accuracy", f"{_mean(accuracy['b']):.1%}", f"{_mean(accuracy['a']):.1%}", f"{means}A → B"),
        Card("Difference", *_value_and_interval(percent(accuracy["difference"], "+"), "points, paired by question")),
        Card("p-value", probability(row["p"]).removeprefix("p "), note="two-sided, by re-dealing responses"),
        Card("At equal spending", *_value_and_interval(percent(matched["difference"], "+"), "points")),
        Card("Tokens", f"{_mean(length['b']):,.0f}", f"{_mean(length['a']):,.0f}", "a response, A → B"),
    ]


def _value_and_interval(text: str, note: str) -> tuple[str, str, str]:
    value, _, interval = text.partition(" ")
    return value, "", f"{note}, 95% {interval}" if interval else note


def _mean(value: Any) -> float:
    """Of an estimate, or of a number."""
    return ends(value).mean if isinstance(value, Mapping) else float(value)


def _sections(comparison: Comparison, prompts: Mapping[str, Mapping[str, str]]) -> list[FigureSection]:
    benchmarks, pooled = comparison["benchmarks"], comparison["pooled"]
    rows = [_difference_row(each["title"], each, each["questions"]) for each in benchmarks]
    if pooled:
        rows.append(_difference_row("mean", pooled, sum(each["questions"] for each in benchmarks)))
    return [
        figure_section(
            "Differences of accuracy",
            "B minus A, paired by question, with 95% intervals: of the responses as they are, and with the longer "
            "responses cut so that both spend the same tokens on average.",
            difference_forest(benchmarks, pooled),
            pd.DataFrame(rows),
            "compare-differences",
        ),
        figure_section(
            "At equal budgets",
            "Accuracy if every response longer than the budget counts as wrong. Bands: 95%, clustered by question; "
            "the difference in the table is paired, and its interval is narrower than the bands suggest.",
            budget_curves(benchmarks),
            pd.DataFrame([row for each in benchmarks for row in _budget_rows(each)]),
            "compare-budgets",
        ),
        figure_section(
            "At equal spending",
            "Accuracy against the mean of the tokens spent: each side has the budget at which it spends so much. The "
            "right end is where the side of shorter responses is whole.",
            spending_curves(benchmarks),
            pd.DataFrame([row for each in benchmarks for row in _spending_rows(each)]),
            "compare-spending",
        ),
        figure_section(
            "pass@k and maj@k",
            "Both sides, and the paired difference in points with its 95% interval.",
            None,
            pd.DataFrame([row for each in benchmarks for row in _curve_rows(each)]),
            "compare-pass-majority",
        ),
        _changes_section(benchmarks, prompts),
    ]


def _difference_row(title: str, row: Mapping[str, Any], questions: int) -> dict[str, Any]:
    return {
        "benchmark": title,
        "questions": questions,
        "A": _mean(row["accuracy"]["a"]),
        "B": _mean(row["accuracy"]["b"]),
        **columns("difference", row["accuracy"]["difference"]),
        "p": float(row["p"]),
        "p, Holm": row.get("p_holm"),
        "tokens A": _mean(row["length"]["a"]),
        "tokens B": _mean(row["length"]["b"]),
        **columns("tokens_difference", row["length"]["difference"]),
        **columns("at_equal_spending", row["length_matched"]["difference"]),
    }


def _budget_rows(each: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"benchmark": each["title"], "tokens": row["tokens"]}
        | columns("A", row["a"])
        | columns("B", row["b"])
        | columns("difference", row["difference"])
        for row in each["budget"]
    ]


def _spending_rows(each: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {"spent": "spent", "budget_a": "budget A", "budget_b": "budget B", "a": "A", "b": "B"}
    return [
        {"benchmark": each["title"]}
        | {label: float(row[name]) for name, label in names.items()}
        | columns("difference", row["difference"])
        for row in each["equal_spending"]
    ]


def _curve_rows(each: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "benchmark": each["title"],
            "measure": name.replace("k", k),
            "A": f"{row['a']:.1%}",
            "B": f"{row['b']:.1%}",
            "difference": percent(row["difference"], "+"),
        }
        for name in ("pass@k", "maj@k")
        for k, row in (each[name] or {}).items()
    ]


def _changes_section(
    benchmarks: Sequence[Mapping[str, Any]], prompts: Mapping[str, Mapping[str, str]]
) -> FigureSection:
    rows = [
        {
            "benchmark": each["title"],
            "question": change["question"],
            "text": shortened(prompts.get(each["name"], {}).get(change["question"], ""), SHOWN_CHARACTERS),
            "A": f"{change['a']:.0%}",
            "B": f"{change['b']:.0%}",
            "points": f"{100 * change['difference']:+.0f}",
            "tokens A": round(change["length_a"]),
            "tokens B": round(change["length_b"]),
        }
        for each in benchmarks
        for change in each["changes"]
    ]
    counts = "; ".join(
        f"{each['title']}: {each['better']:,} higher for B, {each['worse']:,} lower, {each['same']:,} the same"
        for each in benchmarks
    )
    caption = (
        f"Questions by how much their accuracy changed. {counts}. Single questions are noisy: the largest changes are "
        "in part luck."
    )
    return figure_section("Questions that changed most", caption, None, pd.DataFrame(rows), "compare-questions")


def _setting_rows(side: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    return [(key, str(value), False) for key, value in side.items() if key != "folder"]
