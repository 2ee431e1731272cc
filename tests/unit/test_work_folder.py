"""The folder of one command's work goes on with its own question and refuses every other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forkrl.commands.work_folder import open_work_folder, stored_settings
from forkrl.errors import UserError

QUESTION: dict[str, Any] = {"schema": "s/1", "seed": 0, "stop": ["a"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with open_work_folder(tmp_path / "work", QUESTION) as folder:
        (folder / "part").touch()
    return folder


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (QUESTION | {"seed": 1}, "(seed = 0, now 1)"),
        (QUESTION | {"stop": []}, "(stop = ['a'], now [])"),
        (QUESTION | {"bins": 5}, "(bins = None, now 5)"),  # a key that the stored question lacks
        ({"schema": "s/1", "seed": 0}, "(stop = ['a'], now None)"),  # and one that the new one lacks
        ({"schema": "s/2"}, "(schema = 's/1', now 's/2')"),
    ],
)
def test_another_question_is_refused_and_nothing_is_touched(folder: Path, asked: dict[str, Any], says: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = pytest.raises(UserError, match="was created with different settings")
    with refused as refusal, open_work_folder(folder, asked):
        pytest.fail("it was opened")
    assert says in str(refusal.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_same_question_goes_on(folder: Path) -> None:
    with open_work_folder(folder, {**QUESTION, "stop": ("a",)}) as again:  # JSON knows no tuples
        assert (again / "part").exists()
    assert stored_settings(folder) == QUESTION


@pytest.mark.parametrize("stored", ["{", json.dumps([1]), "{}"])
def test_damaged_settings_are_refused(folder: Path, stored: str) -> None:
    (folder / "settings.json").write_text(stored)
    refused = pytest.raises(UserError, match=r"settings\.json: .*name another folder with --out")
    with refused, open_work_folder(folder, QUESTION):
        pytest.fail("it was opened")
