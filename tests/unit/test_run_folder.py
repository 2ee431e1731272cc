"""The run folder: one run, one process, whole lines, whole files."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from forkrl.config import TrainConfig
from forkrl.config.recipe import parse_recipe, recipe_toml
from forkrl.errors import UserError
from forkrl.method.schedule import EarlyEnd
from forkrl.parallel.workers import Workers
from forkrl.store.atomic import explained_write_errors
from forkrl.store.provenance import changed_arithmetic, describe_provenance, refuse_other_data
from forkrl.store.resuming import accepted_changes, describe_resume, stored_config
from forkrl.store.run_folder import RunFolder, rollout_schema
from forkrl.training.open_run import open_run
from forkrl.types import Task
from tests.models import random_policy
from tests.tiny_state import tiny_state

MAY_CHANGE = (
    r"only training.steps, training.epochs, eval.\*, checkpoint.every, checkpoint.keep, checkpoint.keep_best, log.\*"
)
RECIPE = {"seed": 3, "loss": {"clip_low": 0.2}, "optimizer": {"betas": [0.9, 0.95]}}
PROVENANCE = {"forkrl": "0.1", "commit": None, "threads": 2}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", RECIPE, PROVENANCE)


def response(**changes: Any) -> dict[str, Any]:
    return {
        "step": 10, "prompt_id": "p1", "prompt": "1 2 3 = 6", "response": "1+2 ρ", "token_ids": [4, 5],
        "tokens": ["1", "+2 ρ"], "logprobs": [-0.5, -math.inf], "entropy": [0.0, 1.5], "selected": [False, True],
        "score": 1.0, "reward": 0.5, "advantage": -0.25, "finished": True, **changes,
    }  # fmt: skip


class TestCreate:
    def test_the_recipe_comes_back_as_it_was_given(self, run: RunFolder) -> None:
        run.close()
        for folder in (run, RunFolder.open(run.path)):
            assert folder.recipe == RECIPE
            assert folder.provenance.items() >= {"forkrl": "0.1", "threads": 2}.items()
        assert tomllib.loads((run.path / "config.toml").read_text())["provenance"]["threads"] == 2

    def test_every_setting_survives_to_the_last_bit(self, tmp_path: Path) -> None:
        recipe = parse_recipe(TrainConfig, {"optimizer": {"lr": 1 / 3e5}}, "test")
        with RunFolder.create(tmp_path / "run", recipe_toml(recipe), {}) as run:
            assert parse_recipe(TrainConfig, run.recipe, "config.toml") == recipe

    def test_settings_of_another_version_are_refused_by_name(self, tmp_path: Path) -> None:
        RunFolder.create(tmp_path / "run", {"loss": {"clip_hgh": 0.3}}, {}).close()
        with pytest.raises(UserError, match=r"clip_hgh is not a setting.*; the run was made by another version of"):
            stored_config(tmp_path / "run")

    def test_a_removed_setting_is_dropped_at_its_default_and_refused_at_another_value(self, tmp_path: Path) -> None:
        stored = recipe_toml(TrainConfig(seed=4))
        for name, graphs in (("without", False), ("with", True)):
            rollout = stored["rollout"] | {"cuda_graphs": graphs}
            RunFolder.create(tmp_path / name, stored | {"rollout": rollout}, {"commit": "0123abc"}).close()
        config = stored_config(tmp_path / "without")
        assert config == TrainConfig(seed=4)
        assert accepted_changes(tmp_path / "without", config, []) == []
        says = r"rollout.cuda_graphs was removed before version 0.1.0; .* version of ForkRL \(commit 0123abc\): use"
        with pytest.raises(UserError, match=says):
            stored_config(tmp_path / "with")

    def test_a_folder_with_a_run_is_refused(self, run: RunFolder) -> None:
        run.close()
        with pytest.raises(UserError, match=rf"already holds a run; continue it with --resume {run.path}, or .*--out"):
            RunFolder.create(run.path, {"seed": 4}, {})
        assert RunFolder.open(run.path).recipe == RECIPE
        RunFolder.create(run.path / "light", {"checkpoint": {"kind": "weights"}}, {}).close()
        with pytest.raises(UserError, match=r"already holds a run; choose another --out$"):
            RunFolder.create(run.path / "light", {"seed": 4}, {})

    def test_a_folder_with_anything_else_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(UserError, match=r"is not empty \(it holds thesis.tex\).*choose another --out"):
            RunFolder.create(tmp_path, RECIPE, {})
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
        with pytest.raises(UserError, match=r"thesis.tex: is a file; choose another --out"):
            RunFolder.create(tmp_path / "thesis.tex", RECIPE, {})

    def test_what_a_killed_create_left_is_no_obstacle(self, tmp_path: Path) -> None:
        for name in ("checkpoints", "rollouts"):
            (tmp_path / name).mkdir()
        (tmp_path / ".lock").write_text("1\n")
        (tmp_path / ".config.toml.writing").write_text("see")
        with RunFolder.create(tmp_path, RECIPE, {}) as run:
            assert run.recipe == RECIPE
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"checkpoints", "rollouts", ".lock", "config.toml", "metrics.jsonl"}

    def test_checkpoints_without_a_recipe_are_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints" / "step-5").mkdir(parents=True)
        with pytest.raises(UserError, match=r"it holds checkpoints"):
            RunFolder.create(tmp_path, RECIPE, {})


class TestOpen:
    def test_what_is_no_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"missing: no such run folder; name the folder given to forkrl train --out"
        ):
            RunFolder.open(tmp_path / "missing")
        with pytest.raises(
            UserError, match=r"not a run folder, it has no config.toml; name the folder given to forkrl train --out"
        ):
            RunFolder.open(tmp_path)
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "config.toml").write_text("seed = ")
        with pytest.raises(UserError, match=r"config.toml: cannot be read \("):
            RunFolder.open(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from forkrl.store.resuming import stored_config
from forkrl.store.run_folder import RunFolder
run = RunFolder.open(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


class TestLock:
    def test_two_processes_cannot_train_in_one_folder(self, run: RunFolder) -> None:
        with pytest.raises(
            UserError, match=rf"process {os.getpid()} is training here; wait for it, stop it, or choose"
        ):
            RunFolder.open(run.path)
        run.close()
        run.close()  # twice is no harm
        RunFolder.open(run.path).close()

    def test_a_killed_process_gives_the_folder_free(self, run: RunFolder) -> None:
        run.close()
        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        with holder, holder.stdout:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=rf"process {holder.pid} is training here"):
                RunFolder.open(run.path)
            holder.send_signal(signal.SIGKILL)
            holder.wait(timeout=60)
        RunFolder.open(run.path).close()

    def test_a_child_process_does_not_inherit_the_lock(self, run: RunFolder) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            run.close()
            RunFolder.open(run.path).close()
            child.communicate(b"\n")


class TestMetrics:
    def test_lines_are_there_at_once_and_numbers_exact(self, run: RunFolder) -> None:
        run.append_metrics({"step": 1, "reward/mean": 1 / 3})
        run.append_metrics({"step": 2, "loss/policy": math.nan, "grad/norm": math.inf, "entropy/mean": -math.inf})
        expected = [
            {"step": 1, "reward/mean": 1 / 3},
            {"step": 2, "loss/policy": None, "grad/norm": None, "entropy/mean": None},
        ]
        text = (run.path / "metrics.jsonl").read_text()
        assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()] == expected
        assert run.read_metrics() == expected
        assert run.metrics_bytes == len(text)

    def test_an_opened_run_goes_on_where_it_stopped(self, run: RunFolder) -> None:
        run.append_metrics({"step": 1})
        run.close()
        with RunFolder.open(run.path) as again:
            again.append_metrics({"step": 2})
            assert again.read_metrics() == [{"step": 1}, {"step": 2}]

    def test_a_line_that_is_being_written_is_left_out(self, run: RunFolder) -> None:
        run.append_metrics({"step": 1})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "rew')
        assert run.read_metrics() == [{"step": 1}]

    @pytest.mark.parametrize("line", ["{", "[1]", "\0\0\0", "[" * 100_000])
    def test_a_damaged_line_is_named(self, run: RunFolder, line: str) -> None:
        run.append_metrics({"step": 1})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is not a JSON object"):
            run.read_metrics()

    def test_cutting_back_to_a_checkpoint(self, run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
        run.append_metrics({"step": 1})
        size = run.metrics_bytes
        run.append_metrics({"step": 2})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "rew')
        run.truncate_metrics(size)
        assert run.metrics_bytes == size
        run.append_metrics({"step": 2, "again": 1})
        assert run.read_metrics() == [{"step": 1}, {"step": 2, "again": 1}]
        assert not caplog.records
        run.truncate_metrics(0)
        assert run.read_metrics() == []

    def test_a_full_disk_is_explained(self, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(line: bytes) -> int:
            raise OSError(errno.ENOSPC, "full")

        file = run._metrics
        monkeypatch.setattr(run, "_metrics", SimpleNamespace(fileno=file.fileno, truncate=file.truncate, write=full))
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written .*; the disk is full: free some"):
            run.append_metrics({"step": 1})
        file.close()

    def test_lost_lines_are_reported_and_the_log_stays_whole(
        self, run: RunFolder, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "forkrl")
        run.append_metrics({"step": 1})
        whole = run.metrics_bytes
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "rew')
        run.truncate_metrics(1000)
        assert f"{whole} bytes in whole lines where the checkpoint counted 1000" in caplog.text
        run.append_metrics({"step": 2})
        assert run.read_metrics() == [{"step": 1}, {"step": 2}]


class TestRollouts:
    def test_rows_come_back(self, run: RunFolder) -> None:
        rows = [
            response(),
            response(advantage=None, finished=False, token_ids=[], tokens=[], logprobs=[], entropy=[], selected=[]),
        ]
        path = run.write_rollouts("train-000010", rows)
        assert path == run.path / "rollouts" / "train-000010.parquet"
        assert run.read_rollouts("train-000010") == rows
        assert pq.read_schema(path).equals(rollout_schema())
        run.write_rollouts("train-000010", rows[1:])
        assert run.read_rollouts("train-000010") == rows[1:]

    def test_the_columns_are_those_of_the_contract(self) -> None:
        assert {field.name: str(field.type) for field in rollout_schema()} == {
            "step": "int32", "prompt_id": "string", "prompt": "string", "response": "string",
            "token_ids": "list<item: int32>", "tokens": "list<item: string>", "logprobs": "list<item: float>",
            "entropy": "list<item: float>", "selected": "list<item: bool>", "score": "float", "reward": "float",
            "advantage": "float", "finished": "bool",
        }  # fmt: skip
        assert [field.name for field in rollout_schema() if field.nullable] == ["advantage"]

    def test_hostile_text_is_kept_as_text(self, run: RunFolder) -> None:
        nasty = "</script>\u2028\u202e\x1b[31m\0\ufffe😈"
        run.write_rollouts("eval-000000", [response(response=nasty, tokens=[nasty, "\ud800x"])])
        [row] = run.read_rollouts("eval-000000")
        assert row["response"] == nasty
        assert row["tokens"] == [nasty, "\\ud800x"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"score": None}, "row 1: no value for score"),
            ({"tokens": ["a"]}, "row 1: one value per token is wanted"),
            ({"colour": "red"}, "row 1: missing or unknown columns: colour"),
        ],
    )
    def test_rows_that_do_not_fit_are_refused(self, run: RunFolder, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            run.write_rollouts("train-000001", [response(), response(**changes)])
        incomplete = response()
        del incomplete["entropy"]
        with pytest.raises(ValueError, match="row 0: missing or unknown columns: entropy"):
            run.write_rollouts("train-000001", [incomplete])
        assert run.rollout_names == []

    @pytest.mark.parametrize("name", ["train-1", "../train-000001", "test-000001", "train-000001.parquet"])
    def test_other_names_are_refused(self, run: RunFolder, name: str) -> None:
        with pytest.raises(ValueError, match="is not a name for rollouts"):
            run.write_rollouts(name, [])

    def test_missing_and_damaged_files_are_named(self, run: RunFolder) -> None:
        path = run.write_rollouts("train-000001", [response()] * 50)
        path.write_bytes(path.read_bytes()[:-1])
        for name in ("train-000001", "train-000002"):
            with pytest.raises(UserError, match=rf"{name}.parquet: cannot be read as rollouts"):
                run.read_rollouts(name)


class TestDiscard:
    def test_what_came_after_the_checkpoint_is_forgotten(self, run: RunFolder) -> None:
        for name in ("eval-000000", "train-000010", "train-1000000", "eval-000020", "train-000020", "train-000030"):
            run.write_rollouts(name, [])
        for step in (0, 20, 40):
            run.write_scores(step, {"a": [1.0, 0.5]})
        assert run.rollout_names[:3] == ["eval-000000", "eval-000020", "train-000010"]
        assert run.rollout_names[-1] == "train-1000000"
        (run.path / "rollouts" / ".train-000040.parquet.writing").write_bytes(b"x")
        run.append_metrics({"step": 20})
        size = run.metrics_bytes
        run.append_metrics({"step": 30})
        run.discard_after(20, size)
        assert run.rollout_names == ["eval-000000", "eval-000020", "train-000010", "train-000020"]
        assert sorted(path.name for path in (run.path / "rollouts").iterdir()) == sorted(
            [*(f"{name}.parquet" for name in run.rollout_names), "scores-000000.json", "scores-000020.json"]
        )
        assert json.loads((run.path / "rollouts/scores-000020.json").read_bytes()) == {"a": [1.0, 0.5]}
        assert run.read_metrics() == [{"step": 20}]
        run.discard_after(-1, 0)
        assert list((run.path / "rollouts").iterdir()) == []
        assert run.read_metrics() == []


def test_a_folder_that_may_not_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run: cannot be created: .*file is not a folder; choose another --out"):
        RunFolder.create(tmp_path / "file" / "run", RECIPE, {})


def test_errors_of_rust_libraries_are_explained_by_their_number(tmp_path: Path) -> None:
    full = "model: cannot be written .*; the disk is full"
    with pytest.raises(UserError, match=full), explained_write_errors(tmp_path / "model"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="another"), explained_write_errors(tmp_path / "model"):
        raise RuntimeError("another")


class TestResume:
    @pytest.fixture
    def config(self) -> TrainConfig:
        return parse_recipe(TrainConfig, {"training": {"steps": 10}}, "test")

    @pytest.fixture
    def begun(self, tmp_path: Path, config: TrainConfig) -> RunFolder:
        return RunFolder.create(tmp_path / "run", recipe_toml(config), {"data_fingerprint": "a" * 64})

    def changed(self, config: TrainConfig, section: str, **values: Any) -> TrainConfig:
        return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    def test_what_does_not_affect_finished_steps_may_change(self, begun: RunFolder, config: TrainConfig) -> None:
        longer = self.changed(self.changed(config, "training", steps=20, epochs=2.0), "eval", every=7)
        accepted = accepted_changes(begun.path, longer, ["training", "eval"])
        assert {change.partition(":")[0] for change in accepted} == {"training.steps", "training.epochs", "eval.every"}
        assert "training.steps: 10 -> 20" in accepted
        begun.change_recipe(recipe_toml(longer), 4, accepted)
        begun.change_recipe(recipe_toml(config), 5, ["back"])
        begun.close()
        with RunFolder.open(begun.path) as again:
            history = [{"after_step": 4, "settings": accepted}, {"after_step": 5, "settings": ["back"]}]
            assert again.provenance["changes"] == history == begun.provenance["changes"]
            assert again.recipe == recipe_toml(config) == begun.recipe

    def test_other_changes_are_refused(self, begun: RunFolder, config: TrainConfig) -> None:
        longer = self.changed(config, "training", steps=20)
        says = (
            r"the recipe has changed since the run began: training.steps: 10 -> 20; resume without a recipe "
            rf"\({MAY_CHANGE} "
            r"may change, each given as key=value\), or start a new run with another --out"
        )
        with pytest.raises(UserError, match=says + "$"):
            accepted_changes(begun.path, longer, [])  # not on purpose
        saved = tiny_state().save(begun.checkpoints, 2)
        with pytest.raises(UserError, match=f"{says}, from these weights with model.path={saved}$"):
            accepted_changes(begun.path, longer, ["eval"])
        other_seed = config.model_copy(update={"seed": 5})
        with pytest.raises(UserError, match=r"began: seed: 0 -> 5; resume"):
            accepted_changes(begun.path, other_seed, ["seed"])
        lighter = self.changed(config, "checkpoint", kind="weights", keep=3)
        with pytest.raises(UserError, match=r"began: checkpoint.kind: 'full' -> 'weights'; resume"):
            accepted_changes(begun.path, lighter, ["checkpoint"])

    @pytest.mark.parametrize("kind", ["weights", "none"])
    def test_a_run_without_training_state_is_refused_before_its_model_is_looked_for(
        self, tmp_path: Path, config: TrainConfig, kind: str
    ) -> None:
        light = self.changed(self.changed(config, "checkpoint", kind=kind), "model", path="./nowhere")
        RunFolder.create(tmp_path / "light", recipe_toml(light), {}).close()
        with (
            pytest.raises(UserError, match=f'light: with checkpoint.kind = "{kind}" the run saved no training state'),
            open_run(light, resume=tmp_path / "light"),
        ):
            pass

    def test_a_run_by_verl_keeps_all_its_settings(self, tmp_path: Path, config: TrainConfig) -> None:
        by_verl = self.changed(config, "runtime", trainer="verl")
        RunFolder.create(tmp_path / "verl", recipe_toml(by_verl), {}).close()
        with pytest.raises(UserError, match=r"20; resume without a recipe \(a run by verl keeps all its settings\)"):
            accepted_changes(tmp_path / "verl", self.changed(by_verl, "training", steps=20), ["training.steps"])

    def test_a_resumed_run_says_where_it_continues(self, config: TrainConfig) -> None:
        def says(done: int | None, *changes: str, finished: bool = False, early: EarlyEnd | None = None) -> str:
            return describe_resume(Path("x"), done, config, changes, finished=finished, early=early)

        assert says(None) == "resuming x from the beginning (it has no checkpoint)"
        assert says(0, "a: 1 -> 2", "b: 3 -> 4") == "resuming x after step 0 of 10, with a: 1 -> 2; b: 3 -> 4"
        resume = "forkrl train --resume x training.steps=20"
        assert says(10, finished=True) == f"x is finished (step 10 of 10); to train it further: {resume}"
        early = EarlyEnd("training.epochs", "sampling/epochs is 2 (training.epochs = 2)")
        assert says(4, finished=True, early=early) == (
            "x has stopped early at step 4 of 10: sampling/epochs is 2 (training.epochs = 2); to train it further, "
            "raise training.epochs, or turn it off: forkrl train --resume x training.epochs=0"
        )
        assert says(4, early=early) == "resuming x after step 4 of 10", "the last step is still to be evaluated"

    def test_an_edited_recipe_is_refused(self, begun: RunFolder) -> None:
        begun.close()
        file = begun.path / "config.toml"
        file.write_text(file.read_text().replace("steps = 10", "steps = 11"))
        with pytest.raises(UserError, match=f"was edited after the run began; undo the edit. .* {MAY_CHANGE},"):
            RunFolder.open(begun.path)

    def test_other_data_or_other_arithmetic(
        self, begun: RunFolder, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        workers = Workers(random_policy())
        monkeypatch.setattr(sys, "argv", ["x", "train", "a b"])
        known = describe_provenance(Task("countdown", [], [], {}, "a" * 64), workers)
        assert known["data_fingerprint"] == "a" * 64 and known["command"] == "forkrl train 'a b'"
        assert (known["workers"], known["threads"], known["device"]) == (1, torch.get_num_threads(), "cpu")
        assert changed_arithmetic(known, workers, {}) == ""
        then = {**known, "torch": "1.0"}
        del then["workers"]
        said = f"workers 1 instead of unknown, torch {torch.__version__} instead of 1.0"
        assert changed_arithmetic(then, workers, {}) == said
        assert changed_arithmetic(known | {"vllm": "1"}, workers, {"vllm": "2"}) == "vllm 2 instead of 1"
        refuse_other_data(begun, config, "a" * 64)
        with pytest.raises(UserError, match=r"the prompts of task.countdown .*\(fingerprint a{12} then, b{12} now"):
            refuse_other_data(begun, config, "b" * 64)
        RunFolder.open(begun.path).close()


def test_paths(run: RunFolder) -> None:
    assert run.checkpoints == run.path / "checkpoints"
    assert run.checkpoints.is_dir()
    assert run.report == run.path / "report.html"
