"""What the launcher finds out before verl is started, and leaves behind where it does."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from forkrl.cli import main
from forkrl.cluster import launch
from forkrl.cluster.process import TRACKER
from forkrl.cluster.record import OWN
from forkrl.config import TrainConfig
from forkrl.config.recipe import parse_recipe, recipe_toml
from forkrl.errors import UserError
from forkrl.store.interruption import Interrupted
from forkrl.store.run_folder import RunFolder
from tests.verl_here import needs_verl

pytestmark = needs_verl


def recipe(**sections: Any) -> TrainConfig:
    return parse_recipe(
        TrainConfig,
        {
            "task": {"name": "countdown"},
            "rollout": {
                "prompts_per_step": 4, "group_size": 2, "max_prompt_tokens": 16, "max_response_tokens": 32,
            },
            "reward": {"overlong_cache": 0},
            "training": {"steps": 2, "mini_batch_prompts": 2, "micro_batch_tokens": 1024},
            "eval": {"problems": 2},
            "runtime": {"trainer": "verl", "device": "cpu"},
            **sections,
        },
        "recipe",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def verl_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> int:
        raise AssertionError("verl was started")

    monkeypatch.setattr(launch, "run_and_watch", refuse)
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "tests.verl_cpu.register")


@pytest.mark.parametrize("command", [launch.train_on_cluster, launch.dry_run])
def test_a_run_without_a_gpu_needs_the_tests_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.delenv("VERL_USE_EXTERNAL_MODULES")
    with pytest.raises(UserError, match=r'runtime.device = "cpu" .* set it to "auto"'):
        command(recipe(), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.nonsense=3", "Could not override 'trainer.nonsense'"),
        ("trainer.balance_batch=[", "verl cannot take them"),
        ("trainer.nnodes=2", "sets what ForkRL sets itself"),
    ],
)
def test_an_override_that_verl_does_not_take_leaves_no_folder(tmp_path: Path, override: str, words: str) -> None:
    config = recipe(cluster={"overrides": [override]})
    with pytest.raises(UserError, match=words):
        launch.train_on_cluster(config, tmp_path / "run")
    with pytest.raises(UserError, match=words):
        launch.dry_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("port", ["1", "99999999999"])
def test_an_address_at_which_nobody_listens_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    monkeypatch.setattr(launch, "prepare", lambda config: pytest.fail("prompts were read"))
    with pytest.raises(UserError, match=rf"cluster.address = '127.0.0.1:{port}': no Ray cluster answers"):
        launch.train_on_cluster(recipe(cluster={"address": f"127.0.0.1:{port}"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_told_before_prompts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "prepare", lambda config: pytest.fail("prompts were read"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"not empty .it holds notes.txt"):
        launch.train_on_cluster(recipe(), tmp_path)


def test_a_tracker_that_refuses_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise UserError("no tracker")

    monkeypatch.setattr(launch, "open_trackers", refuse)
    with pytest.raises(UserError, match="no tracker"):
        launch.train_on_cluster(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_its_command_reads(tmp_path: Path) -> None:
    printed = launch.dry_run(recipe(), tmp_path / "run")
    noted = [line for line in printed.splitlines() if line.startswith("# ")]
    words = shlex.split(printed, comments=True)
    reads = [word.partition("=")[2] for word in words if "_files=" in word or word.startswith("+forkrl.verifiers=")]
    assert len(reads) == 3
    assert all(any(read in line for line in noted) for read in [*reads, str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_prompt_over_the_limit_is_named(tmp_path: Path) -> None:
    config = recipe(rollout={"prompts_per_step": 4, "group_size": 2, "max_prompt_tokens": 3, "max_response_tokens": 32})
    with pytest.raises(UserError, match=r"prompt .*tokens, over rollout.max_prompt_tokens = 3"):
        launch.prepare(config)


def test_other_prompts_than_the_run_began_with_are_refused(tmp_path: Path) -> None:
    provenance = {"run_id": "a", "data_fingerprint": "of others"}
    RunFolder.create(tmp_path / "run", recipe_toml(recipe()), provenance).close()
    with pytest.raises(UserError, match="are not those the run began with"):
        launch.train_on_cluster(recipe(), tmp_path / "run", resume=tmp_path / "run")


def test_other_settings_than_the_run_began_with_are_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", recipe_toml(recipe()), {"run_id": "a"}).close()
    longer = recipe(training={"steps": 4, "mini_batch_prompts": 2, "micro_batch_tokens": 1024})
    with pytest.raises(UserError, match=r"training.steps: 2 -> 4; .* \(a run by verl keeps all its settings\)"):
        launch.train_on_cluster(longer, tmp_path / "run", resume=tmp_path / "run")


def test_lengths_beyond_the_models_positions_leave_no_folder(tmp_path: Path) -> None:
    sizes = {"prompts_per_step": 4, "group_size": 2, "max_prompt_tokens": 16, "max_response_tokens": 600}
    longer = recipe(rollout=sizes)
    with pytest.raises(UserError, match="rollout.max_response_tokens = 600 after a prompt of .* the 512 positions"):
        launch.train_on_cluster(longer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "outcome"), [(None, "before anything was saved"), (2, "with step 2 saved")], ids=["early", "later"]
)
def test_the_last_line_after_ctrl_c_is_true(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int | None,
    outcome: str,
) -> None:
    run = tmp_path / "run"

    def stop(*arguments: Any, **named: Any) -> int:
        if step is not None:
            actor = run / OWN / "checkpoints" / f"global_step_{step}" / "actor"
            actor.mkdir(parents=True)
            (actor / "model_world_size_1_rank_0.pt").touch()
            (actor.parents[1] / TRACKER).write_text(str(step))
        raise Interrupted(signal.SIGINT)

    def fail(*arguments: Any, **named: Any) -> None:
        raise UserError("verl's merger failed")

    monkeypatch.setattr(launch, "run_and_watch", stop)
    monkeypatch.setattr(launch, "merge_checkpoints", fail)
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_toml(recipe())))
    assert main(["train", str(path), "--out", str(run)]) == 130
    shown = capsys.readouterr()
    assert shown.err == f"forkrl: stopped by SIGINT {outcome}; continue with: forkrl train --resume {run}\n"
    assert shown.out.endswith("verl's checkpoints were not merged: verl's merger failed\n")


@pytest.mark.parametrize(
    ("step", "every", "due"), [(0, 0, True), (1, 0, False), (2, 0, True), (1, 1, True), (1, 2, False)]
)
def test_a_resumed_run_evaluates_what_it_had_not(tmp_path: Path, step: int, every: int, due: bool) -> None:
    config = recipe(eval={"problems": 2, "every": every})
    with RunFolder.create(tmp_path / "run", {}, {"run_id": "a"}) as folder:
        assert launch._evaluation_due(config, folder, step) is due
        folder.append_metrics({"step": step, "eval/accuracy": 0.5})
        assert not launch._evaluation_due(config, folder, step)
