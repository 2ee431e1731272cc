"""``rollout.engine = "vllm"`` where it cannot work: every refusal names a setting. vLLM itself: ``tests/vllm``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.config.train import RolloutConfig
from forkrl.errors import UserError
from forkrl.parallel.processes import Child
from forkrl.parallel.workers import Workers
from forkrl.rollout.vllm_engine import VllmEngine, _kv_cache_bytes
from forkrl.training import open_run
from tests.models import random_policy

VLLM = "rollout.engine=vllm"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.kv_cache_gib=2"], 'rollout.kv_cache_gib is read only with rollout.engine = "vllm"'),
        (["rollout.engine=sglang"], "rollout.engine"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(TrainConfig, None, overrides)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_without_vllm_a_run_says_how_to_install_it_and_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(open_run, "_open_parts", lambda *args: pytest.fail("it loaded the model"))
    config = load_recipe(TrainConfig, None, [VLLM])
    with (
        pytest.raises(UserError, match=r"""needs vLLM; install it with: pip install 'forkrl\[vllm\]'"""),
        open_run.open_run(config, tmp_path / "run"),
    ):
        pytest.fail("it was opened")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_a_device_that_vllm_cannot_share_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy()
    monkeypatch.setattr("forkrl.rollout.vllm_engine.require_vllm", lambda: None)
    monkeypatch.setattr(type(policy), "device", torch.device(device))
    with pytest.raises(UserError, match=f"the model is on {device}, not on the CPU or the first CUDA device"):
        VllmEngine(Workers(policy), RolloutConfig(engine="vllm"))


@pytest.mark.parametrize(
    ("limits", "num_bytes"),
    [
        # Three sequences of 40 + 56 tokens: 3 x (3 + 1) + 1 blocks of 32 tokens; 2 x 2 layers x 2 heads x 8 x 4 bytes.
        ({"max_prompt_tokens": 40, "max_response_tokens": 56, "max_sequences": 3}, 13 * 32 * 256),
        ({}, 2**20),
    ],
)
def test_keys_and_values_take_what_they_need_up_to_a_limit(limits: dict[str, int], num_bytes: int) -> None:
    settings = RolloutConfig.model_validate({"engine": "vllm", "kv_cache_gib": 1 / 1024} | limits)
    assert _kv_cache_bytes(random_policy(), settings) == num_bytes


def test_keys_and_values_of_one_sequence_must_fit() -> None:
    lengths = {"max_prompt_tokens": 40, "max_response_tokens": 56}  # 3 + 1 blocks, and one for padding
    settings = RolloutConfig.model_validate({"engine": "vllm", "kv_cache_gib": 4.9 * 32 * 256 / 2**30} | lengths)
    with pytest.raises(
        UserError, match=r"kv_cache_gib = 3.\d+e-05 does not hold one sequence of 96 tokens; raise it to"
    ):
        _kv_cache_bytes(random_policy(), settings)


@pytest.mark.parametrize("count", [1, 2])
def test_shared_weights_follow_the_model(count: int) -> None:
    policy = random_policy()
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    with Workers(policy, count=count, threads=1) as workers:
        shared = workers.share_weights().map()
        assert shared.keys() == before.keys()
        assert all(torch.equal(shared[name], before[name]) for name in before)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.add_(1)
        assert all(torch.equal(shared[name], before[name] + 1) for name in before)
        assert workers.share_weights().map().keys() == shared.keys()


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("print('first'); print('no \\x1b[1m reason'); raise SystemExit(3)", "exited with code 3 (no \\x1b[1m reason)"),
        ("raise SystemExit(4)", "exited with code 4"),
        ("import os; os.kill(os.getpid(), 15 - 6)", "was killed by SIGKILL, as the system does when memory runs out"),
    ],
)
def test_a_child_says_how_it_ended(program: str, ended: str, capfd: pytest.CaptureFixture[str]) -> None:
    child: Any = Child(program, os.environ, quiet=True)
    assert child.death() == ended
    child.close()
    child.close()
    assert capfd.readouterr() == ("", "")
