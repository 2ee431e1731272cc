"""Opening models: what would be trained wrongly is refused, and recomputing activations changes no gradient."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from forkrl.config import ModelConfig
from forkrl.errors import UserError
from forkrl.head import token_stats
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.rollout.growing_cache import build_cache
from forkrl.types import Prompt, SamplingParams, TokenBatch, TokenStats
from tests.models import random_policy


def saved(policy: Policy, folder: Path) -> str:
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_recipe_names_the_backend_of_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = open_policy(ModelConfig(path=saved(random_policy(), tmp_path), head="chunked"), "cpu")
    backends: list[str] = []

    def recording(*tensors: torch.Tensor, backend: str, **options: Any) -> TokenStats:
        backends.append(backend)
        return token_stats(*tensors, backend=backend, **options)

    monkeypatch.setattr("forkrl.model.forward.token_stats", recording)
    ids_BT = torch.ones(1, 3, dtype=torch.int64)
    mask_BT, zeros_BT = ids_BT.bool(), torch.zeros(1, 3)
    compute_token_stats(
        policy, TokenBatch(ids_BT, ids_BT, mask_BT, mask_BT, zeros_BT, zeros_BT, torch.zeros(1)), temperature=1.0
    )
    assert backends == ["chunked"]


def test_a_head_that_cannot_run_here_is_rejected_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = ModelConfig(path=saved(random_policy(), tmp_path), head="triton")
    with pytest.raises(UserError, match=r'model.head = "triton": .* set model\.head=chunked'):
        open_policy(config, "cpu")


def test_recomputing_activations_runs_layers_twice_and_changes_no_gradient(tmp_path: Path) -> None:
    path = saved(random_policy(), tmp_path)
    gradients, calls = [], []
    for recompute in (False, True):
        policy = open_policy(ModelConfig(path=path, gradient_checkpointing=recompute), "cpu")
        count: list[int] = []
        attention = policy.decoder.get_submodule("layers.0.self_attn")
        attention.register_forward_hook(lambda *_, count=count: count.append(1))
        EmbeddedEngine(Workers(policy), max_prompt_tokens=8).generate(  # a cache must still work
            [Prompt("a", "12", "")],
            group_size=2,
            sampling=SamplingParams(4),
            generator=torch.Generator().manual_seed(0),
        )
        count.clear()
        ids = torch.arange(2, 12)[None]
        policy.hidden_states(ids).square().sum().backward()
        gradients.append([parameter.grad for parameter in policy.decoder.parameters()])
        calls.append(len(count))
        assert not any(module.training for module in attention.modules())
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert recomputed is not None
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_passed_under_the_name_that_the_decoder_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen, cache = random_policy(), [], DynamicCache()
    own = policy.decoder.forward

    def with_cache(*, cache: Any = None, **options: Any) -> Any:
        seen.append(cache)
        return own(**options)

    def with_past_key_values(*, past_key_values: Any = None, **options: Any) -> Any:
        seen.append(past_key_values)
        return own(**options)

    monkeypatch.setattr(policy.decoder, "forward", with_cache if name == "cache" else with_past_key_values)
    Policy(policy.model, policy.tokenizer).hidden_states(torch.arange(2, 6)[None], cache=cache)
    assert seen == [cache]


@pytest.mark.parametrize("enabled", [True, False])
def test_opening_and_sampling_use_nothing_deprecated(tmp_path: Path, enabled: bool) -> None:
    path = saved(random_policy(), tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        policy = open_policy(ModelConfig(path=path, gradient_checkpointing=enabled), "cpu")
        policy.hidden_states(torch.arange(2, 6)[None], cache=build_cache(policy.model.config), use_cache=True)
    assert bool(policy._recomputed_layers) is enabled


def test_weights_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    random_policy().model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer; save the model's there"):
        open_policy(ModelConfig(path=str(tmp_path)), "cpu")


def test_a_model_that_transforms_its_logits_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(random_policy("gemma2 with soft-capped logits"), tmp_path)
    with pytest.raises(UserError, match="Gemma2ForCausalLM transforms its logits"):
        open_policy(ModelConfig(path=path), "cpu")


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral with a sliding window", "gpt2"])
def test_other_models_open(family: str, tmp_path: Path) -> None:
    path = saved(random_policy(family), tmp_path)
    for precision in ("fp32", "bf16"):
        policy = open_policy(ModelConfig.model_validate({"path": path, "precision": precision}), "cpu")
        assert policy.head_weight.dtype == torch.float32
        assert not policy.model.training
