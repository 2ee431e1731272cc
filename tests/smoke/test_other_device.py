"""The whole program on another device than the CPU: every command, and every branch of training that makes tensors.

The device is the pretend accelerator of ``tests/pretend_accelerator.py``, which refuses what CUDA would refuse.
"""

from __future__ import annotations

import copy
import json
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from forkrl.store.results import read_table
from tests.elsewhere import on_accelerator
from tests.smoke.test_sft import TINY
from tests.smoke.world import Launcher, Run, World, copy_world

THERE = "runtime.device=pretend:0"
# Of the two gradient steps of a step, the first is of the weights that sampled and the second is not.
SHORT = (THERE, "training.steps=1", "eval.every=0", "eval.problems=2")
SETTINGS = {
    "dense, over the mini-batch, responses shaped": (
        "selection.scope=mini_batch", "rollout.top_k=9", "rollout.top_p=0.9", "rollout.temperature=0.8",
        "reward.overlong_cache=3", "loss.dual_clip=3.0", "optimizer.warmup_steps=2",
    ),
    "dense, KL penalty and entropy bonus": ("loss.kl_coef=0.1", "loss.entropy_coef=0.01", "loss.denominator=response"),
    "dense, a threshold": ("selection.rule=threshold", "selection.threshold=0.5"),
    "dense, at random": ("selection.rule=random", "selection.scope=sequence"),
    "dense, over the rollout batch": ("selection.scope=rollout_batch", "selection.entropy=rollout"),
    "forks only": ("training.backward=forks_only",),
    "forks only, over the mini-batch": (
        "training.backward=forks_only", "selection.scope=mini_batch", "dynamic_sampling.enabled=false",
    ),
    "forks only, everything else runs too": (
        "training.backward=forks_only", "forks_only.prompt=true", "forks_only.sampled=0.3",
        "selection.rule=random",
    ),
    "forks only, by projections": ("training.backward=forks_only", "forks_only.projections=true"),
}  # fmt: skip
IN_BF16 = {
    "dense": ("loss.kl_coef=0.1",),
    "layers computed again": ("model.gradient_checkpointing=true", "loss.entropy_coef=0.01"),
    "forks only": ("training.backward=forks_only", "selection.scope=mini_batch"),
}


@pytest.fixture(scope="module")
def elsewhere(accelerated: Launcher, template: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose commands run in processes with the accelerator."""
    return copy_world(template, tmp_path_factory.mktemp("elsewhere"), accelerated)


@pytest.fixture(scope="module")
def run(elsewhere: World) -> Run:
    """A finished run on the accelerator, which the commands look at."""
    return elsewhere.trained("run", *SHORT, "training.steps=2", "checkpoint.every=1", "checkpoint.keep=9")


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_run_is_what_it_is_on_the_cpu(elsewhere: World, settings: str) -> None:
    """The same responses, selections and losses: random numbers are the same, and so are sums but for rounding."""
    there = elsewhere.trained(f"{settings} there", *SHORT, *SETTINGS[settings])
    here = elsewhere.trained(f"{settings} here", *SHORT, *SETTINGS[settings], "runtime.device=cpu", "runtime.workers=1")
    assert tomllib.loads((there.folder / "config.toml").read_text())["provenance"]["device"] == "pretend:0"
    assert [record.keys() for record in there.metrics] == [record.keys() for record in here.metrics]
    assert numbers(there.timeless) == pytest.approx(numbers(here.timeless), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("settings", IN_BF16)
def test_a_run_in_bf16_ends(elsewhere: World, settings: str) -> None:
    trained = elsewhere.trained(f"bf16 {settings}", *SHORT, "model.precision=bf16", *IN_BF16[settings])
    assert all(norm > 0 for norm in trained.column("grad/norm"))


def test_killed_or_stopped_a_run_goes_on_as_if_nothing_had_happened(elsewhere: World) -> None:
    """Random numbers drawn on the device and moments that lie there come back with the weights."""
    settings = (*SHORT, "checkpoint.every=1", "selection.rule=random", "training.steps=3")
    whole = elsewhere.trained("whole", *settings)
    for name, signum in (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM)):
        fault = {"point": "optimizer", "count": 3, "signal": signum}
        outcome = elsewhere.train(name, *settings, faults=[fault], without_report=True)
        assert outcome.code == {signal.SIGKILL: -9, signal.SIGTERM: 143}[signum], outcome.stderr
        assert elsewhere.resumed(name).bits() == whole.bits()


def test_it_is_found_without_being_named(elsewhere: World) -> None:
    found = elsewhere.trained("auto", *SHORT, "runtime.device=auto")
    assert tomllib.loads((found.folder / "config.toml").read_text())["provenance"]["device"] == "pretend:0"
    outcome = elsewhere.run("doctor")
    assert outcome.code == 0, outcome.stderr
    assert "pretend matrix product of 1024" in outcome.stdout
    assert "no accelerator" not in outcome.stdout


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("runtime.device=pretend:1", "runtime.device = 'pretend:1' is not usable here: invalid device ordinal"),
        ("runtime.workers=2", "runtime.workers = 2: on pretend:0 there is one"),
    ],
)
def test_what_the_device_has_not_is_refused_in_one_line(elsewhere: World, setting: str, says: str) -> None:
    outcome = elsewhere.train("refused", *SHORT, "runtime.threads=2", setting)
    assert outcome.code == 2
    assert says in outcome.line


COMMANDS = {
    "eval": ("--problems", "4", "--samples", "2"),
    "analyze": ("--problems", "4", "--samples", "2", "--min-count", "1"),
    "drift": ("--problems", "4", "--samples", "2"),
    "branch": ("--problems", "2", "--forks", "2", "--random", "1", "--low", "1", "--continuations", "2"),
    "decode-temps": ("--problems", "2", "--samples", "1", "--temperatures", "0.5,1"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_finds_what_it_finds_on_the_cpu(elsewhere: World, run: Run, command: str) -> None:
    found: list[list[float]] = []
    for device in ("cpu", "pretend:0"):
        out = f"{command} on {device}"
        settings = (*COMMANDS[command], f"runtime.device={device}", "runtime.workers=1", "--out", out)
        outcome = elsewhere.run(command, "run", *settings, without_report=True)
        assert outcome.code == 0, outcome.stderr
        figures = json.loads((elsewhere.folder / out / "results.json").read_text())
        tables = [read_table(path) for path in sorted((elsewhere.folder / out / "tables").glob("*.csv"))]
        found.append(numbers([figures, *(table.to_dict("records") for table in tables)]))
    assert found[0]
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)


def numbers(figures: Any) -> list[float]:
    """All of a JSON document's in order, but for the clock and the machine."""
    if isinstance(figures, dict):
        kept = {key: value for key, value in figures.items() if key != "provenance" and "second" not in key}
        return [number for key in sorted(kept) if "tokens_per_s" not in key for number in numbers(kept[key])]
    if isinstance(figures, list):
        return [number for value in figures for number in numbers(value)]
    return [float(figures)] if isinstance(figures, int | float) and figures == figures else []


def test_a_command_in_bf16_ends(elsewhere: World, run: Run) -> None:
    for command in ("analyze", "branch"):
        settings = (*COMMANDS[command], THERE, "model.precision=bf16", "--out", f"{command} in bf16")
        outcome = elsewhere.run(command, "run", *settings, without_report=True)
        assert outcome.code == 0, outcome.stderr


def test_a_base_model_is_made_there(elsewhere: World) -> None:
    from forkrl.config.recipe import recipe_toml

    recipe = elsewhere.folder / "tiny.toml"
    recipe.write_text(tomli_w.dumps(recipe_toml(TINY)))
    outcome = elsewhere.run("sft", recipe, "--out", "base", THERE, "precision=bf16")
    assert outcome.code == 0, outcome.stderr
    assert (elsewhere.folder / "base" / "model.safetensors").is_file()


def test_the_demonstration_runs(elsewhere: World) -> None:
    """The embedded model on its own task: four layers, long enough for caches to grow and ranks to close."""
    recipe = Path("recipes/countdown.toml").resolve()
    outcome = elsewhere.run(
        "train", recipe, "--out", "demo", *SHORT, "rollout.prompts_per_step=4",
        "rollout.group_size=4", "rollout.max_response_tokens=64", "reward.overlong_cache=16",
        "training.mini_batch_prompts=2",
        "dynamic_sampling.enabled=false", without_report=True,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr


@on_accelerator
def test_a_notebook_measures_the_tokens_of_a_model_there() -> None:
    from forkrl.analysis import measure_tokens
    from tests.models import random_policy

    policy = random_policy()
    model: Any = copy.deepcopy(policy.model)
    texts = (["1 2", "3"], ["4 5 6", "7"])
    ours, theirs = (measure_tokens(each, policy.tokenizer, *texts) for each in (model.to("pretend"), policy.model))
    for column in ("entropy", "logprob"):
        torch.testing.assert_close(torch.tensor(ours[column]), torch.tensor(theirs[column]), rtol=1e-4, atol=1e-5)
