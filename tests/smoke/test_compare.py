"""``forkrl compare``: what it prints and writes, and what it refuses in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from forkrl.commands.report import write_report
from forkrl.store.results import read_results
from tests.fabricated_evaluation import random_responses, write_evaluation, write_lines
from tests.report_page import Page
from tests.smoke.world import World


@pytest.fixture(scope="module")
def evals(world: World) -> Path:
    """Two evaluations of which the second is better, has another temperature and fewer questions, and one of others."""
    folder = world.folder / "evals"
    before = {"aime24": random_responses(20, 4), "mine": random_responses(6, 4, seed=1)}
    after = {"aime24": random_responses(18, 4, seed=7, ability=2, longer=2), "mine": random_responses(6, 4, seed=2)}
    write_evaluation(folder / "a", before, model="base")
    write_evaluation(folder / "b", after, model="trained", temperature=0.6)
    write_evaluation(folder / "other", {"aime25": random_responses(3, 4)})
    (folder / "b" / "responses" / "amc23.jsonl").write_text("")
    (folder / "empty").mkdir()
    return folder


def test_a_comparison_is_printed_and_written(world: World, evals: Path) -> None:
    outcome = world.run("compare", "evals/a", "evals/b")
    assert outcome.code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].startswith("trained is ") and "better than base on average over 2 benchmarks" in lines[0]
    table = lines[lines.index("Differences of accuracy:") + 1 :]
    assert table[0].split("  ")[1] == "benchmark" and "accuracy of trained" in table[0]
    assert [line.split()[0] for line in table[1:4]] == ["AIME'24", "mine", "mean"]
    assert "note: temperature differs: 1.0 for base, 0.6 for trained." in lines
    assert "note: aime24: 2 of 20 questions of base are not in the other; left out." in lines
    assert any(line.startswith("note: amc23: evals/b has not finished it") for line in lines)
    assert lines[-1] == "report: analyses/a-vs-b/report.html"
    stored = read_results(world.folder / "analyses/a-vs-b")
    first = stored.tables["benchmarks"].iloc[0]
    assert (stored.schema, first["benchmark"], first["questions"]) == ("forkrl-compare/2", "aime24", 18)
    assert first["accuracy_difference_low"] > 0 and first["p"] <= first["p_holm"] < 0.05
    assert stored.command == "forkrl compare evals/a evals/b"
    assert list(stored.tables) == ["benchmarks", "passes", "budget", "spending", "changes", "mean"]
    page = Page(world.folder / "analyses/a-vs-b/report.html")
    assert lines[0] in page.text and "What is q00" in page.text
    assert (stored.settings["a"]["folder"], stored.settings["b"]["folder"]) == ("evals/a", "evals/b")
    assert write_report(stored.folder).read_text() == page.source
    again = world.run("compare", "evals/a", "evals/b")
    assert again.stdout == outcome.stdout, "the same command gives the same numbers"


def test_bad_folders_are_refused_in_a_line(world: World, evals: Path) -> None:
    unfinished = shutil.copytree(evals / "a", evals / "unfinished")
    (unfinished / "results.json").unlink()
    damaged = shutil.copytree(evals / "a", evals / "damaged")
    with (damaged / "responses" / "mine.jsonl").open("a") as file:
        file.write('{"question": "q0')
    strangers = shutil.copytree(evals / "other", evals / "strangers")
    for part in ("responses", "scores"):
        path = strangers / part / "aime25.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [row | {"question": f"other{row['question']}"} for row in rows])
    cases = [
        (("evals/a", "evals/none"), "evals/none: is not an evaluation (no results.json)"),
        (("evals/empty", "evals/a"), "evals/empty: is not an evaluation"),
        (
            ("evals/a", "evals/unfinished"),
            "this evaluation is not finished; run its forkrl eval command again with --out",
        ),
        (("evals/damaged", "evals/a"), "mine.jsonl line 25 is not JSON"),
        (("evals/a", "evals/other"), "no benchmark in common (aime24, mine against aime25)"),
        (("evals/other", "evals/strangers"), "aime25: the two evaluations have no question in common"),
        (("evals/a", "evals/b", "--out", "evals/b"), "--out evals/b: is not empty and holds no comparison"),
        (("evals/a", "evals/b", "--out", "recipe.toml"), "--out recipe.toml: is a file"),
    ]
    for argv, says in cases:
        outcome = world.run("compare", *argv)
        assert outcome.code == 2, outcome
        assert says in outcome.line
