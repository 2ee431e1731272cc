"""Which engine an evaluation opens, with what; vLLM and the server stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forkrl.commands.eval_engines import identity, open_sampler, settings_for
from forkrl.commands.options import EvalOptions
from forkrl.commands.subject import open_subject
from forkrl.errors import UserError
from tests.smoke.world import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("engines") / "model"
    make_model(folder)
    return str(folder)


class Recorded:
    """Notes what it was made with."""

    name = "vllm"
    made: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(self, *args: Any, **named: Any) -> None:
        type(self).made = (args, named)


def test_vllm_gets_the_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkrl.evaluation.vllm.VllmSampler", Recorded)
    options = EvalOptions(model, engine="vllm", overrides=["seed=7"], max_tokens=5)
    subject = open_subject(options)
    with open_sampler(subject, options, "plain") as sampler:
        assert sampler.tokenizer is not None and sampler.tokenizer.eos_token == "<eos>"
        assert settings_for(subject, sampler, []).rollout.max_response_tokens == 5
        assert isinstance(sampler, Recorded)
    assert Recorded.made == ((model,), {"revision": None, "seed": 7, "stop_token_ids": (1,)})


def test_the_weights_are_known_where_the_model_is_here(model: str) -> None:
    here, there = EvalOptions(model), EvalOptions(model, server="http://there")
    assert len(identity(open_subject(here), here)["weights"]) == 16
    assert identity(open_subject(there), there)["weights"] == ""
    assert there.engine_name == "server"


@pytest.mark.parametrize(
    ("engine", "override", "says"),
    [
        ({"engine": "vllm"}, "runtime.workers=2", "has no effect on vLLM, which decides that itself"),
        (
            {"engine": "vllm", "server": "http://there"},
            "model.revision=x",
            "has no effect on a model that a server holds",
        ),
        ({"server": "http://there"}, "model.precision=bf16", "on a model that a server holds"),
    ],
)
def test_settings_without_effect(model: str, engine: dict[str, Any], override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_subject(EvalOptions(model, overrides=[override], **engine))


def test_settings_that_vllm_heeds(model: str) -> None:
    subject = open_subject(EvalOptions(model, engine="vllm", overrides=["model.revision=x", 'rollout.stop=["a"]']))
    assert (subject.config.model.revision, subject.config.rollout.stop) == ("x", ("a",))


def test_a_run_has_no_name_at_a_server(model: str, tmp_path: Path) -> None:
    options = EvalOptions(model, server="http://there")
    subject = open_subject(options)._replace(run=tmp_path)
    with (
        pytest.raises(UserError, match="give the model's name at the server in place of the run"),
        open_sampler(subject, options, "plain"),
    ):
        pass
