"""``forkrl plan`` as a command: what it prints, writes and refuses, and what it does without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forkrl.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER_8B = ("plan", str(RECIPES / "qwen3-8b.toml"), "runtime.trainer=verl", "cluster.gpus_per_node=8")
PAPER_32B = ("plan", str(RECIPES / "qwen3-32b.toml"), "runtime.trainer=verl", "cluster.gpus_per_node=8")


def record(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_table_names_every_item_the_verdict_and_what_was_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PAPER_8B, "cluster.nodes=2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "8,190,735,360 parameters", "2 nodes of 8 x H100", "sharded over 16", "KV cache", "activations", "logits",
        "optimizer step", "fits in 79.0 GiB", "log-probs of the old policy", "It fits",
        "responses of 10,240 tokens on average (--mean-response)", "no GPU was named", "Not modelled: fragmentation",
    ):  # fmt: skip
        assert text in shown


def test_json_holds_the_sums_that_the_table_shows(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, *PAPER_8B)
    for phase in [*found["phases"], *found["host"]]:
        assert phase["bytes"] == sum(item["bytes"] for item in phase["items"])
    assert found["step"]["seconds"] == pytest.approx(sum(part["seconds"] for part in found["step"]["parts"]))
    run = found["run"]
    seconds = found["step"]["seconds"] * run["steps"] + run["evaluation_seconds"]
    assert run["hours"] == pytest.approx(seconds / 3600) and run["gpu_hours"] == pytest.approx(8 * run["hours"])
    assert found["rollout"]["waves_full"] == -(-512 * 16 // found["rollout"]["at_once_full"])


def test_what_does_not_fit_comes_with_settings_that_make_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, *PAPER_32B, "cluster.nodes=4")
    assert not found["fits"] and found["run"]["hours"] is None
    changes = [change.replace(" = ", "=").replace('"', "") for change in found["remedies"][0]["changes"]]
    assert record(capsys, *PAPER_32B, "cluster.nodes=4", *changes)["fits"]
    assert main([*PAPER_32B, "cluster.nodes=4"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "What makes it fit" in shown and "cluster.tensor_parallel = 2" in shown


@pytest.mark.parametrize("name", ["countdown", "small-gpu", "gym-mix", "qwen3-8b"])
def test_recipes_of_the_local_engine_are_planned_for_one_card(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, "plan", str(RECIPES / f"{name}.toml"), "--gpu", "rtx4090")
    assert found["engine"] == "local" and found["layout"]["gpus"] == 1
    assert found["gpu"]["name"] == "GeForce RTX 4090 24 GB"
    assert found["fits"] == (name != "qwen3-8b")


def test_no_torch_and_no_network_are_needed_for_a_known_shape() -> None:
    code = (
        "import sys; from forkrl.cli import main\n"
        "def refuse(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'): raise OSError(event)\n"
        "sys.addaudithook(refuse)\n"
        f"assert main({list(PAPER_8B)!r}) == 0\n"
        "heavy = ('torch', 'transformers', 'matplotlib', 'pandas', 'verl', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("plan", "no/such.toml"), "no/such.toml: no such recipe"),
        ((*PAPER_8B, "--mfu", "0"), "--mfu 0: must be above 0"),
        ((*PAPER_8B, "--gpu", "h10"), "did you mean h100?"),
        ((*PAPER_8B, "--gpu-memory", "80"), "give both"),
        ((*PAPER_8B, "--gpu-memory", "-1", "--gpu-tflops", "5"), "--gpu-memory -1.0: must be above 0"),
        ((*PAPER_8B, "cluster.nodes=3"), "cannot be split evenly over 24 ranks"),
        ((*PAPER_8B, "model.path=./nowhere"), "no such folder"),
        ((*PAPER_8B, "cluster.gpu_memory=0"), "cluster.gpu_memory = 0"),
        ((*PAPER_8B, "training.micro_batch_tokens=100"), "cannot hold one sequence"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert says in shown.err and len(shown.err.strip().splitlines()) == 1 and not shown.out


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 128}))
    assert main([*PAPER_8B, f"model.path={tmp_path}"]) == 2
    assert "mixture of experts (qwen3_moe)" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "qwen3"}', "\x00\xff"])
def test_a_damaged_config_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    assert main([*PAPER_8B, f"model.path={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-14b", "qwen3-32b", "qwen3-32b-29k"])
def test_the_recipes_for_clusters_fit_cards_of_80_gb(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", str(RECIPES / "verl" / f"{name}.toml")]
    if name.endswith("29k"):  # its model is a run's checkpoint
        assert main(argv) == 2
        assert "for a plan name a model of the same shape" in capsys.readouterr().err
        argv.append("model.path=./Qwen3-32B-Base")
    for gpu in ("h100", "a100-80"):
        assert record(capsys, *argv, "--gpu", gpu)["fits"]


def test_a_recipe_is_not_needed(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, "plan", "model.path=Qwen/Qwen3-0.6B-Base", "rollout.max_sequences=8")
    assert found["recipe"] == "defaults" and found["model"]["parameters"] == 596_049_920
