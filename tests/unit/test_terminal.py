"""A page in the terminal: headline first, then warnings, cards and tables, aligned; no text can act."""

from __future__ import annotations

import math

import pandas as pd

from forkrl.report.page import Card, Page, Section
from forkrl.report.terminal import describe_page, table_cells


def test_a_page_in_lines() -> None:
    table = pd.DataFrame({"kind": ["forks", "low"], "share": [0.25, 0.0], "share_low": [0.2, -0.1], "share_high": 0.3})
    sections = [
        Section("Shown", "Caption.", "a", pd.DataFrame(), printed=table),
        Section("On the page", "Caption.", "b", table),
        Section("Empty", "Caption.", "c", table, printed=table.iloc[:0]),
    ]
    cards = [Card("Tokens", "12", note="of 3"), Card("Mean entropy", "0.2", "0.1", "nats")]
    page = Page("m", "analysis", "Found.", sections, notes=["none could be judged"], cards=cards)
    assert describe_page(page).splitlines() == [
        "Found.",
        "note: none could be judged",
        "",
        "  Tokens        12         of 3",
        "  Mean entropy  0.1 → 0.2  nats",
        "",
        "Shown:",
        "  kind             share",
        "  forks  0.25 [0.2, 0.3]",
        "  low      0 [-0.1, 0.3]",
    ]


def test_cells_are_short_and_unknown_ends_are_left_out() -> None:
    table = pd.DataFrame(
        {"n": [12345, 7], "x": [-1e-9, 1.23456], "x_low": [math.nan, 1.0], "x_high": [math.nan, 2.0], "y": [None, True]}
    )
    assert table_cells(table) == [["n", "x", "y"], ["12,345", "0", "–"], ["7", "1.235 [1, 2]", "True"]]


def test_text_of_a_model_cannot_act() -> None:
    table = pd.DataFrame({"token": ["\x1b[2J", "a\nb"]})
    text = describe_page(Page("m", "k", "Found\x1b.", [Section("S", "", "s", table, printed=table)]))
    assert "\x1b" not in text and "\\x1b[2J" in text and len(text.splitlines()) == 6
