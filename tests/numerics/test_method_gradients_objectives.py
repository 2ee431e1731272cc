"""The gradient of one update with each objective, and the settings at which it is DAPO's or REINFORCE's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.method.batches import cut_micro_batches
from forkrl.method.loss import kl_penalty
from forkrl.methods import OBJECTIVES
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.types import TokenBatch
from tests.models import random_policy
from tests.numerics.test_update import SEQUENCE_ROOM, close, gradient, make_batch, recipe

ALL = {"rule": "all"}
SETTINGS: dict[str, dict[str, Any]] = {
    "cispo": {},
    "gspo": {"clip_low": 0.02, "clip_high": 0.02},
    "gmpo": {"clip_low": 0.2, "clip_high": 0.2},
    "sapo": {},
    "dppo_tv": {"clip_low": 0.05, "clip_high": 0.05},
    "clip_cov": {"options": {"fraction": 0.2, "lowest": 0.1}},
    "kl_cov": {"options": {"fraction": 0.2}},
    "hapo": {},
    "archer": {},
}
UNCLIPPED = {"clip_low": 0.999, "clip_high": 1e6}
RANKED_IN_A_MICRO_BATCH = ("clip_cov", "kl_cov", "hapo")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy()


@pytest.fixture(scope="module")
def batch(policy: Policy) -> TokenBatch:
    return make_batch(policy)


def measured(
    policy: Policy, batch: TokenBatch, loss: dict[str, Any], selection: dict[str, Any] | None = None, **rest: Any
) -> Tensor:
    """With a reference if the objective needs one."""
    config = recipe(selection=selection or ALL, loss=loss, **rest)
    return gradient(policy, batch, config, random_policy(seed=1) if config.loss.needs_reference else None)[0]


def current_logprobs(policy: Policy, batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        return compute_token_stats(policy, batch, temperature=1.0).logprobs


def gradient_of(policy: Policy, batch: TokenBatch, weight_BT: Tensor) -> Tensor:
    """The gradient of ``-sum(weight ln p)`` over response tokens, by the model's own logits."""
    policy.model.zero_grad()
    logits = policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    logprobs_BT = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    (-torch.where(batch.response_mask, weight_BT * logprobs_BT, 0.0).sum()).backward()
    found = torch.cat([each.grad.flatten() for each in policy.model.parameters() if each.grad is not None])
    policy.model.zero_grad()
    return found


def test_every_objective_is_here() -> None:
    assert {"dapo", "dr_grpo", "maxrl", *SETTINGS} == set(OBJECTIVES)


@pytest.mark.parametrize("name", SETTINGS)
def test_off_policy_the_gradient_is_not_dapo_s(policy: Policy, batch: TokenBatch, name: str) -> None:
    changed = measured(policy, batch, {"objective": name} | SETTINGS[name])
    clips = {key: value for key, value in SETTINGS[name].items() if key != "options"}
    assert changed.isfinite().all()
    assert not close(changed, measured(policy, batch, clips))
    plain = measured(policy, batch, {})
    cosine = torch.nn.functional.cosine_similarity(changed, plain, dim=0)
    assert 0.3 < cosine < 0.99999, "in another direction, not only of another length"


@pytest.mark.parametrize(
    ("name", "loss", "like"),
    [
        ("dr_grpo", {"denominator": 50}, {"denominator": 50}),
        ("maxrl", {}, {}),
        ("cispo", {"clip_high": 1e6}, UNCLIPPED),
        ("dppo_tv", {"clip_low": 0.999, "clip_high": 1.0, "options": {"cap": 1e6}}, UNCLIPPED),
        ("kl_cov", {"options": {"kl_coef": 0.0}}, UNCLIPPED),
        ("clip_cov", {"options": {"lowest": 1e9, "highest": 1e9}}, {}),
        ("hapo", {"options": {"strength": 0.0}, "dual_clip": 1.2}, {"dual_clip": 1.2}),
        ("archer", {"options": {"clip_above": 0.2, "kl_coef": 0.0}}, {"clip_high": 0.2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("selection", [ALL, {"scope": "mini_batch"}], ids=["all", "top_entropy"])
def test_a_neutral_setting_is_dapo(
    policy: Policy, batch: TokenBatch, name: str, loss: dict[str, Any], like: dict[str, Any], selection: dict[str, Any]
) -> None:
    """The advantages of Dr. GRPO and MaxRL come with the batch."""
    reward = {"overlong_cache": 0}
    neutral = measured(policy, batch, {"objective": name} | loss, selection, reward=reward)
    assert close(neutral, measured(policy, batch, like, selection))


@pytest.mark.parametrize("name", ["gspo", "gmpo", "sapo"])
@pytest.mark.parametrize("selection", [ALL, {"scope": "mini_batch"}], ids=["all", "top_entropy"])
def test_on_policy_an_average_over_responses_is_reinforce_s(
    policy: Policy, batch: TokenBatch, name: str, selection: dict[str, Any]
) -> None:
    on_policy = replace(batch, old_logprobs=current_logprobs(policy, batch))
    config = recipe(selection=selection, loss={"objective": name})
    found, update = gradient(policy, on_policy, config)
    counts_B1 = update.selected_BT.sum(1, keepdim=True).clamp(min=1) * len(batch)
    assert close(found, gradient_of(policy, batch, update.selected_BT * batch.advantages[:, None] / counts_B1))


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_a_ratio_of_whole_responses_outlives_the_mask(policy: Policy, batch: TokenBatch, name: str) -> None:
    """Without a clip, each selected token has the same factor: the geometric mean over all tokens of its response."""
    config = recipe(selection={"scope": "mini_batch"}, loss={"objective": name, "clip_low": 0.999, "clip_high": 1e6})
    found, update = gradient(policy, batch, config)
    mask_BT = batch.response_mask
    log_ratio_BT = torch.where(mask_BT, current_logprobs(policy, batch) - batch.old_logprobs, 0.0)
    if name == "gmpo":
        log_ratio_BT = torch.where(batch.advantages[:, None] > 0, log_ratio_BT, log_ratio_BT.clamp(min=-0.999))
    ratio_B1 = (log_ratio_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True)).exp()
    counts_B1 = update.selected_BT.sum(1, keepdim=True).clamp(min=1) * len(batch)
    weight_BT = update.selected_BT * ratio_B1 * batch.advantages[:, None] / counts_B1
    assert close(found, gradient_of(policy, batch, weight_BT))


def test_archer_s_penalty_is_of_the_less_uncertain_tokens(policy: Policy, batch: TokenBatch) -> None:
    reference = random_policy(seed=1)
    loss = {"objective": "archer", "options": {"kl_coef": 0.5}}
    without, _ = gradient(
        policy, batch, recipe(selection=ALL, loss={"objective": "archer", "options": {"kl_coef": 0.0}}), reference
    )
    found, _ = gradient(policy, batch, recipe(selection=ALL, loss=loss), reference)
    with torch.no_grad():
        entropy_BT = compute_token_stats(policy, batch, temperature=1.0).entropy
        reference_BT = compute_token_stats(reference, batch, temperature=1.0).logprobs
    entropy_BT = torch.where(batch.response_mask, entropy_BT, torch.nan)
    below_BT = (entropy_BT <= entropy_BT.nanquantile(0.8, 1, keepdim=True)) & batch.response_mask
    assert 0.7 < below_BT.sum() / batch.num_response_tokens < 0.95
    logprobs = current_logprobs(policy, batch).requires_grad_()
    penalty = 0.5 * kl_penalty(logprobs, reference_BT, below_BT, batch.num_response_tokens).loss
    expected = gradient_of(policy, batch, -torch.autograd.grad(penalty, logprobs)[0])
    assert torch.nn.functional.cosine_similarity(found - without, expected, dim=0) > 0.9999
    assert float((found - without).norm()) == pytest.approx(float(expected.norm()), rel=1e-3)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in RANKED_IN_A_MICRO_BATCH])
@pytest.mark.parametrize("selection", [ALL, {"scope": "mini_batch"}], ids=["all", "top_entropy"])
def test_micro_batches_do_not_change_the_gradient(
    policy: Policy, batch: TokenBatch, name: str, selection: dict[str, Any]
) -> None:
    loss = {"objective": name} | SETTINGS[name]
    assert len(cut_micro_batches(batch, SEQUENCE_ROOM, packed=True)) >= 5
    pieces = measured(policy, batch, loss, selection, micro_batch_tokens=SEQUENCE_ROOM)
    assert close(pieces, measured(policy, batch, loss, selection))


@pytest.mark.parametrize("name", RANKED_IN_A_MICRO_BATCH)
def test_what_is_ranked_in_a_micro_batch_depends_on_its_size(policy: Policy, batch: TokenBatch, name: str) -> None:
    """As docs/methods-objectives.md says; the same update twice is the same."""
    loss = {"objective": name} | SETTINGS[name]
    whole = measured(policy, batch, loss)
    assert whole.equal(measured(policy, batch, loss))
    assert not close(measured(policy, batch, loss, micro_batch_tokens=SEQUENCE_ROOM), whole)
