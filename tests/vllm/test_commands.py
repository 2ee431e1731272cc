"""Every command that samples, with vLLM in place of PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.cli import main
from forkrl.config import ModelConfig
from forkrl.model.policy import open_policy

MODEL = "embedded:countdown-base"
FEW = ("--task", "countdown", "--problems", "6", "rollout.max_response_tokens=64", "runtime.device=cpu")
PREVIEW = """\
[task]
name = "countdown"
[rollout]
engine = "vllm"
prompts_per_step = 8
group_size = 4
max_prompt_tokens = 24
max_response_tokens = 64
[reward]
overlong_cache = 0
[training]
mini_batch_prompts = 4
micro_batch_tokens = 4096
[runtime]
device = "cpu"
"""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model whose weights differ a little from ``MODEL``'s."""
    folder, policy = tmp_path_factory.mktemp("earlier") / "model", open_policy(ModelConfig(path=MODEL), "cpu")
    with torch.no_grad():
        policy.head_weight.mul_(1.05)  # tied to the embedding
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "argv",
    [
        ("analyze", MODEL, "--samples", "2"),
        ("branch", MODEL, "--forks", "1", "--random", "1", "--low", "0", "--continuations", "2"),
        ("drift", "EARLIER", MODEL, "--samples", "2"),
        ("decode-temps", MODEL, "--samples", "2", "--temperatures", "0,2"),
        ("eval", MODEL, "--samples", "2"),
    ],
    ids=lambda argv: argv[0],
)
def test_a_command_samples_with_vllm_and_says_so(
    argv: tuple[str, ...], earlier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [earlier if word == "EARLIER" else word for word in argv]
    out = tmp_path / "out"
    assert main([*words, *FEW, "--engine", "vllm", "--out", str(out)]) == 0, capsys.readouterr().err
    assert "forkrl: sampling with vLLM 0." in capsys.readouterr().err
    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["engine"] == "vllm"
    page = (out / "report.html").read_text()
    assert "vllm" in page
    if argv[0] == "eval":
        rows = [json.loads(line) for file in (out / "responses").iterdir() for line in file.read_text().splitlines()]
        assert len(rows) == 12 and all(row["entropy"] > 0 for row in rows)
    assert main([*words, *FEW, "--engine", "torch", "--out", str(out)]) == 2
    assert "(engine = 'vllm', now 'torch')" in capsys.readouterr().err


def test_preview_takes_the_engine_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(PREVIEW)
    argv = ["preview", str(recipe), "--samples", "2", "--prompts", "2", "--pass-rate-prompts", "4"]
    assert main([*argv, "--out", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr()
    record: dict[str, Any] = json.loads(shown.out)
    assert record["sampling"]["engine"] == "vllm" and len(record["prompts"][0]["responses"]) == 2
    assert "forkrl: sampling with vLLM 0." in shown.err
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["engine"] == "vllm"
