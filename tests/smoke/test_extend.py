"""What a resumed run may change, and what it says; a rejected command leaves nothing that blocks the next one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe, recipe_toml
from forkrl.errors import UserError
from forkrl.store.resuming import stored_config
from forkrl.training.open_run import open_run
from tests.smoke.world import Run, World


@pytest.fixture(scope="module")
def short(world: World) -> Run:
    return world.trained("short", "training.steps=3")


def extended(world: World, short: Run, out: str, *overrides: str) -> Run:
    shutil.copytree(short.folder, world.folder / out)
    outcome = world.run("train", "--resume", out, *overrides, without_report=True)
    assert outcome.code == 0, outcome.stderr
    return Run(world.folder / out, outcome)


def config_of(run: Run) -> dict[str, Any]:
    return tomllib.loads((run.folder / "config.toml").read_text())


def test_an_extended_run_is_the_run_that_was_longer_from_the_start(world: World, short: Run) -> None:
    whole = world.trained("whole", "training.steps=6")
    run = extended(world, short, "extended", "training.steps=6")
    assert run.bits()["checkpoint"] == whole.bits()["checkpoint"]
    assert run.timeless == whole.timeless
    assert "resuming extended after step 3 of 6, with training.steps: 3 -> 6\n" in run.outcome.stdout
    config = config_of(run)
    assert config["training"]["steps"] == 6
    assert config["provenance"]["changes"] == [{"after_step": 3, "settings": ["training.steps: 3 -> 6"]}]
    again = world.run("train", "--resume", "extended", without_report=True)
    assert again.code == 0, again.stderr
    assert (
        "extended is finished (step 6 of 6); to train it further: forkrl train --resume extended training.steps=12\n"
        in again.stdout
    )


def test_an_extended_run_takes_the_rates_of_its_new_length(world: World) -> None:
    linear = "optimizer.schedule=linear"
    begun = world.trained("begun-linear", linear, "training.steps=3")
    whole = world.trained("whole-linear", linear, "training.steps=6")
    run = extended(world, begun, "extended-linear", "training.steps=6")
    rates = run.column("optimizer/lr")
    assert rates == begun.column("optimizer/lr") + whole.column("optimizer/lr")[3:]
    assert rates[3] > rates[2]
    assert 'optimizer.schedule = "linear" now ends at step 6: ' in run.outcome.stdout


def test_evaluation_checkpoints_and_logs_may_change_too(world: World, short: Run) -> None:
    changes = ("training.steps=5", "eval.every=1", "eval.samples=1", "checkpoint.every=1", "log.rollouts_every=1")
    run = extended(world, short, "changed", *changes)
    assert [record["step"] for record in run.metrics if "eval/accuracy" in record] == [0, 3, 4, 5]
    assert (run.folder / "rollouts/train-000005.parquet").exists()
    assert len(config_of(run)["provenance"]["changes"][0]["settings"]) == 5
    longer = world.run("train", "--resume", "changed", "training.steps=6", without_report=True)
    assert longer.code == 0, longer.stderr
    assert len(config_of(run)["provenance"]["changes"]) == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ("optimizer.lr=1", "training.steps=6"),
            "began: optimizer.lr: 0.01 -> 1.0; resume without a recipe (only trai",
        ),
        (
            ("recipe.toml",),
            "training.steps: 3 -> 6; resume without a recipe (only training.steps, training.epochs, eval.*, ",
        ),
        (("training.steps=2",), "training.steps = 2: short is at step 3 already; raise it"),
        (("training.stps=5",), "training.stps is not a setting; did you mean training.steps?"),
    ],
)
def test_no_other_change_is_accepted_and_nothing_is_stored(
    world: World, short: Run, argv: tuple[str, ...], says: str
) -> None:
    before = (short.folder / "config.toml").read_bytes()
    outcome = world.run("train", "--resume", "short", *argv)
    assert outcome.code == 2
    assert says in outcome.line
    assert (short.folder / "config.toml").read_bytes() == before
    assert short.checkpoints == ["step-2", "step-3"]


def test_an_edited_config_is_rejected_by_every_command(world: World, short: Run) -> None:
    shutil.copytree(short.folder, world.folder / "edited")
    config = world.folder / "edited/config.toml"
    config.write_text(config.read_text().replace("\nlr = 0.01\n", "\nlr = 0.5\n"))
    for argv in (("train", "--resume", "edited"), ("eval", "edited"), ("eval", "edited@base")):
        outcome = world.run(*argv)
        assert outcome.code == 2
        assert "edited/config.toml: was edited after the run began; undo the edit." in outcome.line
        assert "forkrl train --resume edited training.steps=60" in outcome.line


def test_python_rejects_what_the_command_line_rejects(short: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(short.folder.parent)
    stored = stored_config(Path("short"))
    other_rate = stored.model_copy(update={"optimizer": stored.optimizer.model_copy(update={"lr": 0.5})})
    longer = stored.model_copy(update={"training": stored.training.model_copy(update={"steps": 9})})
    for config, key in ((other_rate, "optimizer.lr"), (longer, "training.steps"), (TrainConfig(), "model.path")):
        with pytest.raises(UserError, match=f"the recipe has changed since the run began: .*{key}: "):
            open_run(config, resume=Path("short")).__enter__()


def test_a_resumed_run_says_where_it_continues(world: World) -> None:
    stop = {"point": "token", "count": 7, "signal": 9}
    assert world.train("begun", faults=[stop], without_report=True).code == -9
    lines = world.resumed("begun").outcome.stdout.splitlines()
    assert "resuming begun from the beginning (it has no checkpoint)" in lines


REJECTED = {
    "too long for the model": ("rollout.max_response_tokens=200",),
    "verifier": ("task.verifier=first_character:nothing",),
    "data": ("task.data=nothing.jsonl",),
    "stop token": ('rollout.stop=["==="]',),
}


@pytest.mark.parametrize("mistake", REJECTED)
@pytest.mark.parametrize("command", ["train", "eval", "analyze", "branch", "decode-temps", "drift"])
def test_a_rejected_command_leaves_nothing_that_blocks_the_corrected_one(
    world: World, command: str, mistake: str
) -> None:
    out = f"{command}-{mistake.replace(' ', '-')}"
    many = ("training.micro_batch_tokens=640", "training.steps=1")
    argv = {
        "train": ("train", "recipe.toml", *many),
        "drift": ("drift", "model", "other", "--recipe", "recipe.toml"),
    }.get(command, (command, "model", "--recipe", "recipe.toml"))
    if not (world.folder / "other").exists():
        shutil.copytree(world.folder / "model", world.folder / "other")
    outcome = world.run(*argv, *REJECTED[mistake], "--out", out, without_report=True)
    assert outcome.code == 2, outcome
    assert not (world.folder / out).exists(), outcome.stderr


def test_an_existing_empty_folder_stays_usable(world: World) -> None:
    (world.folder / "mine").mkdir()
    argv = ("analyze", "model", "--recipe", "recipe.toml", "--out", "mine")
    assert world.run(*argv, 'rollout.stop=["==="]').code == 2
    outcome = world.run(*argv)
    assert outcome.code == 0, outcome.stderr


def test_without_arguments_the_demo_runs(world: World, tmp_path: Path) -> None:
    """From any folder: the recipe is in the package. Another model or task than the demo's gets the defaults."""
    demo = world.launcher.start(tmp_path, argv=["train", "--dry-run"]).wait()
    assert demo.code == 0
    assert demo.line.startswith("forkrl: no recipe given, so this is the demo: /")
    assert demo.line.endswith("/forkrl/assets/countdown.toml")
    recipe = load_recipe(TrainConfig, Path(__file__).parents[2] / "recipes/countdown.toml")
    assert tomllib.loads(demo.stdout) == recipe_toml(recipe)
    fewer = world.launcher.start(tmp_path, argv=["train", "training.steps=3", "--dry-run"]).wait()
    assert tomllib.loads(fewer.stdout)["optimizer"]["lr"] == 3e-4
    own = world.launcher.start(tmp_path, argv=["train", "model.path=mine", "--dry-run"]).wait()
    assert (own.stderr, tomllib.loads(own.stdout)["optimizer"]["lr"]) == ("", 1e-6)


WITHOUT_TORCH = """
import sys
from forkrl.cli import main
code = main(sys.argv[1:])
sys.exit(70 if "torch" in sys.modules else code)
"""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("train", "recipe.toml", "--out", "short"), "short: already holds a run; continue it with --resume short"),
        (("train", "recipe.toml", "--out", "model"), "model: is not empty"),
        (("train", "--resume", "nowhere"), "nowhere: no such run folder"),
        (("train", "--resume", "model"), "model: not a run folder"),
        (("eval", "model", "--out", "model"), "model: is not empty"),
        (("analyze", "model", "--out", "recipe.toml"), "recipe.toml: is a file"),
        (("drift", "model", "other", "--out", "model"), "model: is not empty"),
        (("branch", "model", "--out", "model"), "model: is not empty"),
        (("decode-temps", "model", "--out", "model"), "model: is not empty"),
        *(((command, "./nope"), "model.path = './nope': no such folder") for command in ("eval", "analyze", "branch")),
    ],
)
def test_folders_are_checked_before_torch_is_imported(
    world: World, short: Run, argv: tuple[str, ...], says: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *argv], cwd=world.folder, capture_output=True, text=True
    )
    assert ended.stderr.startswith(f"forkrl: {says}")
    assert ended.stderr.count("\n") == 1
    assert ended.returncode == 2
