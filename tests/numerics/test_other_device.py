"""On another device than the CPU the numbers are the CPU's: updates, statistics, selections, losses, rollouts.

The device is the pretend accelerator: it shows that every tensor is on the right device and that the branches for
accelerators are right, not that an accelerator's kernels are.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.elsewhere import on_accelerator

DEVICE = "pretend"
SELECTIONS: tuple[dict[str, Any], ...] = (
    {"scope": "micro_batch"},
    {"scope": "mini_batch"},
    {"scope": "sequence", "entropy": "rollout"},  # one sequence's current entropies tie but for rounding
)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.device.type == DEVICE
    torch.testing.assert_close(actual.detach().cpu(), expected.detach(), rtol=tolerance, atol=tolerance * 1e-1)


def rollouts_of(policy: Any, **sampling: Any) -> list[Any]:
    """Continuations of ten prefixes of unequal lengths and room, in two waves."""
    from forkrl.parallel.workers import Workers
    from forkrl.rollout import EmbeddedEngine
    from forkrl.rollout.embedded import Prefix
    from forkrl.types import SamplingParams

    texts = [("1 2", ""), ("5", "3" * 29), ("987654321 0", "4 4"), ("5", "0123456789" * 2), ("5", "7" * 57)]
    texts += [(str(number) * number, "") for number in range(1, 6)]
    encode = policy.tokenizer.encode
    prefixes = [Prefix(tuple(encode(prompt)), tuple(encode(response))) for prompt, response in texts]
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16, max_sequences=8)
    params, generator = SamplingParams(64, **sampling), torch.Generator(policy.device).manual_seed(4)
    return [one for (one,) in engine.continue_from(prefixes, count=1, sampling=params, generator=generator)]


def update_on(device: str, policy: Any, batch: Any, config: Any, reference: Any, on_policy: bool) -> tuple[Tensor, Any]:
    """The gradient of one update, flat, and what the update says; the weights given are left alone."""
    from forkrl.model.policy import Policy
    from forkrl.parallel.workers import Workers
    from forkrl.training.update import choose_in_rollout_batch, update_policy

    def there(policy: Policy) -> Policy:
        model: Any = copy.deepcopy(policy.model)
        return Policy(model.to(device), policy.tokenizer, config.model.precision)

    working = there(policy)
    generator = torch.Generator(device).manual_seed(5)
    if config.selection.scope == "rollout_batch":
        batch = choose_in_rollout_batch(batch, config, generator)
    batch = batch.to(device)
    workers = Workers(working, None if reference is None else there(reference))
    optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
    update = update_policy(workers, optimizer, batch, config, generator, on_policy=on_policy)
    gradients = [parameter.grad.flatten() for parameter in working.model.parameters() if parameter.grad is not None]
    return torch.cat(gradients), update


def require_same_updates(*settings: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Every setting's update, on policy and off, from the same batch here and there."""
    from tests.models import random_policy
    from tests.numerics.test_update import make_batch, recipe

    policy, reference = random_policy(), random_policy(seed=1)
    batch = make_batch(policy)
    for sections in settings:
        config = recipe(micro_batch_tokens=200, **sections)
        other = reference if config.loss.kl_coef else None
        for on_policy in (False, True):
            expected, here = update_on("cpu", policy, batch, config, other, on_policy)
            actual, there = update_on(DEVICE, policy, batch, config, other, on_policy)
            assert actual.device.type == there.selected_BT.device.type == DEVICE
            error = float((actual.cpu() - expected).norm() / expected.norm())
            assert error <= tolerance, f"{sections}, on policy {on_policy}: the gradient differs by {error:.2g}"
            if tolerance < 1e-3:
                assert there.selected_BT.cpu().equal(here.selected_BT), sections
                assert there.metrics == pytest.approx(here.metrics, rel=1e-3, abs=1e-5), sections


@on_accelerator
def test_dense_updates_have_the_cpu_s_gradient() -> None:
    require_same_updates(
        *({"selection": selection} for selection in SELECTIONS),
        {"selection": {"rule": "all"}, "loss": {"kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0}},
        {"selection": {"rule": "threshold", "threshold": 0.9}},
        {"selection": {"rule": "random", "scope": "micro_batch"}, "loss": {"denominator": "response"}},
        {"selection": {"rule": "bottom_entropy", "scope": "rollout_batch", "entropy": "rollout"}},
    )


@on_accelerator
def test_forks_only_updates_have_the_cpu_s_gradient() -> None:
    forks: dict[str, Any] = {"training": {"mini_batch_prompts": 6, "micro_batch_tokens": 200, "backward": "forks_only"}}
    require_same_updates(
        *(forks | {"selection": selection} for selection in SELECTIONS),
        forks | {"forks_only": {"projections": True}},
        forks | {"forks_only": {"prompt": True, "sampled": 0.2}, "selection": {"scope": "mini_batch"}},
        forks | {"selection": {"rule": "random", "scope": "sequence"}},
        forks | {"selection": {"rule": "threshold", "threshold": 0.9}, "forks_only": {"kept_mib": 0}},
    )


@on_accelerator
def test_updates_in_bf16_have_the_cpu_s_gradient_but_for_rounding() -> None:
    """The CPU attends and rounds elsewhere than an accelerator."""
    ways: list[dict[str, Any]] = [{"mini_batch_prompts": 6, "backward": way} for way in ("dense", "forks_only")]
    bf16 = {"model": {"precision": "bf16"}, "selection": {"rule": "random"}}
    require_same_updates(*(bf16 | {"training": way} for way in ways), tolerance=0.1)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@on_accelerator
def test_token_statistics_and_their_gradients_are_the_cpu_s(backend: str) -> None:
    from forkrl.head import token_stats

    generator = torch.Generator().manual_seed(2)
    hidden_ND, weight_VD = torch.randn(40, 16, generator=generator), torch.randn(90, 16, generator=generator)
    bias_V, targets_N = torch.randn(90, generator=generator), torch.randint(90, (40,), generator=generator)
    for entropy_grad in (False, True):
        found = []
        for device in ("cpu", DEVICE):
            inputs = [each.detach().to(device).requires_grad_() for each in (hidden_ND, weight_VD, bias_V)]
            hidden, weight, bias = inputs
            targets = targets_N.to(device)
            stats = token_stats(
                hidden, weight, targets, temperature=0.7, bias=bias, backend=backend, entropy_grad=entropy_grad
            )
            factors = torch.linspace(-1, 2, 40).where(torch.arange(40) % 3 > 0, 0.0).to(device)
            ((stats.logprobs + (stats.entropy if entropy_grad else 0)) * factors).sum().backward()
            found.append([*stats, *(each.grad for each in inputs)])
        for expected, actual in zip(*found, strict=True):
            assert actual is not None
            assert expected is not None
            close(actual, expected)


@on_accelerator
def test_the_functions_of_the_package_stay_on_the_device_that_they_are_given() -> None:
    import forkrl
    from forkrl.method.selection import ENTROPY_RULES, entropy_threshold, select_tokens_per_sequence

    generator = torch.Generator().manual_seed(3)
    entropy_BT = torch.rand(6, 20, generator=generator)
    mask_BT = torch.arange(20) < torch.tensor([20, 3, 9, 1, 0, 14])[:, None]
    rewards_PG = torch.rand(3, 4, generator=generator)
    for rule in ENTROPY_RULES:
        threshold = 0.5 if rule == "threshold" else None
        for select in (forkrl.select_tokens, select_tokens_per_sequence):
            expected, *made = (
                select(
                    entropy_BT.to(device),
                    mask_BT.to(device),
                    rule,
                    threshold=threshold,
                    generator=torch.Generator(drawn_on).manual_seed(1),
                )
                for device, drawn_on in (("cpu", "cpu"), (DEVICE, DEVICE), (DEVICE, "cpu"))
            )
            for selected_BT in made:
                close(selected_BT, expected)
    selected_BT = forkrl.select_tokens(entropy_BT, mask_BT)
    close(entropy_threshold(entropy_BT.to(DEVICE), selected_BT.to(DEVICE)), entropy_threshold(entropy_BT, selected_BT))
    close(forkrl.group_advantages(rewards_PG.to(DEVICE)), forkrl.group_advantages(rewards_PG))
    lengths = torch.tensor([3, 9, 10])
    for cache in (0, 4):
        close(forkrl.overlong_penalty(lengths.to(DEVICE), 10, cache), forkrl.overlong_penalty(lengths, 10, cache))
    scores_BV = torch.randn(4, 9, generator=generator)
    for high, low in ((1.0, 0.3), (0.0, 2.0)):
        temperature = forkrl.ForkTemperature(high, low, threshold=1.5)
        close(temperature(None, scores_BV.to(DEVICE)), temperature(None, scores_BV))


@on_accelerator
def test_drift_is_measured_of_entropies_on_any_device() -> None:
    from forkrl.analysis import entropy_change_by_percentile, overlap_ratio, overlap_table, percentile_table

    generator = torch.Generator().manual_seed(4)
    base_BT, trained_BT = (torch.rand(6, 20, generator=generator) for _ in range(2))
    mask_BT = torch.arange(20) < torch.tensor([20, 3, 9, 1, 0, 14])[:, None]
    base, trained, mask = base_BT.to(DEVICE), trained_BT.to(DEVICE), mask_BT.to(DEVICE)
    assert overlap_ratio(base, trained, mask) == overlap_ratio(base_BT, trained_BT, mask_BT)
    expected = entropy_change_by_percentile(base_BT, trained_BT, mask_BT, bins=5)
    assert entropy_change_by_percentile(base, trained, mask, bins=5).equals(expected)
    here = {"first": base_BT.flatten(), "last": trained_BT.flatten()}
    there = {name: entropy_N.to(DEVICE) for name, entropy_N in here.items()}
    prompts_N = torch.arange(120) // 20
    assert overlap_table(there, prompts_N.to(DEVICE)).equals(overlap_table(here, prompts_N))
    assert percentile_table(there).equals(percentile_table(here))


@on_accelerator
def test_losses_are_the_cpu_s() -> None:
    from forkrl.method.loss import kl_penalty, policy_loss

    generator = torch.Generator().manual_seed(3)
    logprobs_BT, old_BT = (-torch.rand(6, 20, generator=generator) for _ in range(2))
    mask_BT = torch.arange(20) < torch.tensor([20, 3, 9, 1, 0, 14])[:, None]
    advantages_B = torch.randn(6, generator=generator)

    def losses(device: str) -> list[Any]:
        logprobs, old, mask, advantages = (each.to(device) for each in (logprobs_BT, old_BT, mask_BT, advantages_B))
        ways: tuple[Any, ...] = ("selected", "response", 7.0)
        made = [policy_loss(logprobs, old, advantages, mask, dual_clip=2.0, denominator=way) for way in ways]
        return [kl_penalty(logprobs, old, mask), *made]

    for actual, expected in zip(losses(DEVICE), losses("cpu"), strict=True):
        close(actual.loss, expected.loss)
        for name, value in expected.metrics.items():
            close(actual.metrics[name], value)


@on_accelerator
def test_rollouts_and_their_statistics_are_the_cpu_s() -> None:
    """By the flat step and by the model's own."""
    from forkrl.model.policy import Policy
    from forkrl.rollout.fork_temperature import ForkTemperature
    from tests.models import random_policy

    plain: dict[str, Any] = {}
    shaped = {"top_k": 5, "top_p": 0.9, "temperature": 0.8}
    forked = {"fork_temperature": ForkTemperature(1.0, 0.3, threshold=0.7)}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("qwen3", plain), ("qwen3", shaped), ("qwen3", forked), ("llama", shaped),
        ("gpt2", plain), ("mistral with a sliding window", plain),
    ]  # fmt: skip
    for family, sampling in cases:
        here = random_policy(family)
        model: Any = copy.deepcopy(here.model)
        there = Policy(model.to(DEVICE), here.tokenizer)
        actual = rollouts_of(there, **sampling)
        for ours, theirs in zip(actual, rollouts_of(here, **sampling), strict=True):
            assert (ours.prompt_ids, ours.response_ids) == (theirs.prompt_ids, theirs.response_ids)
            assert (ours.text, ours.finished) == (theirs.text, theirs.finished)
            # close to those of the CPU, and kept in the host's memory
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.entropy, theirs.entropy, atol=1e-4, rtol=1e-4)


@on_accelerator
def test_rollouts_in_bf16_keep_their_cache_in_bf16() -> None:
    from forkrl.model.policy import Policy
    from forkrl.rollout.flat_step import FlatStep
    from tests.models import random_policy

    here = random_policy()
    model: Any = copy.deepcopy(here.model)
    there = Policy(model.to(DEVICE), here.tokenizer, "bf16")
    assert all(len(rollout) for rollout in rollouts_of(there))
    assert FlatStep(there).cache_dtype == torch.bfloat16
