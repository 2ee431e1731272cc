"""The page of ``forkrl compare``: how much better the second evaluation is, also at equal tokens, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.eval_page import band
from forkrl.report.formatting import interval, is_clear, percent, points, probability
from forkrl.report.page import Card, Page, Section, interval_card, table_of
from forkrl.report.plots import (
    COUNT,
    GRID,
    MUTED,
    PERCENT,
    POINTS,
    Curve,
    Panel,
    finish,
    forest,
    plot,
)
from forkrl.stats.intervals import Estimate

Comparison = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


def side_names(comparison: Comparison) -> tuple[str, str]:
    """What to call the two sides: their models, or their folders where the models have the same name."""
    a, b = comparison["a"], comparison["b"]
    for of in (_model_name, lambda side: Path(str(side["folder"])).name, lambda side: str(side["folder"])):
        if of(a) != of(b):
            return of(a), of(b)
    return f"{a['folder']} (first)", f"{b['folder']} (second)"


def _model_name(side: Mapping[str, Any]) -> str:
    return str(side.get("model", "")).rstrip("/").rpartition("/")[2]


def compare_page(comparison: Comparison) -> Page:
    """The page of a comparison, as ``comparison.json`` holds it (schema forkrl-compare/1)."""
    names = side_names(comparison)
    return Page(
        name=" → ".join(names),
        kind="comparison",
        headline=compare_headline(comparison),
        sections=_sections(comparison),
        sections_title="Differences, and at what length",
        notes=comparison["notices"],
        cards=_cards(comparison),
        settings=[
            (f"{name}: {side['folder']}", [(key, str(value), False) for key, value in side.items() if key != "folder"])
            for name, side in zip(names, (comparison["a"], comparison["b"]), strict=True)
        ],
        provenance=[("version of forkrl", str(comparison["version"])), ("seed of resamples", str(comparison["seed"]))],
        command=str(comparison["command"]),
        source="comparison.json in this folder",
    )


def compare_headline(comparison: Comparison) -> str:
    """The difference with its interval and p-value, and what is left of it where both spend the same tokens."""
    row, names = comparison["pooled"] or comparison["benchmarks"][0], side_names(comparison)
    count = len(comparison["benchmarks"])
    where = f"on average over {count} benchmarks" if count > 1 else f"on {row['title']}"
    text = f"{_in_words(interval(row['accuracy']['difference']), names, where)}, {probability(row['p'])}."
    longer = interval(row["length"]["difference"])
    if not is_clear(longer):
        return f"{text} Its responses are neither clearly longer nor shorter ({longer.mean:+,.0f} tokens)."
    change = "longer" if longer.mean > 0 else "shorter"
    matched = _in_words(interval(row["length_matched"]["difference"]), names, "where both spend the same tokens")
    return f"{text} Its responses are {abs(longer.mean):,.0f} tokens {change}. {matched}."


def _in_words(difference: Estimate, names: tuple[str, str], where: str) -> str:
    """A difference of accuracy; better and worse only where its interval excludes 0."""
    a, b = names
    if not is_clear(difference):
        return f"No clear difference {where}: {b} minus {a} is {points(difference)}"
    word, sign = ("better", 1) if difference.mean > 0 else ("worse", -1)
    nearer, farther = sorted((100 * sign * difference.low, 100 * sign * difference.high))
    return f"{b} is {100 * abs(difference.mean):.1f} points [{nearer:.1f}, {farther:.1f}] {word} than {a} {where}"


def _cards(comparison: Comparison) -> list[Card]:
    row = comparison["pooled"] or comparison["benchmarks"][0]
    accuracy, length, matched = row["accuracy"], row["length"], row["length_matched"]
    means = "mean of the benchmarks" if comparison["pooled"] else ""
    paired = interval_card(
        "Difference", interval(accuracy["difference"]), "points, paired by question", unit="", sign="+"
    )
    return [
        Card("Accuracy", f"{mean_of(accuracy['b']):.1%}", f"{mean_of(accuracy['a']):.1%}", means),
        paired,
        Card("p-value", probability(row["p"]).removeprefix("p ").removeprefix("= "), note="two-sided permutation test"),
        interval_card("At equal spending", interval(matched["difference"]), "points", unit="", sign="+"),
        Card("Tokens", f"{mean_of(length['b']):,.0f}", f"{mean_of(length['a']):,.0f}", "a response"),
    ]


def mean_of(value: Any) -> float:
    """Of an estimate, or of a number."""
    return interval(value).mean if isinstance(value, Mapping) else float(value)


def _sections(comparison: Comparison) -> list[Section]:
    benchmarks, pooled, names = comparison["benchmarks"], comparison["pooled"], side_names(comparison)
    a, b = names
    rows = [(each["title"], each, each["questions"]) for each in benchmarks]
    if pooled:
        rows.append(("mean", pooled, sum(each["questions"] for each in benchmarks)))
    return [
        Section(
            "Differences of accuracy",
            f"{b} minus {a}, paired by question, with 95% intervals: of the responses as they are, and with the longer "
            "responses cut so that both spend the same tokens on average.",
            "compare-differences",
            table_of(_difference_row(*row, names) for row in rows),
            difference_forest(benchmarks, pooled),
        ),
        Section(
            "At equal budgets",
            "Accuracy if every response longer than the budget counts as wrong. Bands: 95%, clustered by question; "
            "the difference in the table is paired, and its interval is narrower than the bands suggest.",
            "compare-budgets",
            table_of(
                {"benchmark": each["title"], "tokens": row["tokens"], f"accuracy of {a}": row["a"]}
                | {f"accuracy of {b}": row["b"], "difference": row["difference"]}
                for each in benchmarks
                for row in each["budget"]
            ),
            budget_curves(benchmarks, names),
        ),
        Section(
            "At equal spending",
            "Accuracy against the mean of the tokens spent: each side has the budget at which it spends that many. The "
            "curves end where the side with the shorter responses is complete.",
            "compare-spending",
            table_of(
                {"benchmark": each["title"], "spent": row["spent"]}
                | {f"budget of {name}": float(row[f"budget_{side}"]) for side, name in zip("ab", names, strict=True)}
                | {f"accuracy of {name}": float(row[side]) for side, name in zip("ab", names, strict=True)}
                | {"difference": row["difference"]}
                for each in benchmarks
                for row in each["equal_spending"]
            ),
            spending_curves(benchmarks, names),
        ),
        Section(
            "pass@k and maj@k",
            "Both sides, and the paired difference in points with its 95% interval.",
            "compare-pass-majority",
            pd.DataFrame(
                {
                    "benchmark": each["title"],
                    "measure": name.replace("k", k),
                    f"accuracy of {a}": f"{row['a']:.1%}",
                    f"accuracy of {b}": f"{row['b']:.1%}",
                    "difference": percent(interval(row["difference"]), unit="", sign="+"),
                }
                for each in benchmarks
                for name in ("pass@k", "maj@k")
                for k, row in (each[name] or {}).items()
            ),
        ),
        _changes_section(benchmarks, names),
    ]


def _difference_row(title: str, row: Mapping[str, Any], questions: int, names: tuple[str, str]) -> dict[str, Any]:
    sides = list(zip("ab", names, strict=True))
    return {
        "benchmark": title,
        "questions": questions,
        **{f"accuracy of {name}": mean_of(row["accuracy"][side]) for side, name in sides},
        "difference": row["accuracy"]["difference"],
        "p": float(row["p"]),
        "p, Holm": row.get("p_holm"),
        **{f"tokens of {name}": mean_of(row["length"][side]) for side, name in sides},
        "tokens_difference": row["length"]["difference"],
        "at_equal_spending": row["length_matched"]["difference"],
    }


def _changes_section(benchmarks: Rows, names: tuple[str, str]) -> Section:
    a, b = names
    rows = [
        {
            "benchmark": each["title"],
            "question": change["question"],
            "text": change["text"],
            f"accuracy of {a}": f"{change['a']:.0%}",
            f"accuracy of {b}": f"{change['b']:.0%}",
            "points": f"{100 * change['difference']:+.0f}",
            f"tokens of {a}": round(change["length_a"]),
            f"tokens of {b}": round(change["length_b"]),
        }
        for each in benchmarks
        for change in each["changes"]
    ]
    counts = "; ".join(
        f"{each['title']}: {each['better']:,} higher for {b}, {each['worse']:,} lower, {each['same']:,} the same"
        for each in benchmarks
    )
    caption = (
        f"Questions by how much their accuracy changed. {counts}. Single questions are noisy: the largest changes are "
        "partly chance."
    )
    return Section("Questions that changed most", caption, "compare-questions", pd.DataFrame(rows))


def difference_forest(benchmarks: Rows, pooled: Mapping[str, Any] | None) -> Figure:
    """The paired difference of accuracy of every benchmark and of their mean, as it is and at equal spending."""
    rows = [(each["title"], each) for each in benchmarks] + ([("mean", pooled)] if pooled is not None else [])
    measures = [
        (label, [interval(row[measure]["difference"]) for _, row in rows], offset)
        for measure, label, offset in (
            ("accuracy", "as they are", 0.12),
            ("length_matched", "at equal spending", -0.12),
        )
    ]
    figure, axes = forest([title for title, _ in rows], measures, POINTS)
    axes.axvline(0, color=MUTED, linewidth=1)
    if pooled is not None:
        axes.axhline(1.5 - len(rows), color=GRID, linewidth=1)
    finish(axes, "", "difference of accuracy, points")
    return figure


def budget_curves(benchmarks: Rows, names: tuple[str, str]) -> Figure:
    """Accuracy of both against the budget of tokens, with 95% bands, one plot a benchmark."""
    curves = [
        [
            band({row["tokens"]: row[side] for row in each["budget"]}, name)
            for side, name in zip("ab", names, strict=True)
        ]
        for each in benchmarks
    ]
    return _one_plot_each(benchmarks, curves, "tokens a response may take", log="x")


def spending_curves(benchmarks: Rows, names: tuple[str, str]) -> Figure:
    """Accuracy of both against the mean of the tokens spent, up to the smaller mean length, one plot a benchmark."""
    curves = [
        [
            Curve(
                [row["spent"] for row in each["equal_spending"]],
                [float(row[side]) for row in each["equal_spending"]],
                name,
            )
            for side, name in zip("ab", names, strict=True)
        ]
        for each in benchmarks
    ]
    return _one_plot_each(benchmarks, curves, "mean tokens spent on a response")


def _one_plot_each(benchmarks: Rows, curves: Sequence[Sequence[Curve]], xlabel: str, log: str = "") -> Figure:
    """Small plots with axes of their own: two columns, or one benchmark alone."""
    columns = min(len(benchmarks), 2)
    panels = [
        Panel(
            "" if place % columns else "accuracy", found, PERCENT, COUNT, title=each["title"], log=log, legend=not place
        )
        for place, (each, found) in enumerate(zip(benchmarks, curves, strict=True))
    ]
    rows = -(-len(benchmarks) // columns)
    return plot(panels, xlabel, columns=columns, height=1.0 + (1.9 if columns == 1 else 1.55) * rows)
