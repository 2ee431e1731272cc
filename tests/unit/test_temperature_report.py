"""The headline, the figures and the page of a temperature sweep."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forkrl.report import Page, write_page
from forkrl.report.fork_view import Frame, ShownPrompt, ShownResponse, View
from forkrl.report.formatting import unverified
from forkrl.report.temps_page import (
    accuracy_against_temperature,
    headline,
    length_and_broken,
    surprise_against_temperature,
    sweep_rows,
    telling_temperatures,
    temps_page,
)
from tests.fabricated_results import made_up_results

HOSTILE = "<script>alert(1)</script>\ufffd\u202e"


def at_half(table: pd.DataFrame) -> pd.DataFrame:
    """The same figures of a sweep whose baseline is temperature 0.5."""
    return table.assign(**{name: table[name].replace(1, 0.5) for name in ("high", "low")})


def row(high: float, low: float, **changes: Any) -> dict[str, Any]:
    estimates = {"accuracy": 0.5, "difference": 0.0, "length": 80.0, "broken": 0.1, "surprise": 0.2}
    figures = {name: changes.pop(name, value) for name, value in estimates.items()}
    spread: dict[str, Any] = {}
    for name, value in figures.items():
        low_end, high_end = changes.pop(f"{name}_ends", (value - 0.05, value + 0.05))
        spread |= {name: value, f"{name}_low": low_end, f"{name}_high": high_end}
    shares = {"cut": 0.1, "loop": 0.05, "garbled": 0.0, "forks": 0.2}
    counts = {"prompts": 30, "samples": 4, "tokens": 9600, "failures": 0}
    return {"high": high, "low": low, **spread, **shares, **counts, **changes}


TABLE = pd.DataFrame(
    [
        row(1, 1),
        row(0, 1, accuracy=0.1, difference=-0.12, difference_ends=(-0.16, -0.08)),
        row(0.3, 1, accuracy=0.38),
        row(0.6, 1),
        row(3, 1, accuracy=0.6, difference=0.1, difference_ends=(0.02, 0.18)),
        row(1, 0, difference=-0.01, difference_ends=(-0.04, 0.02)),
        row(1, 0.3),
        row(1, 0.6),
        row(1, 3, accuracy=0.0, difference=-0.5, difference_ends=(-0.6, -0.4)),
    ]
)


def test_the_verdict_says_what_each_temperature_does_with_its_interval() -> None:
    assert headline(TABLE) == (
        "Lowering the temperature at forks from 1 to 0 costs 12.0 points of accuracy [8.0, 16.0]; "
        "elsewhere it makes no clear difference to accuracy (-1.0 points [-4.0, +2.0]). "
        "Raising the temperature at forks from 1 to 3 gains 10.0 points of accuracy [2.0, 18.0]; "
        "elsewhere it costs 50.0 points of accuracy [40.0, 60.0]."
    )


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ((-0.03, 0.0004), "makes no clear difference to accuracy (-1.0 points [-3.0, +0.0])"),
        ((-0.03, -0.0004), "costs 1.0 points of accuracy [0.0, 3.0]"),
        ((-0.0004, 0.03), "makes no clear difference to accuracy (+1.0 points [-0.0, +3.0])"),
        ((0.0004, 0.03), "gains 1.0 points of accuracy [0.0, 3.0]"),
    ],
)
def test_an_interval_that_holds_zero_by_little_settles_nothing(ends: tuple[float, float], says: str) -> None:
    difference = math.copysign(0.01, sum(ends))
    table = pd.DataFrame([row(1, 1), row(2, 1, difference=difference, difference_ends=ends), row(1, 2)])
    assert f"at forks from 1 to 2 {says}" in headline(table)


def test_the_verdict_without_other_temperatures_or_intervals() -> None:
    assert (
        headline(TABLE.iloc[:1]) == "Accuracy at temperature 1 is 50.0% [45.0, 55.0]; no other temperature was tried."
    )
    nothing = (math.nan, math.nan)
    one = pd.DataFrame([row(1, 1), row(2, 1, difference_ends=nothing), row(1, 2, difference_ends=nothing)])
    assert "changes accuracy by +0.0 points (no interval from one prompt)" in headline(one)


def test_the_verdict_speaks_of_the_lowest_and_of_the_first_above_1() -> None:
    eight = [0, 0.05, 0.3, 0.6, 1, 2, 3, 5]
    assert telling_temperatures(pd.DataFrame({"high": eight, "low": 1})) == [0, 2]
    assert telling_temperatures(TABLE.iloc[:2]) == [0]
    assert telling_temperatures(TABLE.iloc[:1]) == []


@pytest.mark.parametrize(("varied", "accuracy"), [("high", [0.1, 0.38, 0.5, 0.5, 0.6]), ("low", [0.5] * 4 + [0.0])])
def test_a_sweep_is_in_order_with_the_unscaled_model_in_it(varied: str, accuracy: list[float]) -> None:
    rows = sweep_rows(TABLE, varied)
    assert rows[varied].tolist() == [0, 0.3, 0.6, 1, 3]
    assert rows["accuracy"].tolist() == accuracy


def test_the_figures_draw_both_sweeps_at_even_distances() -> None:
    for figure in (accuracy_against_temperature(TABLE), surprise_against_temperature(TABLE), length_and_broken(TABLE)):
        assert all(len(axes.containers) == 2 for axes in figure.axes)
        labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
        assert labels == ["0", "0.3", "0.6", "1", "3"]
        assert figure.axes[-1].get_xticks().tolist() == [0, 1, 2, 3, 4]
    (axes,) = accuracy_against_temperature(TABLE).axes
    drawn = [container.lines[0].get_ydata().tolist() for container in axes.containers]  # type: ignore[attr-defined]
    assert drawn == [[0.1, 0.38, 0.5, 0.5, 0.6], [0.5, 0.5, 0.5, 0.5, 0.0]]


def sweep(table: pd.DataFrame = TABLE, views: bool = True, base: float = 1.0, **changes: Any) -> Page:
    response = ShownResponse("high 1, low 1", [HOSTILE, "b"], [[0.1, 0.9]], [-0.1, -0.9], score=1.0, finished=False)
    shown = [View("Temperature 0", HOSTILE, [Frame("", [ShownPrompt(HOSTILE, "right", [response])])])]
    facts = {"threshold": 0.672, "threshold_is": "given"}
    results = made_up_results("decode-temps", facts, {"settings": table}, model=HOSTILE, temperature=base)
    results = replace(results, headline=headline(table, base), command=HOSTILE, **changes)
    return temps_page(results, shown if views else [])


def test_a_sweep_around_another_temperature_names_it_everywhere(tmp_path: Path) -> None:
    table = at_half(TABLE)
    assert headline(table, 0.5).startswith("Lowering the temperature at forks from 0.5 to 0 costs 12.0 points")
    assert telling_temperatures(table, 0.5) == [0, 0.6]
    assert headline(table.iloc[:1], 0.5).startswith("Accuracy at temperature 0.5 is 50.0%")
    (axes,) = accuracy_against_temperature(table, 0.5).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "at forks (0.5 elsewhere)",
        "elsewhere (0.5 at forks)",
    ]
    text = write_page(tmp_path / "report.html", sweep(table=table, base=0.5)).read_text()
    for part in ("Accuracy at 0.5, 0.5", "the rest stays at 0.5", "difference to (0.5, 0.5)", "at temperature 0.5"):
        assert part in text


def test_the_page_holds_verdict_numbers_and_responses_and_no_markup_of_theirs(tmp_path: Path) -> None:
    text = write_page(tmp_path / "report.html", sweep()).read_text(encoding="utf-8")
    assert "costs 12.0 points of accuracy [8.0, 16.0]" in text
    for part in ("temperature-accuracy.csv", "temperature-length-broken.csv", "temperature-surprise.csv", "0.672 nats"):
        assert part in text
    assert "<script>alert" not in text and "\u202e" not in text
    assert 'id="forks"' in text


def test_a_page_without_responses_has_no_fork_view_and_failures_are_noted(tmp_path: Path) -> None:
    page = sweep(views=False, notes=unverified(9, "responses"))
    assert page.forks is None
    assert page.notes == ["9 responses could not be verified; they count as wrong."]
    write_page(tmp_path / "report.html", page)


def test_bars_of_one_problem_are_left_out() -> None:
    nothing = {f"{name}_ends": (math.nan, math.nan) for name in ("length", "surprise")}
    one = pd.DataFrame([row(1, 1, **nothing), row(0, 1, **nothing), row(1, 0, **nothing)])
    assert length_and_broken(one).axes
