"""Which engine a command samples with. vLLM itself: ``tests/vllm``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from forkrl.commands.eval_engines import identity, open_sampler
from forkrl.commands.options import AnalyzeOptions, DriftOptions, EvalOptions
from forkrl.commands.session import open_model
from forkrl.commands.subject import open_subject
from forkrl.commands.token_parts import open_response_subject
from forkrl.commands.work_folder import open_work_folder
from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe, recipe_toml
from forkrl.errors import UserError
from forkrl.store.run_folder import RunFolder
from tests.smoke.world import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("engines") / "model"
    make_model(folder)
    return str(folder)


def test_the_weights_are_known_where_the_model_is_here(model: str) -> None:
    here, there = EvalOptions(model), EvalOptions(model, server="http://there")
    assert len(identity(open_subject(here), here)["weights"]) == 16
    assert identity(open_subject(there), there)["weights"] == ""
    assert identity(open_subject(there), there)["engine"] == "server"


@pytest.mark.parametrize("override", ["rollout.engine=vllm", "model.revision=x", "model.precision=bf16"])
def test_settings_without_effect(model: str, override: str) -> None:
    with pytest.raises(UserError, match=f"{override}: has no effect on a model that a server holds"):
        open_subject(EvalOptions(model, overrides=[override], server="http://there"))


def test_a_server_has_its_own_engine(model: str) -> None:
    with pytest.raises(UserError, match="--engine vllm: has no effect on a model that a server holds; drop it"):
        EvalOptions(model, engine="vllm", server="http://there")


@pytest.mark.parametrize("options", [AnalyzeOptions, DriftOptions])
def test_ready_responses_need_no_engine(model: str, options: Any) -> None:
    named = [model, model] if options is DriftOptions else model
    with pytest.raises(UserError, match="--engine: has no effect along with --responses given.jsonl: nothing is gen"):
        open_response_subject(options(named, engine="vllm", responses=Path("given.jsonl")))


def run_with(folder: Path, *settings: str) -> str:
    """A run folder of this engine, without weights."""
    RunFolder.create(folder, recipe_toml(load_recipe(TrainConfig, None, settings)), {}).close()
    return f"{folder}@base"


def engine_of(model: str, *overrides: str, **options: Any) -> str:
    return open_subject(AnalyzeOptions(model, overrides=overrides, **options)).config.rollout.engine


def test_the_engine_is_that_of_the_run_unless_another_is_named(model: str, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "rollout.engine=vllm", "rollout.kv_cache_gib=2")
    assert engine_of(model) == "torch"
    assert engine_of(model, engine="vllm") == engine_of(model, "rollout.engine=vllm") == "vllm"
    assert engine_of(run) == "vllm"
    assert engine_of(run, engine="torch") == "torch"
    with pytest.raises(UserError, match="rollout.engine=vllm: has no effect along with --engine; drop one of the two"):
        engine_of(model, "rollout.engine=vllm", engine="torch")
    with pytest.raises(UserError, match="rollout.kv_cache_gib is read only with"):
        engine_of(run, "rollout.kv_cache_gib=3", engine="torch")


def test_an_adapter_of_a_run_is_sampled_with_vllm_too(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "lora.rank=8", "lora.alpha=16", "checkpoint.merged=true")
    assert engine_of(run, engine="vllm") == "vllm"


def test_a_missing_vllm_is_noticed_before_the_model_is_loaded(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("forkrl.commands.session.open_policy", lambda *args: pytest.fail("it loaded the model"))
    subject = open_subject(AnalyzeOptions(model, engine="vllm"))
    with pytest.raises(UserError, match="needs vLLM; install it with"), open_model(subject.config):
        pytest.fail("it was opened")


def test_a_folder_from_one_engine_is_not_continued_with_another(tmp_path: Path) -> None:
    with open_work_folder(tmp_path / "old", {"schema": "s"}):
        pass  # as before there was a choice
    with open_work_folder(tmp_path / "old", {"schema": "s", "engine": "torch"}):
        pass
    refused = pytest.raises(UserError, match=r"created with different settings \(engine = 'torch', now 'vllm'\)")
    with refused, open_work_folder(tmp_path / "old", {"schema": "s", "engine": "vllm"}):
        pytest.fail("it was opened")


def test_a_run_has_no_name_at_a_server(model: str, tmp_path: Path) -> None:
    options = EvalOptions(model, server="http://there")
    subject = open_subject(options)._replace(run=tmp_path)
    with (
        pytest.raises(UserError, match="give the model's name at the server in place of the run"),
        open_sampler(subject, options, "plain"),
    ):
        pass
