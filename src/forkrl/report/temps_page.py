"""The page of ``forkrl decode-temps``: Fig. 3 of arXiv 2506.01939, and responses at a few settings side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.fork_view import ForkView, View
from forkrl.report.formatting import interval_of, percent
from forkrl.report.page import Card, Page, Section, about, interval_card
from forkrl.report.plots import PERCENT, Panel, column_curve, plot
from forkrl.store.results import Results

BROKEN_MEANS = (
    "Broken is a response that is cut at the limit, or ends in a loop (one block of tokens at least 4 times in a row, "
    "over at least 32 tokens), or holds U+FFFD, which replaces bytes that are not text."
)
_SHARES = ("broken", "broken_low", "broken_high", "cut", "loop", "garbled")
_SWEEPS = (
    ("high", "at forks ({:g} elsewhere)", -0.06),
    ("low", "elsewhere ({:g} at forks)", 0.06),
)
"""Varied column, label, and an offset that keeps both bars visible."""


def temps_page(results: Results, views: Sequence[View]) -> Page:
    table, facts, base = results.tables["settings"], results.facts, results.settings["temperature"]
    row, at = _at(table, "high", base, base), f"{base:g}"
    scale = f"{row['prompts']:,.0f} prompts, {row['samples']:,.0f} responses to each, at every setting"
    lead = "The keys visit the tokens above the threshold, which are those that got the temperature of forks."
    return Page(
        **about(results),
        kind="decoding temperatures",
        sections=_sections(table, base),
        sections_title="Accuracy, length and nonsense against temperature",
        cards=[
            interval_card(f"Accuracy at {at}, {at}", interval_of(row, "accuracy")),
            Card("Threshold", f"{facts['threshold']:.4g} nats", note=facts["threshold_is"]),
            Card("Tokens above it", f"{row['forks']:.1%}", note=f"at temperature {at}"),
            Card("Responses", f"{len(table) * row['prompts'] * row['samples']:,.0f}", note=scale),
        ],
        forks=ForkView(views, lead, facts["threshold"]) if views else None,
        source="this folder's responses/ and tables/",
    )


def telling_temperatures(table: pd.DataFrame, base: float = 1.0) -> list[float]:
    """Temperatures of the headline: the lowest, if below ``base``, and the first above it, if any."""
    temperatures = sorted({*table["high"], *table["low"]})
    below, above = ([value for value in temperatures if sign * value > sign * base] for sign in (-1, 1))
    return [*below[:1], *above[:1]]


def headline(table: pd.DataFrame, base: float = 1.0) -> str:
    """Effects of a lower and a higher temperature at forks and elsewhere, with paired intervals."""
    sentences = []
    for value in telling_temperatures(table, base):
        forks, elsewhere = (_effect(_at(table, varied, value, base)) for varied in ("high", "low"))
        change = f"{'Lowering' if value < base else 'Raising'} the temperature at forks from {base:g} to {value:g}"
        sentences.append(f"{change} {forks}; elsewhere it {elsewhere}.")
    if not sentences:
        accuracy = percent(interval_of(_at(table, "high", base, base), "accuracy"))
        return f"Accuracy at temperature {base:g} is {accuracy}; no other temperature was tried."
    return " ".join(sentences)


def _effect(row: pd.Series) -> str:
    """Effect of a setting on accuracy: a verb, its object, and the interval of the paired difference."""
    points, low, high = (100 * value for value in interval_of(row, "difference"))
    if math.isnan(low):
        return f"changes accuracy by {points:+.1f} points (no interval from one prompt)"
    if high < 0:
        return f"costs {-points:.1f} points of accuracy [{-high:.1f}, {-low:.1f}]"
    if low > 0:
        return f"gains {points:.1f} points of accuracy [{low:.1f}, {high:.1f}]"
    return f"makes no clear difference to accuracy ({points:+.1f} points [{low:+.1f}, {high:+.1f}])"


def sweep_rows(table: pd.DataFrame, varied: str, base: float = 1.0) -> pd.DataFrame:
    """Settings where ``varied`` ("high" or "low") varies and the other is ``base``, sorted."""
    return table[table[{"high": "low", "low": "high"}[varied]] == base].sort_values(varied)


def _at(table: pd.DataFrame, varied: str, value: float, base: float) -> pd.Series:
    rows = sweep_rows(table, varied, base)
    return rows[rows[varied] == value].iloc[0]


def _sections(table: pd.DataFrame, base: float) -> list[Section]:
    settings = ["high", "low"]
    spread = {name: [name, f"{name}_low", f"{name}_high"] for name in ("accuracy", "difference", "length", "surprise")}
    printed = table[[*settings, *spread["accuracy"], *spread["difference"], "length", "broken", "surprise"]].copy()
    printed.loc[table["high"] == table["low"], spread["difference"]] = np.nan  # the baseline itself
    return [
        Section(
            "Accuracy",
            "One line varies the temperature where the unscaled entropy is above the threshold, the other where it is "
            f"not; the rest stays at {base:g}. Bars: 95%, clustered by prompt. The difference to ({base:g}, {base:g}) "
            "is paired by prompt.",
            "temperature-accuracy",
            table[settings + spread["accuracy"] + spread["difference"]],
            accuracy_against_temperature(table, base),
            printed=printed,
        ),
        Section(
            "Length and broken outputs",
            f"Mean tokens per response, and the share of broken outputs. {BROKEN_MEANS}",
            "temperature-length-broken",
            table[[*settings, *spread["length"], *_SHARES]],
            length_and_broken(table, base),
        ),
        Section(
            "Surprise",
            f"Mean of -ln p of the tokens written, p by the unscaled model: far above its value at {base:g}, the text "
            "is nonsense to the model that wrote it. Forks: the share of tokens above the threshold.",
            "temperature-surprise",
            table[[*settings, *spread["surprise"], "forks", "tokens"]],
            surprise_against_temperature(table, base),
        ),
    ]


def accuracy_against_temperature(table: pd.DataFrame, base: float = 1.0) -> Figure:
    """Fig. 3 of the paper: accuracy with 95% intervals. Even spacing keeps temperatures 0 and 0.05 distinguishable."""
    return plot([_panel(table, "accuracy", "accuracy", base, percent=True)], "temperature")


def length_and_broken(table: pd.DataFrame, base: float = 1.0) -> Figure:
    panels = [_panel(table, "length", "tokens", base), _panel(table, "broken", "broken", base, percent=True)]
    return plot(panels, "temperature")


def surprise_against_temperature(table: pd.DataFrame, base: float = 1.0) -> Figure:
    """Negative log-prob of the responses under the unscaled model, nats per token."""
    return plot([_panel(table, "surprise", "nats per token", base)], "temperature")


def _panel(table: pd.DataFrame, name: str, ylabel: str, base: float, *, percent: bool = False) -> Panel:
    """Both sweeps of one quantity; they meet at the baseline."""
    temperatures, curves = sorted({*table["high"], *table["low"]}), []
    for varied, label, offset in _SWEEPS:
        rows = sweep_rows(table, varied, base)
        places = np.array([temperatures.index(value) for value in rows[varied]], dtype=float) + offset
        curves.append(column_curve(rows, places, name, label.format(base), marker=None))
    return Panel(
        ylabel,
        curves,
        PERCENT if percent else None,
        names=[f"{value:g}" for value in temperatures],
        legend=name != "broken",
        vline=(temperatures.index(base), "") if base in temperatures else None,
    )
