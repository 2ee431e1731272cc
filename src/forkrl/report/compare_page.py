"""The page of ``forkrl compare``: how much better the second evaluation is, also at equal tokens, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.eval_page import select
from forkrl.report.formatting import interval_of, is_clear, plain, points, probability
from forkrl.report.page import Card, Page, Section, interval_card
from forkrl.report.plots import (
    COUNT,
    GRID,
    MUTED,
    PERCENT,
    POINTS,
    Curve,
    Panel,
    column_curve,
    finish,
    forest,
    plot,
)
from forkrl.stats.intervals import Estimate
from forkrl.store.results import Results

Names = tuple[str, str]
Tables = Mapping[str, pd.DataFrame]


def side_names(a: Mapping[str, Any], b: Mapping[str, Any]) -> Names:
    """Names of the two sides: their models, or their folders if the models have the same name."""
    for of in (_model_name, lambda side: Path(str(side["folder"])).name, lambda side: str(side["folder"])):
        if of(a) != of(b):
            return of(a), of(b)
    return f"{a['folder']} (first)", f"{b['folder']} (second)"


def _model_name(side: Mapping[str, Any]) -> str:
    return str(side.get("model", "")).rstrip("/").rpartition("/")[2]


def compare_page(results: Results) -> Page:
    sides = [results.settings[side] for side in "ab"]
    names = side_names(sides[0], sides[1])
    return Page(
        name=" → ".join(names),
        kind="comparison",
        headline=results.headline,
        sections=_sections(results.tables, names),
        sections_title="Differences, and at what length",
        notes=results.notes,
        cards=_cards(results.tables),
        settings=[
            (
                f"{name}: {side['folder']}",
                [(key, plain(value), False) for key, value in side.items() if key != "folder"],
            )
            for name, side in zip(names, sides, strict=True)
        ],
        provenance=[*results.versions.items(), ("seed of resamples", str(results.settings["seed"]))],
        command=results.command,
        source="this folder's results.json and tables/",
    )


def _main_row(tables: Tables) -> Any:
    return (tables["mean"] if len(tables["mean"]) else tables["benchmarks"]).iloc[0]


def compare_headline(tables: Tables, names: Names) -> str:
    """The difference with its interval and p-value, and the difference at equal token spending."""
    row, count = _main_row(tables), len(tables["benchmarks"])
    where = f"on average over {count} benchmarks" if count > 1 else f"on {row['title']}"
    text = f"{_in_words(interval_of(row, 'accuracy_difference'), names, where)}, {probability(row['p'])}."
    longer = interval_of(row, "length_difference")
    if not is_clear(longer):
        return f"{text} Its responses are neither clearly longer nor shorter ({longer.mean:+,.0f} tokens)."
    change = "longer" if longer.mean > 0 else "shorter"
    matched = _in_words(interval_of(row, "matched_difference"), names, "where both spend the same tokens")
    return f"{text} Its responses are {abs(longer.mean):,.0f} tokens {change}. {matched}."


def _in_words(difference: Estimate, names: Names, where: str) -> str:
    """A difference of accuracy in words; "better" or "worse" only if its interval excludes 0."""
    a, b = names
    if not is_clear(difference):
        return f"No clear difference {where}: {b} minus {a} is {points(difference)}"
    word, sign = ("better", 1) if difference.mean > 0 else ("worse", -1)
    nearer, farther = sorted((100 * sign * difference.low, 100 * sign * difference.high))
    return f"{b} is {100 * abs(difference.mean):.1f} points [{nearer:.1f}, {farther:.1f}] {word} than {a} {where}"


def _cards(tables: Tables) -> list[Card]:
    row = _main_row(tables)
    signed = {"unit": "", "sign": "+"}
    return [
        Card(
            "Accuracy",
            f"{row['accuracy_b']:.1%}",
            f"{row['accuracy_a']:.1%}",
            "mean of the benchmarks" if len(tables["mean"]) else "",
        ),
        interval_card("Difference", interval_of(row, "accuracy_difference"), "points, paired by question", **signed),
        Card("p-value", _bare_probability(row["p"]), note="two-sided permutation test"),
        interval_card("At equal spending", interval_of(row, "matched_difference"), "points", **signed),
        Card("Tokens", f"{row['length_b']:,.0f}", f"{row['length_a']:,.0f}", "a response"),
    ]


def _sections(tables: Tables, names: Names) -> list[Section]:
    a, b = names
    accuracies = {"a": f"accuracy of {a}", "b": f"accuracy of {b}", "difference": "difference"}
    counts = "; ".join(
        f"{row['title']}: {row['better']:,} higher for {b}, {row['worse']:,} lower, {row['same']:,} the same"
        for row in tables["benchmarks"].to_dict("records")
    )
    return [
        _differences_section(tables, names),
        Section(
            "At equal budgets",
            "Accuracy if every response longer than the budget counts as wrong. Bands: 95%, clustered by question; "
            "the difference in the table is paired, and its interval is narrower than the bands suggest.",
            "compare-budgets",
            select(tables["budget"], _same("benchmark", "tokens") | accuracies),
            budget_curves(tables, names),
        ),
        Section(
            "At equal spending",
            "Accuracy against the mean of the tokens spent: each side has the budget at which it spends that many. The "
            "curves end where the side with the shorter responses is complete.",
            "compare-spending",
            select(
                tables["spending"],
                _same("benchmark", "spent") | {"budget_a": f"budget of {a}", "budget_b": f"budget of {b}"} | accuracies,
            ),
            spending_curves(tables, names),
        ),
        Section(
            "pass@k and maj@k",
            "Both sides, and the paired difference with its 95% interval.",
            "compare-pass-majority",
            select(tables["passes"], _same("benchmark", "measure", "k") | accuracies),
        ),
        Section(
            "Questions that changed most",
            f"Questions by how much their accuracy changed. {counts}. Single questions are noisy: the largest changes "
            "are partly chance.",
            "compare-questions",
            select(
                tables["changes"],
                _same("benchmark", "question", "text")
                | accuracies
                | {"length_a": f"tokens of {a}", "length_b": f"tokens of {b}"},
            ),
        ),
    ]


def _differences_section(tables: Tables, names: Names) -> Section:
    a, b = names
    columns = {
        "title": "benchmark",
        "questions": "questions",
        "accuracy_a": f"accuracy of {a}",
        "accuracy_b": f"accuracy of {b}",
        "accuracy_difference": "difference",
        "p": "p",
        "p_holm": "p, Holm",
        "length_a": f"tokens of {a}",
        "length_b": f"tokens of {b}",
        "length_difference": "tokens_difference",
        "matched_difference": "at_equal_spending",
    }
    table = select(_with_mean(tables), columns)
    sides = [columns[f"{measure}_{side}"] for measure in ("accuracy", "length") for side in "ab"]
    printed = table.drop(columns=[f"{name}{end}" for name in sides for end in ("_low", "_high")])
    for name in ("p", "p, Holm"):
        printed[name] = ["" if pd.isna(p) else _bare_probability(p) for p in table[name]]
    return Section(
        "Differences of accuracy",
        f"{b} minus {a}, paired by question, with 95% intervals: of the responses as they are, and with the longer "
        "responses cut so that both spend the same tokens on average.",
        "compare-differences",
        table,
        difference_forest(tables),
        printed=printed,
    )


def _bare_probability(p: float) -> str:
    """A p-value, never 0: ``0.043`` or ``< 0.001``."""
    return probability(p).removeprefix("p ").removeprefix("= ")


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _with_mean(tables: Tables) -> pd.DataFrame:
    if not len(tables["mean"]):
        return tables["benchmarks"]
    return pd.concat([tables["benchmarks"], tables["mean"].assign(title="mean")])


def difference_forest(tables: Tables) -> Figure:
    rows = _with_mean(tables).to_dict("records")
    measures = [
        (label, [interval_of(row, f"{measure}_difference") for row in rows], offset)
        for measure, label, offset in (("accuracy", "as they are", 0.12), ("matched", "at equal spending", -0.12))
    ]
    figure, axes = forest([row["title"] for row in rows], measures, POINTS)
    axes.axvline(0, color=MUTED, linewidth=1)
    if len(tables["mean"]):
        axes.axhline(1.5 - len(rows), color=GRID, linewidth=1)
    finish(axes, "", "difference of accuracy, points")
    return figure


def budget_curves(tables: Tables, names: Names) -> Figure:
    def curve(rows: pd.DataFrame, side: str, name: str) -> Curve:
        return column_curve(rows, rows["tokens"], side, name, kind="band")

    return _one_plot_each(tables, "budget", names, curve, "tokens a response may take", log="x")


def spending_curves(tables: Tables, names: Names) -> Figure:
    """Accuracy of both against mean tokens spent, up to the smaller mean length, one plot per benchmark."""

    def curve(rows: pd.DataFrame, side: str, name: str) -> Curve:
        return Curve(rows["spent"], rows[side], name)

    return _one_plot_each(tables, "spending", names, curve, "mean tokens spent on a response")


def _one_plot_each(
    tables: Tables,
    table: str,
    names: Names,
    curve: Callable[[pd.DataFrame, str, str], Curve],
    xlabel: str,
    log: str = "",
) -> Figure:
    benchmarks, panels = tables["benchmarks"], []
    columns = min(len(benchmarks), 2)
    for place, (benchmark, title) in enumerate(zip(benchmarks["benchmark"], benchmarks["title"], strict=True)):
        rows = tables[table][tables[table]["benchmark"] == benchmark]
        curves = [curve(rows, side, name) for side, name in zip("ab", names, strict=True)]
        ylabel = "" if place % columns else "accuracy"
        panels.append(Panel(ylabel, curves, PERCENT, COUNT, title=title, log=log, legend=not place))
    height = 1.0 + (1.9 if columns == 1 else 1.55) * -(-len(benchmarks) // columns)
    return plot(panels, xlabel, columns=columns, height=height)
