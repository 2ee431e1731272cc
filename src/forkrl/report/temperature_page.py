"""The page of a temperature sweep: a verdict, Fig. 3 of the paper, and responses at three settings side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from forkrl.report.fork_view import ForkView, View
from forkrl.report.page import Card, Page
from forkrl.report.sections import FigureSection, figure_section
from forkrl.report.temperature_figures import (
    accuracy_against_temperature,
    length_and_broken,
    surprise_against_temperature,
    sweep_rows,
)

_SHARES = ("broken", "broken_low", "broken_high", "cut", "loop", "garbled")


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """What a page is made from.

    Args:
        name: of the model.
        table: as ``forkrl.analysis.temperature_table`` gives it.
        threshold: nats.
        threshold_origin: where it comes from, such as "given".
        broken_means: what counts as broken, a sentence.
        sentence: the verdict; empty: what the table says.
        base: the temperature that every other setting is compared with.
        views: responses at a few settings.
        settings: what was asked, as (key, value).
        provenance: versions, data, machine.
        command: the command line.
    """

    name: str
    table: pd.DataFrame
    threshold: float
    threshold_origin: str
    broken_means: str
    sentence: str = ""
    base: float = 1.0
    views: Sequence[View] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def temperature_page(sweep: Sweep) -> Page:
    """What the page says of a sweep."""
    failures = int(sweep.table["failures"].sum())
    notes = [f"{failures} responses could not be verified; they count as wrong."] if failures else []
    return Page(
        name=sweep.name,
        kind="decoding temperatures",
        verdict=sweep.sentence or verdict(sweep.table, sweep.base),
        figures=_sections(sweep),
        figures_title="Accuracy, length and nonsense against temperature",
        notes=notes,
        cards=_cards(sweep),
        forks=_forks(sweep),
        settings=[("decode-temps", [(key, value, False) for key, value in sweep.settings.items()])],
        provenance=sorted(sweep.provenance.items()),
        command=sweep.command,
        source="this folder's responses/ and temperatures.json",
    )


def telling_temperatures(table: pd.DataFrame, base: float = 1.0) -> list[float]:
    """Those that the verdict speaks of: the lowest, if below ``base``, and the first above it, if any."""
    temperatures = sorted({*table["high"], *table["low"]})
    below, above = ([value for value in temperatures if sign * value > sign * base] for sign in (-1, 1))
    return [*below[:1], *above[:1]]


def verdict(table: pd.DataFrame, base: float = 1.0) -> str:
    """What a lower and a higher temperature do at forks and elsewhere, with the intervals of the paired differences."""
    sentences = []
    for value in telling_temperatures(table, base):
        change = "Lowering" if value < base else "Raising"
        forks, elsewhere = (_effect(_at(table, varied, value, base)) for varied in ("high", "low"))
        change += f" the temperature at forks from {base:g} to {value:g}"
        sentences.append(f"{change} {forks}; elsewhere it {elsewhere}.")
    if not sentences:
        row = _at(table, "high", base, base)
        return f"Accuracy at temperature {base:g} is {_percent(row, 'accuracy')}; no other temperature was tried."
    return " ".join(sentences)


def _effect(row: pd.Series) -> str:
    """What a setting does to accuracy: a verb, its object, and the interval of the paired difference."""
    points, low, high = (100 * float(row[name]) for name in ("difference", "difference_low", "difference_high"))
    if math.isnan(low):
        return f"changes accuracy by {points:+.1f} points (one problem tells no interval)"
    if high < 0:
        return f"costs {-points:.1f} points of accuracy [{-high:.1f}, {-low:.1f}]"
    if low > 0:
        return f"gains {points:.1f} points of accuracy [{low:.1f}, {high:.1f}]"
    return f"makes no clear difference to accuracy ({points:+.1f} points [{low:+.1f}, {high:+.1f}])"


def _percent(row: pd.Series, name: str) -> str:
    return f"{100 * row[name]:.1f}% [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"


def _at(table: pd.DataFrame, varied: str, value: float, base: float) -> pd.Series:
    rows = sweep_rows(table, varied, base)
    return rows[rows[varied] == value].iloc[0]


def _cards(sweep: Sweep) -> list[Card]:
    base, temperature = _at(sweep.table, "high", sweep.base, sweep.base), f"{sweep.base:g}"
    interval = _percent(base, "accuracy").partition(" ")[2]
    return [
        Card(f"Accuracy at {temperature}, {temperature}", f"{base['accuracy']:.1%}", note=f"95% {interval}"),
        Card("Threshold", f"{sweep.threshold:.3f} nats", note=sweep.threshold_origin),
        Card("Tokens above it", f"{base['forks']:.1%}", note=f"at temperature {temperature}"),
        Card("Responses", f"{len(sweep.table) * base['problems'] * base['samples']:,.0f}", note=_scale(base)),
    ]


def _scale(base: pd.Series) -> str:
    return f"{base['problems']:,.0f} problems, {base['samples']:,.0f} responses to each, at every setting"


def _sections(sweep: Sweep) -> list[FigureSection]:
    table, settings, base = sweep.table, ["high", "low"], sweep.base
    spread = {name: [name, f"{name}_low", f"{name}_high"] for name in ("accuracy", "difference", "length", "surprise")}
    return [
        figure_section(
            "Accuracy",
            "One line varies the temperature where the unscaled entropy is above the threshold, the other where it is "
            f"not; the rest stays at {base:g}. Bars: 95%, clustered by problem. The difference to ({base:g}, {base:g}) "
            "is paired by problem.",
            accuracy_against_temperature(table, base),
            table[settings + spread["accuracy"] + spread["difference"]],
            "temperature-accuracy",
        ),
        figure_section(
            "Length and broken outputs",
            f"Mean tokens per response, and the share of broken outputs. {sweep.broken_means}",
            length_and_broken(table, base),
            table[[*settings, *spread["length"], *_SHARES]],
            "temperature-length-broken",
        ),
        figure_section(
            "Surprise",
            f"Mean of -ln p of the tokens written, p by the unscaled model: far above its value at {base:g}, the text "
            "is nonsense to the model that wrote it. Forks: the share of tokens above the threshold.",
            surprise_against_temperature(table, base),
            table[[*settings, *spread["surprise"], "forks", "tokens"]],
            "temperature-surprise",
        ),
    ]


def _forks(sweep: Sweep) -> ForkView | None:
    if not sweep.views:
        return None
    lead = "The keys visit the tokens above the threshold, which are those that got the temperature of forks."
    return ForkView(sweep.views, lead, sweep.threshold)
