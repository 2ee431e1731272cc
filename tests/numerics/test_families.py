"""Families of models: what trains agrees with transformers' own forward pass, the rest is rejected in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from forkrl.config import ModelConfig, TrainConfig
from forkrl.errors import UserError
from forkrl.method.batches import collate
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy, open_policy
from forkrl.model.support import require_supported
from forkrl.parallel.workers import Workers
from forkrl.rollout import open_engine
from forkrl.types import Prompt, Rollout, RolloutGroup, SamplingParams, TokenBatch
from tests.families import ANALYSABLE, REJECTED, TRAINABLE, family_policy
from tests.models import random_policy

PROMPTS = [Prompt("a", "12", ""), Prompt("b", "3 45678901", "")]
TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def sampled(policy: Policy) -> TokenBatch:
    engine = open_engine(Workers(policy), TrainConfig())
    groups = engine.generate(
        PROMPTS, group_size=3, sampling=SamplingParams(16), generator=torch.Generator().manual_seed(0)
    )
    return collate(groups, torch.zeros(2, 3), pad_id=0)


@torch.no_grad()
def own_logprobs(policy: Policy, batch: TokenBatch) -> list[torch.Tensor]:
    """The model's own logits, of each sequence alone."""
    found = []
    for ids, targets, mask, inside in zip(
        batch.input_ids, batch.targets, batch.response_mask, batch.attention_mask, strict=True
    ):
        logits = policy.model(input_ids=ids[inside][None], use_cache=False).logits[0].float()
        logprobs = logits.log_softmax(-1).gather(-1, targets[inside][:, None])[:, 0]
        found.append(logprobs[mask[inside]])
    return found


@pytest.mark.parametrize("family", TRAINABLE)
def test_sampler_trainer_and_transformers_agree(family: str) -> None:
    policy = family_policy(family, TRAINABLE[family])
    require_supported(policy, family)
    batch = sampled(policy)
    with torch.no_grad():
        trained = compute_token_stats(policy, batch, temperature=1.0).logprobs
    expected = torch.cat(own_logprobs(policy, batch))
    assert float(expected.std()) > 0.01  # else any model would agree with any other
    torch.testing.assert_close(trained[batch.response_mask], expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(batch.old_logprobs[batch.response_mask], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ANALYSABLE)
def test_a_model_with_other_state_can_be_measured_but_not_sampled(family: str) -> None:
    policy = family_policy(family, ANALYSABLE[family])
    require_supported(policy, family)
    with pytest.raises(UserError, match=r"cannot be sampled or trained: .*docs/models.md") as error:
        open_engine(Workers(policy), TrainConfig())
    assert "\n" not in str(error.value)
    batch = collate([RolloutGroup(PROMPTS[0], sampled_rollouts())], torch.zeros(1, 3), pad_id=0)
    with torch.no_grad():
        measured = compute_token_stats(policy, batch, temperature=1.0).logprobs[batch.response_mask]
    torch.testing.assert_close(measured, torch.cat(own_logprobs(policy, batch)), rtol=0, atol=1e-4)


def sampled_rollouts() -> tuple[Rollout, ...]:
    engine = open_engine(Workers(random_policy()), TrainConfig())
    [group] = engine.generate(
        PROMPTS[:1], group_size=3, sampling=SamplingParams(12), generator=torch.Generator().manual_seed(0)
    )
    return group.rollouts


@pytest.mark.parametrize("family", REJECTED)
def test_what_would_be_wrong_is_rejected_with_the_reason(family: str) -> None:
    if family == "doge" and Version(transformers.__version__) >= Version("5.24"):
        pytest.skip("its attention no longer depends on padding")
    kind, changes, reason = REJECTED[family]
    with pytest.raises(UserError, match=reason) as error:
        require_supported(family_policy(kind, changes), "m")
    assert str(error.value).startswith("model.path = 'm'") and "\n" not in str(error.value)


def test_the_table_lists_exactly_the_tested_families() -> None:
    sections = re.split(r"^## ", TABLE.read_text(), flags=re.MULTILINE)
    listed = {part.split("\n", 1)[0]: set(re.findall(r"`([a-z0-9_]+)`", part.split("\n", 1)[1])) for part in sections}
    assert set(TRAINABLE) <= listed["Can be trained"]
    assert set(ANALYSABLE) <= listed["Can only be analysed"]


LENGTH_DEPENDENT = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")])
def test_frequencies_that_depend_on_the_length_are_rejected_when_a_model_is_opened(
    family: str, kind: str, tmp_path: Path
) -> None:
    policy = family_policy(family, TRAINABLE[family] | {"rope_parameters": LENGTH_DEPENDENT[kind]})
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"rotary embedding of type '{kind}', whose frequencies depend on"):
        open_policy(ModelConfig(path=str(tmp_path)), "cpu")


def test_frequencies_of_one_kind_of_layer_are_enough_to_be_rejected() -> None:
    rope = {
        "full_attention": LENGTH_DEPENDENT["dynamic"],
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    policy = family_policy("gemma3_text", TRAINABLE["gemma3_text"] | {"rope_parameters": rope})
    with pytest.raises(UserError, match="rotary embedding of type 'dynamic'"):
        require_supported(policy, "m")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_scaled_frequencies_are_supported(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    require_supported(family_policy("llama", {"rope_parameters": rope}), "m")


def test_a_cache_that_does_not_reproduce_one_pass_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy("gpt2")
    forward = policy.model.get_decoder().forward

    def forgetful(**given: Any) -> Any:
        if given["input_ids"].shape[1] == 1:
            given["input_ids"] = 13 - given["input_ids"]
        return forward(**given)

    monkeypatch.setattr(policy.model.get_decoder(), "forward", forgetful)
    with pytest.raises(UserError, match=r"decoded from a cache differ by \S+ nats from those of one pass"):
        open_engine(Workers(policy), TrainConfig())


def test_an_adapter_is_rejected(tmp_path: Path) -> None:
    policy = random_policy()
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has an adapter \(adapter_config.json\).*merge it into the weights"):
        open_policy(ModelConfig(path=str(tmp_path)), "cpu")


@pytest.mark.parametrize("named", ["model.gguf", ""])
def test_gguf_is_answered_with_the_conversion(named: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"is in GGUF format; convert it .*gguf_file='model.gguf'\).save_pretrained"):
        open_policy(ModelConfig(path=str(tmp_path / named)), "cpu")
