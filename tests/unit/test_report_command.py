"""``forkrl report DIR``: which folders it takes; every other command's folder is tested with that command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forkrl.commands.compare import compare_evaluations
from forkrl.commands.options import CompareOptions
from forkrl.commands.report import write_report
from forkrl.errors import UserError
from forkrl.evaluation.eval_report import write_eval_report
from tests.fabricated_evaluation import random_responses, write_evaluation
from tests.fabricated_run import write_run


def test_pages_of_a_run_an_evaluation_and_a_comparison_are_made_again(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write_evaluation(tmp_path / name, {"x": random_responses(9, 2, seed=seed)}, model=f"model {name}")
    made = [
        write_eval_report(tmp_path / "a"),
        compare_evaluations(CompareOptions(tmp_path / "a", tmp_path / "b", out=tmp_path / "c")).page,
        write_report(write_run(tmp_path / "run", steps=0)),
    ]
    assert "What is q0" in made[1].read_text()
    for page in made:
        before = page.read_text()
        page.unlink()
        assert write_report(page.parent) == page
        assert page.read_text() == before


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "no such folder; name a run"),
        ({}, "no finished output of forkrl"),
        ({"settings.json": "{}"}, "the same command finishes an interrupted one"),
        ({"comparison.json": "["}, "comparison.json: cannot be read"),
        ({"comparison.json": "[]"}, "comparison.json: is not a JSON object"),
        ({"results.json": "{"}, "results.json: cannot be read"),
        ({"results.json": "{}"}, "results.json: has the unknown schema 'None'"),
        ({"results.json": json.dumps({"schema": "forkrl-brew/1"})}, "has the unknown schema 'forkrl-brew/1'"),
        ({"results.json": json.dumps({"schema": "forkrl-drift/2"})}, "another version of ForkRL wrote it"),
    ],
)
def test_other_folders_are_refused_in_a_line(tmp_path: Path, files: dict[str, str] | None, says: str) -> None:
    folder = tmp_path / "x"
    if files is not None:
        folder.mkdir()
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=says) as refused:
        write_report(folder)
    assert "\n" not in str(refused.value)
