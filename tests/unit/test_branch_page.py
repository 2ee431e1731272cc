"""The page of ``forkrl branch``: its sentence, its branches, its figures, and text that means harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from forkrl.analysis import branching
from forkrl.report.branch_page import (
    branch_headline,
    branch_page,
    branch_rates,
    natural_against_entropy,
    rate_histogram,
    spread_by_kind,
)
from forkrl.report.page import write_page
from forkrl.store.results import Results
from tests.fabricated_results import made_up_results
from tests.report_page import Page

HOSTILE = "<script>alert(1)</script>\x1b[2J"


class Made(NamedTuple):
    """What a page is made of."""

    results: Results
    rows: list[dict[str, Any]]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        return self.results.tables


def made_up(prompts: int = 12, fork_rates: tuple[float, float] = (0.1, 0.9)) -> Made:
    """Responses of four tokens, branched at a fork (0), at random (1) and at a low one (2)."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    rates = {0: ("fork", fork_rates), 1: ("random", (0.5, 0.4)), 2: ("low", (0.5, 0.0))}
    probability = {0: (0.5, 0.4), 1: (0.999, 1e-3), 2: (0.999999, 1e-6)}
    for prompt in range(prompts):
        branches = [
            {
                "position": position, "kind": kind, "entropy": (0.9, 0.01, 1e-5)[position], "token_id": index,
                "token": HOSTILE if index else "a", "rank": index + 1, "probability": probability[position][index],
                "taken": index == 0, "exact": False, "cut": 0.0, "length": 4.0, "failures": 0,
                "scores": (generator.random(16) < rate).astype(float).tolist(),
            }
            for position, (kind, each) in rates.items()
            for index, rate in enumerate(each)
        ]  # fmt: skip
        rows.append(
            {
                "prompt": prompt, "sample": 0, "prompt_id": str(prompt), "prompt_text": f"{prompt}{HOSTILE}",
                "tokens": ["a", HOSTILE, "c", "d"], "entropy": [0.9, 0.01, 1e-5, 0.2], "logprobs": [-0.7, 0, 0, -0.1],
                "score": 1.0, "finished": True, "branches": branches,
            }
        )  # fmt: skip
    place = ("prompt", "sample")
    table = pd.DataFrame([{name: row[name] for name in place} | each for row in rows for each in row["branches"]])
    table = branching.branch_rates(table)
    spreads = branching.position_spreads(table)
    tables = {
        "kinds": branching.summarise_kinds(spreads),
        "differences": branching.compare_kinds(spreads),
        "relation": branching.entropy_relation(spreads, 0, 200),
        "bins": branching.entropy_bins(spreads),
        "tokens": branching.fork_tokens(table, spreads, min_positions=10),
        "branches": table,
        "positions": spreads,
    }
    facts = {
        "prompts": prompts, "prompts_available": prompts, "responses": prompts, "positions": len(spreads),
        "branches": len(table), "continuations": 16 * len(table),
        "accuracy": 1.0, "accuracy_low": 0.7, "accuracy_high": 1.0,
    }  # fmt: skip
    return Made(made_up_results("branch", facts, tables), rows)


def test_the_verdict_names_each_share_and_says_what_is_settled() -> None:
    report = made_up()
    headline = branch_headline(report.tables)
    share = report.tables["kinds"].set_index("kind").loc["fork", "share"]
    assert f"one fork decides {100 * share:.1f}% [" in headline
    assert "a random other token 0.0% [" in headline or "a random other token -0.0" not in headline
    assert headline.endswith("Within a response forks decide more than its other tokens.")
    assert 0.5 < share < 0.75  # weights 5/9 and 4/9, rates 0.1 and 0.9: natural 0.158 of 0.248


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (made_up(60, (0.5, 0.5)), "is not settled"),
        (made_up(1), "one fork decides"),  # one prompt: no interval, so nothing is said to be settled
        (made_up(4, (0.0, 0.0)), "a random other token"),
    ],
)
def test_verdicts_where_little_is_known(report: Made, says: str) -> None:
    headline = branch_headline(report.tables)
    assert says in headline
    assert "nan" not in headline
    assert "-0.0%" not in headline


def test_nothing_is_decided_where_every_outcome_is_the_same() -> None:
    report = made_up()
    kinds = report.tables["kinds"].assign(share=np.nan)
    assert "Nothing is decided anywhere" in branch_headline({**report.tables, "kinds": kinds})


def test_the_page_shows_the_branches_and_obeys_no_text(tmp_path: Path) -> None:
    report = made_up()
    results = replace(report.results, settings={"model": HOSTILE, "temperature": 1.0}, notes=["Two failed."])
    page = Page(write_page(tmp_path / "report.html", branch_page(results, report.rows)))
    assert HOSTILE not in page.source
    assert "Two failed." in page.text
    (view,) = page.views
    assert len(view["frames"][0]["prompts"]) == 12
    response = view["frames"][0]["prompts"][0]["responses"][0]
    assert sorted(response["b"]) == ["0", "1", "2"]
    assert response["f"] == "", "no token carried gradient, so none is outlined"
    assert page.data["mark"] == 9000  # of 0.9, 0.2, 0.01 and 0 nats in every response the fork is the top fifth
    first = report.tables["branches"].iloc[0]
    numbers = [first["probability"], first["rate"], first["rate_low"], first["rate_high"], 16]
    assert response["b"]["0"][0][1:] == pytest.approx(numbers, abs=1e-4)
    texts = page.data["texts"]
    assert texts[response["b"]["0"][0][0]] == "a"
    assert "<script>" in texts[response["b"]["0"][1][0]]
    assert (len(report.tables["tokens"]), report.tables["tokens"]["positions"][0]) == (1, 12)
    for title in (
        "Which forks decide",
        "By kind of position",
        "Against entropy",
        "Success rates of branches",
        "Forks against the controls",
    ):
        assert title in page.text


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [([1.0], "right"), ([1.0, 1.0], "right"), ([0.0, 0.0], "wrong"), ([1.0, 0.0], "mixed"), ([0.0, 1.0, 1.0], "mixed")],
)
def test_a_prompt_with_right_and_wrong_responses_is_mixed(scores: Sequence[float], outcome: str) -> None:
    report = made_up(1)
    rows = [{**report.rows[0], "sample": number, "score": score} for number, score in enumerate(scores)]
    tried = report.tables["branches"]
    branches = pd.concat([tried.assign(sample=number) for number in range(len(scores))], ignore_index=True)
    forks = branch_page(replace(report.results, tables={**report.tables, "branches": branches}), rows).forks
    assert forks is not None
    (prompt,) = forks.views[0].frames[0].prompts
    assert (prompt.outcome, [response.score for response in prompt.responses]) == (outcome, list(scores))


def test_figures_draw_the_numbers_of_their_tables() -> None:
    report = made_up()
    histogram = rate_histogram(report.tables["branches"])
    for kind in ("fork", "random", "low"):
        assert histogram[kind].sum() == pytest.approx(1)
    figures = [
        natural_against_entropy(report.tables["positions"], report.tables["bins"]),
        spread_by_kind(report.tables["kinds"]),
        branch_rates(histogram),
    ]
    assert all(isinstance(figure, Figure) for figure in figures)
    drawn = {round(float(y), 9) for line in figures[0].axes[0].lines for y in np.atleast_1d(line.get_ydata())}
    assert {round(value, 9) for value in report.tables["positions"]["natural"]} <= drawn
    assert {round(value, 9) for value in report.tables["bins"]["natural"]} <= drawn
    means = {round(float(y), 9) for line in figures[1].axes[0].lines for y in np.atleast_1d(line.get_ydata())}
    assert {round(value, 9) for value in report.tables["kinds"]["forced"]} <= means
