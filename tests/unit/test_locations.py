"""A mistyped local path is an error at once; a hub id goes to the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.model.locations import model_location
from forkrl.planning.shapes import find_shape
from forkrl.tasks.dataset import load_evaluation_task

LOCAL = [
    "./none", "../none", "~/none", "/none", "none/", "a/b/c", "runs/nope", "runs/demo@step-8", "runs/demo/", "my model",
    "weights/model.safetensors", "C:\\models\\none",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/demo2").mkdir(parents=True)
    (tmp_path / "runs/demo2/notes.md").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", LOCAL)
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(path: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        model_location(path)
    with pytest.raises(UserError, match="no such folder"):
        find_shape(path, None)


@pytest.mark.parametrize("path", [*LOCAL, "runs/nope:test", "questions.jsonl:test"])
def test_neither_is_data(path: str) -> None:
    config = TaskConfig(name="dataset", data=path)
    with pytest.raises(UserError, match="task.data = .*: no such file or folder"):
        load_evaluation_task(config, apply_chat_template=None)


def test_the_nearest_local_name_is_suggested_and_a_file_is_told_from_a_folder() -> None:
    with pytest.raises(UserError, match="did you mean runs/demo2. .the folder runs exists"):
        model_location("runs/demo")
    with pytest.raises(UserError, match="runs/demo2/notes.md': is a file, not a folder"):
        model_location("runs/demo2/notes.md")


def test_a_run_is_not_looked_up_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(UserError, match="runs/nope': no such folder, and there is no folder runs"):
        model_location("runs/nope")


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-8B-Base", "TheBloke/x_y-GGUF", "a.b/c.d"])
def test_a_hub_id_stays_what_it_is(name: str) -> None:
    assert model_location(name) == name
