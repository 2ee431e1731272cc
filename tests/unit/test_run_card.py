"""What a model card says, and what is left out of it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace

import pytest

from forkrl.report.run_card import LOCAL, model_card, published_base, published_run
from forkrl.report.run_data import RunData, read_run
from tests.fabricated_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(write_run(tmp_path_factory.mktemp("card") / "run"), 0)


def test_absolute_paths_are_reduced_to_their_last_part(run: RunData) -> None:
    settings = {
        "model": {"path": "/home/me/models/base"},
        "task": {"data": "~/data/a b.jsonl", "parts": [{"data": "/data/c.parquet"}], "template": "{prompt} / 2"},
        "cluster": {"overrides": ["trainer.default_local_dir=/scratch/me/x", "a.b=1/2"]},
        "log": {"trackers": ["file:///home/me/t"]},
    }
    found = published_run(replace(run, settings=settings, provenance={"command": "forkrl x", "threads": 1}))
    assert found.settings == {
        "model": {"path": "base"},
        "task": {"data": "a b.jsonl", "parts": [{"data": "c.parquet"}], "template": "{prompt} / 2"},
        "cluster": {"overrides": ["trainer.default_local_dir=x", "a.b=1/2"]},
        "log": {"trackers": ["t"]},
    }
    assert found.provenance == {"threads": 1}


def test_only_a_model_that_others_can_get_is_named() -> None:
    assert published_base("embedded:countdown-base", "package") == "embedded:countdown-base"
    for name in ("Qwen/Qwen3-0.6B", "gpt2"):
        assert published_base(name, "hub") == name
        assert published_base(name, "folder") == LOCAL, "a folder of that name"
        assert published_base(name, None) == LOCAL, "a run of an earlier version does not say"
    for path in ("./x", "~/x", "runs/b/checkpoints/step-2"):
        assert published_base(path, "hub") == LOCAL, path


def test_notes_name_no_path_of_this_machine(run: RunData) -> None:
    noted = replace(run, notes=["rollouts cannot be read: Failed to open local file '/home/me/runs/a/x.parquet'"])
    assert published_run(noted).notes == ["rollouts cannot be read: Failed to open local file 'a local file'"]


def test_the_card_of_a_hub_model_names_it_in_its_metadata(run: RunData) -> None:
    text = model_card(run, "me/tiny", "Qwen/Qwen3-0.6B", 60, "learning.svg")
    assert "base_model: Qwen/Qwen3-0.6B" in text.split("---")[1]
    assert "| base model | [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B) |" in text
    assert "(learning.svg)" in text and "paired by problem" in text
    assert "learning.svg" not in model_card(run, "me/tiny", LOCAL, 60, "")


def test_a_setting_cannot_end_the_block_it_is_shown_in(run: RunData) -> None:
    settings = {**run.settings, "task": {"template": "```\n# forged\n{prompt}\x1b[0m", "name": "a|b\n<i>"}}
    text = model_card(replace(run, settings=settings), "me/tiny", LOCAL, 60, "")
    [(_, recipe)] = re.findall(r"^(`{4,})toml\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    assert tomllib.loads(recipe) == settings
    assert "\x1b" not in text and "| task | a\\|b &lt;i> |" in text
