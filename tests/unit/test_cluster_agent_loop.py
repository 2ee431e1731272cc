"""From a row of verl's data set to the model and back, with a stand-in for verl's servers; and the plug-in's names."""

from __future__ import annotations

import asyncio
import importlib
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from forkrl.errors import UserError
from forkrl.training.sft import build_character_tokenizer
from tests.models import ALPHABET, random_policy, with_bos
from tests.verl_here import needs_verl

pytestmark = needs_verl

TOKENIZER = random_policy().tokenizer
EOS = TOKENIZER.eos_token_id


@dataclass
class Servers:
    """Answers every request with the same tokens, and notes what it was asked."""

    token_ids: list[int]
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def generate(self, **asked: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        self.asked.append(asked)
        logprobs = [-0.5] * len(self.token_ids)
        return TokenOutput(token_ids=self.token_ids, log_probs=logprobs, extra_fields={"global_steps": 3})


def respond(servers: Servers, text: str, *, templated: bool = False, **options: Any) -> Any:
    from omegaconf import OmegaConf

    from forkrl.cluster.agent_loop import ExactPromptAgentLoop

    rollout = {"prompt_length": 6, "response_length": 4}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "forkrl": options})
    # All that verl hands to an agent loop.
    of_verl = {"processor": None, "hf_model_type": "qwen3", "dataset_cls": None, "data_config": None, "tools": None}
    loop = ExactPromptAgentLoop(
        trainer_config=SimpleNamespace(config=config), server_manager=servers, tokenizer=TOKENIZER, **of_verl
    )
    row = {
        "raw_prompt": [{"role": "user", "content": text}],
        "uid": "u",
        "reward_model": {"ground_truth": ""},
        "extra_info": {"id": "q", "place": "line 5", "source": "", "level": 0, "templated": templated},
    }
    return asyncio.run(loop.run({"temperature": 0.7, "logprobs": True}, **row))


def test_the_model_reads_the_prompt_and_nothing_else() -> None:
    servers = Servers([3, 4])
    output = respond(servers, "1 2 3")
    assert TOKENIZER.decode(output.prompt_ids) == "1 2 3"
    assert [asked["prompt_ids"] for asked in servers.asked] == [output.prompt_ids]


@pytest.mark.parametrize(
    ("text", "templated", "ids"),
    [("12", False, [0, 4, 5]), ("12", True, [4, 5]), ("<pad>12", False, [0, 4, 5]), ("<pad>12", True, [0, 4, 5])],
)
def test_the_tokenizers_bos_comes_once(monkeypatch: pytest.MonkeyPatch, text: str, templated: bool, ids: Any) -> None:
    monkeypatch.setattr("tests.unit.test_cluster_agent_loop.TOKENIZER", with_bos(build_character_tokenizer(ALPHABET)))
    assert respond(Servers([3]), text, templated=templated).prompt_ids == ids


def test_stop_tokens_and_limit_go_with_the_sampling_parameters() -> None:
    servers = Servers([3])
    respond(servers, "12", stop_token_ids=[7, 8])
    assert servers.asked[0]["sampling_params"] == {
        "temperature": 0.7,
        "logprobs": True,
        "stop_token_ids": [EOS, 7, 8],
        "max_tokens": 4,
    }


def test_every_token_is_the_models_own_and_none_is_beyond_the_limit() -> None:
    output = respond(Servers([3, 4, 5, 6, 7, 8]), "12")
    assert output.response_ids == [3, 4, 5, 6]
    assert output.response_mask == [1, 1, 1, 1]
    assert output.response_logprobs == [-0.5] * 4
    assert output.extra_fields["global_steps"] == 3


@pytest.mark.parametrize(("text", "tokens"), [("1234567", "7 tokens"), ("", "no tokens")])
def test_a_prompt_that_does_not_fit_is_not_cut(text: str, tokens: str) -> None:
    with pytest.raises(UserError, match=f"line 5: {tokens}"):
        respond(Servers([3]), text)


def test_the_plugin_registers_its_names() -> None:
    import verl  # noqa: F401  # which loads the plug-in where ForkRL is installed

    importlib.import_module("forkrl.cluster.plugin")
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.trainer.ppo.v1.trainer_base import get_trainer_cls

    assert _agent_loop_registry["forkrl_exact_prompt"]["_target_"].endswith(".ExactPromptAgentLoop")
    for mode in ("forkrl", "forkrl_colocate_async", "forkrl_separate_async"):
        assert get_trainer_cls(mode).__module__ == "forkrl.cluster.trainer"


def test_a_plugin_that_cannot_be_loaded_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = importlib.import_module("forkrl.cluster.plugin")
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(f"no {name}")))
    with caplog.at_level(logging.ERROR), pytest.raises(ImportError, match="no forkrl.cluster"):
        importlib.reload(plugin)
    assert "plug-in for verl cannot be loaded" in caplog.text
    assert "ImportError: no forkrl.cluster.agent_loop" in caplog.text
