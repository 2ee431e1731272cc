"""Runs with LoRA by the command line: what they save, that they resume to the bit, and that commands read them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.smoke.test_eval import evaluated
from tests.smoke.test_resume import interrupt
from tests.smoke.world import Run, World, make_model

LORA = ("lora.rank=3", "lora.alpha=6", "checkpoint.merged=true", "loss.kl_coef=0.01")


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    return world.trained("run", *LORA)


def test_a_checkpoint_holds_the_adapter_and_the_merged_model(world: World, run: Run) -> None:
    last = run.last_checkpoint
    present = {path.name for path in last.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "base_model.json", "merged", "trainer"} <= present
    assert not {"model.safetensors", "config.json"} & present
    adapter, whole = load_file(last / "adapter_model.safetensors"), load_file(last / "merged/model.safetensors")
    base = load_file(world.folder / "model/model.safetensors")
    assert whole.keys() == base.keys()
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in adapter:
            assert whole[name].equal(weight), name
            continue
        a, b = adapter.pop(f"{prefix}.lora_A.weight"), adapter.pop(f"{prefix}.lora_B.weight")
        assert b.abs().max() > 1e-3, "it was not trained"
        assert (whole[name] - (weight + 2 * b @ a)).abs().max() < 1e-6
    assert not adapter
    settings = json.loads((last / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((world.folder / "model").resolve())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 3, 6)


def test_the_penalty_measures_the_distance_to_the_base_model(run: Run) -> None:
    kl = run.column("loss/kl")
    assert 0 < 5 * kl[0] < kl[-1]  # the second gradient step of the first batch already measures one


@pytest.mark.parametrize(("point", "count"), [("token", 20), ("gradient", 9), ("optimizer", 6), ("save", 2)])
def test_a_killed_run_resumes_to_the_bit(world: World, run: Run, point: str, count: int) -> None:
    out = f"kill-{point}"
    interrupt(world, out, *LORA, point=point, count=count, signal=signal.SIGKILL, after=False)
    assert world.resumed(out).bits() == run.bits()


def test_two_workers_resume_to_the_bit(world: World) -> None:
    overrides = (*LORA, "runtime.workers=2", "runtime.threads=2")
    whole = world.trained("two", *overrides)
    interrupt(world, "two-killed", *overrides, point="save", count=2, signal=signal.SIGKILL, after=True)
    assert world.resumed("two-killed").bits() == whole.bits()


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.backward=forks_only",),
        ("training.backward=forks_only", "forks_only.projections=true", "selection.scope=mini_batch"),
        ('lora.targets=["q_proj", "v_proj"]', "selection.rule=all", "loss.entropy_coef=0.01"),
        ("model.precision=bf16", "model.gradient_checkpointing=true", "checkpoint.kind=weights"),
    ],
    ids=" ".join,
)
def test_it_trains_with(own_world: World, overrides: tuple[str, ...]) -> None:
    run = own_world.trained("with", "lora.rank=3", "training.steps=2", *overrides)
    assert all(value > 0 for value in run.column("grad/norm"))


def test_a_run_and_its_steps_are_evaluated_like_any_model(world: World, run: Run) -> None:
    asked = ("--problems", "8", "--samples", "2", "--temperature", "1")
    figures = evaluated(world, "run", *asked)
    last = run.metrics[-1]
    for name in ("accuracy", "length", "entropy"):
        assert figures[name] == pytest.approx(last[f"eval/{name}"], rel=1e-5)
    settings = ("task.name=dataset", "task.data=prompts.jsonl", "task.verifier=first_character:first_character")
    sizes = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=6", "runtime.device=cpu", "seed=3")
    found = []
    for model in ("run/checkpoints/step-6/merged", str(adapter_alone(world, run))):
        found.append(evaluated(world, model, *settings, *sizes, *asked))
    for name in ("accuracy", "length", "entropy"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def adapter_alone(world: World, run: Run) -> Path:
    """The adapter as PEFT would write it, without tokenizer."""
    folder = world.folder / "alone"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((run.last_checkpoint / name).read_bytes())
    return folder


def test_a_step_is_analyzed_and_trained_further(world: World, run: Run) -> None:
    outcome = world.run("analyze", "run@step-4", "--samples", "2", without_report=True)
    assert outcome.code == 0, outcome.stderr
    further = world.trained("further", "model.path=run/checkpoints/step-6", "training.steps=1", "lora.rank=2")
    settings = json.loads((further.last_checkpoint / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run.last_checkpoint.resolve())
    first, last = further.metrics[0], run.metrics[-1]
    assert first["eval/accuracy"] == pytest.approx(last["eval/accuracy"])


def test_another_base_model_is_rejected_in_one_sentence(own_world: World) -> None:
    interrupt(own_world, "stopped", "lora.rank=2", point="save", count=2, signal=signal.SIGKILL, after=True)
    make_model(own_world.folder / "model", initializer_range=0.1)
    for command in (("train", "--resume", "stopped"), ("eval", "stopped")):
        outcome = own_world.run(*command)
        assert outcome.code == 2
        assert "an adapter of another base model: it was trained on" in outcome.line
