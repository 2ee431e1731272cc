"""Gradients at the selected positions alone: the same log-probs, the same gradient where everything is selected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from forkrl.backward import compute_selected_stats, compute_token_stats, require_forks_only
from forkrl.batching import collate
from forkrl.errors import UserError
from forkrl.model import Policy
from forkrl.replicas import Replicas
from forkrl.rollout import EmbeddedEngine
from forkrl.types import Prompt, SamplingParams, TokenBatch
from forkrl.update import update_policy
from tests.models import random_policy
from tests.numerics.test_update import recipe

FAMILIES = ["qwen3", "llama", "mistral with a sliding window", "gpt2"]


def make_batch(policy: Policy) -> TokenBatch:
    """Sequences of several lengths with random advantages."""
    generator = torch.Generator().manual_seed(2)
    engine = EmbeddedEngine(Replicas(policy), max_prompt_tokens=16)
    prompts = [Prompt(str(index), str(index) * (index + 1), "") for index in range(4)]
    groups = engine.generate(prompts, group_size=3, sampling=SamplingParams(24), generator=generator)
    return collate(groups, torch.randn(4, 3, generator=generator), pad_id=0)


def some_of(batch: TokenBatch, share: float = 0.3) -> torch.Tensor:
    """A random selection that leaves one sequence without any."""
    selected = batch.response_mask & (torch.rand(batch.response_mask.shape) < share)
    selected[1] = False
    return selected


def gradient(policy: Policy, loss: torch.Tensor) -> torch.Tensor:
    policy.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_dense_pass(family: str) -> None:
    policy = random_policy(family)
    batch = make_batch(policy)
    selected = some_of(batch)
    dense = compute_token_stats(policy, batch, temperature=0.8)
    sparse = compute_selected_stats(policy, batch, selected, temperature=0.8)
    for exact, approximate in zip(dense, sparse, strict=True):
        torch.testing.assert_close(approximate[selected], exact[selected], atol=2e-5, rtol=0)
        assert not approximate[~selected].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_selected_the_gradient_is_exact(family: str) -> None:
    """Every position before a sequence's last prediction, the prompt's among them."""
    policy = random_policy(family)
    batch = make_batch(policy)
    weights = torch.randn(batch.response_mask.shape) * batch.response_mask
    expected = gradient(policy, (compute_token_stats(policy, batch, temperature=1.0).logprobs * weights).sum())
    everything = compute_selected_stats(policy, batch, batch.attention_mask, temperature=1.0)
    measured = gradient(policy, (everything.logprobs * weights).sum())
    assert (measured - expected).norm() <= 1e-5 * expected.norm()


def test_with_a_part_selected_the_gradient_points_the_same_way() -> None:
    policy = random_policy()
    batch = make_batch(policy)
    selected = some_of(batch)
    expected = gradient(policy, compute_token_stats(policy, batch, temperature=1.0).logprobs[selected].sum())
    measured = gradient(policy, compute_selected_stats(policy, batch, selected, temperature=1.0).logprobs.sum())
    cosine = torch.nn.functional.cosine_similarity(measured, expected, dim=0)
    assert 0.5 < cosine < 0.9999


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch", "sequence"])
def test_an_update_selects_the_same_tokens_as_the_dense_one(scope: str, on_policy: bool) -> None:
    policy = random_policy()
    batch = make_batch(policy)
    updates = []
    for backward in ("dense", "forks_only"):
        working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        config = recipe(selection={"scope": scope}).model_dump()
        config["training"] |= {"backward": backward, "micro_batch_tokens": 90}
        optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
        updates.append(
            update_policy(
                Replicas(working),
                optimizer,
                batch,
                type(recipe()).model_validate(config),
                torch.Generator(),
                on_policy=on_policy,
            )
        )
    dense, sparse = updates
    assert dense.selected_BT.equal(sparse.selected_BT)
    torch.testing.assert_close(sparse.entropy_BT, dense.entropy_BT, atol=1e-5, rtol=0)
    assert sparse.metrics["loss/policy"] == pytest.approx(dense.metrics["loss/policy"], abs=1e-5)
    assert sparse.metrics["grad/norm"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_fitting_models_are_let_through(family: str) -> None:
    require_forks_only(random_policy(family))


def test_layers_of_an_unknown_kind_are_refused_by_name() -> None:
    policy = random_policy()
    policy.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match=r"does not fit Qwen3ForCausalLM.*ValueError: layers of kind linear_attention"):
        require_forks_only(policy)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"kl_coef": 0.1}}, "loss.kl_coef and loss.entropy_coef are means over all"),
        ({"loss": {"entropy_coef": 0.1}}, "loss.kl_coef and loss.entropy_coef are means over all"),
        ({"model": {"gradient_checkpointing": True}}, "set model.gradient_checkpointing to false"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(training={"mini_batch_prompts": 6, "backward": "forks_only"}, **sections)
