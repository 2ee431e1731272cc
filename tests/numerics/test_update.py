"""One gradient step: the identities of the method, and every flag of the selection changes the gradient."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.config import TrainConfig
from forkrl.errors import TrainingHalted
from forkrl.head import token_stats
from forkrl.method.batches import collate, count_tokens, cut_micro_batches
from forkrl.method.selection import select_tokens
from forkrl.model import forward as dense
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.training.update import (
    Update,
    _contributing_rows,
    choose_in_rollout_batch,
    selects_inside,
    update_policy,
)
from forkrl.types import Prompt, SamplingParams, TokenBatch, TokenStats
from tests.models import random_policy

NUM_PROMPTS, GROUP = 6, 4
SEQUENCE_ROOM = 40


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy()


@pytest.fixture(scope="module")
def batch(policy: Policy) -> TokenBatch:
    return make_batch(policy)


def make_batch(policy: Policy) -> TokenBatch:
    """Sampled responses with random advantages, and old log-probs moved a little, so that some ratios are clipped.

    The seed leaves 0.008 nats between the entropies on both sides of every selection, so rounding decides none.
    """
    generator = torch.Generator().manual_seed(113)
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16)
    prompts = [Prompt(str(index), str(index) * (index + 1), "") for index in range(NUM_PROMPTS)]
    groups = engine.generate(prompts, group_size=GROUP, sampling=SamplingParams(24), generator=generator)
    advantages_PG = torch.randn(NUM_PROMPTS, GROUP, generator=generator)
    made = collate(groups, advantages_PG, pad_id=0)
    noise = torch.randn(made.old_logprobs.shape, generator=generator) * made.response_mask
    fields = {name: getattr(made, name) for name in made.__slots__}
    changed = {
        "old_logprobs": made.old_logprobs + 0.3 * noise,
        "rollout_entropy": (made.rollout_entropy + 0.5 * noise).clamp(min=0),
    }
    return TokenBatch(**fields | changed)


def recipe(micro_batch_tokens: int = 100_000, **sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, Any] = {
        "rollout": {"max_prompt_tokens": 16, "max_response_tokens": 24, "prompts_per_step": NUM_PROMPTS},
        "training": {"mini_batch_prompts": NUM_PROMPTS, "micro_batch_tokens": micro_batch_tokens},
        "reward": {"overlong_cache": 0},
        "optimizer": {"lr": 1e-9, "max_grad_norm": 1e9},
    }
    return TrainConfig.model_validate(values | sections)


def gradient(
    policy: Policy, batch: TokenBatch, config: TrainConfig, reference: Policy | None = None
) -> tuple[Tensor, Update]:
    """The gradient of one update, flat; the policy's weights are left alone."""
    working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
    update = update_policy(Workers(working, reference), optimizer, batch, config, torch.Generator().manual_seed(5))
    return torch.cat(
        [parameter.grad.flatten() for parameter in working.model.parameters() if parameter.grad is not None]
    ), update


def naive_gradient(policy: Policy, batch: TokenBatch, selected_BT: Tensor, denominator: int) -> Tensor:
    """Equation 6 written down once more, with the model's own logits and nothing of ForkRL's."""
    working = copy.deepcopy(policy.model)
    logits = working(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    logprobs = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    ratio = (logprobs - batch.old_logprobs).exp()
    advantages = batch.advantages[:, None]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    (-(surrogate * selected_BT).sum() / denominator).backward()
    return torch.cat([parameter.grad.flatten() for parameter in working.parameters() if parameter.grad is not None])


def close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).norm() <= 1e-5 * second.norm())


def test_all_is_plain_dapo(policy: Policy, batch: TokenBatch) -> None:
    expected = naive_gradient(policy, batch, batch.response_mask, batch.num_response_tokens)
    for loss in ({}, {"denominator": "response"}):
        measured, update = gradient(policy, batch, recipe(selection={"rule": "all"}, loss=loss))
        assert close(measured, expected)
        assert update.selected_BT.equal(batch.response_mask)


def test_top_entropy_is_equation_6(policy: Policy, batch: TokenBatch) -> None:
    measured, update = gradient(policy, batch, recipe(selection={"scope": "mini_batch"}))
    kept = int(update.selected_BT.sum())
    assert kept == -(-batch.num_response_tokens // 5)
    with torch.no_grad():
        logprobs_BTV = policy.model(input_ids=batch.input_ids).logits.log_softmax(-1)
    entropy_BT = -(logprobs_BTV.exp() * logprobs_BTV).sum(-1)
    threshold = entropy_BT[batch.response_mask].sort(descending=True).values[kept - 1]
    assert update.selected_BT.equal((entropy_BT >= threshold - 1e-6) & batch.response_mask)
    assert close(measured, naive_gradient(policy, batch, update.selected_BT, kept))


@pytest.mark.parametrize("denominator", ["selected", "response", 50])
@pytest.mark.parametrize(
    "selection",
    [
        {"rule": "all"},
        {"rule": "top_entropy", "scope": "mini_batch"},
        {"rule": "top_entropy", "scope": "sequence"},
        {"rule": "bottom_entropy", "ratio": 0.8, "scope": "mini_batch"},
        {"rule": "random", "scope": "mini_batch"},
        {"rule": "random", "scope": "sequence"},
        {"rule": "threshold", "threshold": 0.9},
        {"rule": "top_entropy", "scope": "mini_batch", "entropy": "rollout"},
    ],
    ids=lambda value: " ".join(map(str, value.values())),
)
def test_one_micro_batch_or_many_give_the_same_gradient(
    policy: Policy, batch: TokenBatch, selection: dict[str, Any], denominator: str | int
) -> None:
    sections: dict[str, Any] = {
        "selection": selection,
        "loss": {"denominator": denominator, "kl_coef": 0.1, "entropy_coef": 0.01},
    }
    reference = random_policy(seed=1)
    whole, one = gradient(policy, batch, recipe(**sections), reference)
    pieces, many = gradient(policy, batch, recipe(micro_batch_tokens=SEQUENCE_ROOM, **sections), reference)
    assert len(cut_micro_batches(batch, 100_000, packed=True)) == 1
    assert len(cut_micro_batches(batch, SEQUENCE_ROOM, packed=True)) >= 5, "the cut is no cut"
    assert one.selected_BT.equal(many.selected_BT)
    assert close(pieces, whole)
    for name, value in one.metrics.items():
        assert many.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("selection", "backward", "on_policy", "inside"),
    [
        ({"scope": "micro_batch"}, "dense", False, True),
        ({"scope": "micro_batch"}, "dense", True, True),
        ({"scope": "sequence"}, "forks_only", False, True),
        ({"scope": "micro_batch"}, "forks_only", True, False),
        ({"scope": "mini_batch"}, "dense", False, False),
        ({"rule": "threshold", "threshold": 0.5}, "dense", False, False),
        ({"rule": "random"}, "dense", False, False),
        ({"entropy": "rollout"}, "dense", False, False),
    ],
    ids=str,
)
def test_what_a_micro_batch_selects_itself(
    batch: TokenBatch, selection: dict[str, Any], backward: str, on_policy: bool, inside: bool
) -> None:
    config = recipe(selection=selection)
    config = config.model_copy(update={"training": config.training.model_copy(update={"backward": backward})})
    assert selects_inside(batch, config, on_policy=on_policy) == inside
    assert not selects_inside(replace(batch, selected=batch.response_mask), config, on_policy=on_policy)


def test_a_selection_over_the_rollout_batch_is_kept(policy: Policy, batch: TokenBatch) -> None:
    config = recipe(selection={"scope": "rollout_batch", "entropy": "rollout"})
    whole = choose_in_rollout_batch(batch, config, torch.Generator())
    assert whole.selected is not None
    assert whole.selected.equal(select_tokens(batch.rollout_entropy, batch.response_mask))
    part = whole.rows(torch.arange(GROUP))
    measured, update = gradient(policy, part, config)
    assert part.selected is not None and update.selected_BT.equal(part.selected)
    assert close(measured, naive_gradient(policy, part, part.selected, int(part.selected.sum())))


def test_the_scope_micro_batch_selects_within_each_cut_and_still_takes_one_token_mean(
    policy: Policy, batch: TokenBatch
) -> None:
    measured, update = gradient(policy, batch, recipe(micro_batch_tokens=SEQUENCE_ROOM))
    kept = [
        (int(update.selected_BT[rows].sum()), int(batch.response_mask[rows].sum()))
        for rows in cut_micro_batches(batch, SEQUENCE_ROOM, packed=True)
    ]
    assert all(selected == max(1, -(-tokens // 5)) for selected, tokens in kept)
    assert close(measured, naive_gradient(policy, batch, update.selected_BT, sum(selected for selected, _ in kept)))


@pytest.mark.parametrize(
    ("flag", "one", "other"),
    [
        ("rule", {"rule": "all"}, {"rule": "top_entropy"}),
        ("rule", {"rule": "top_entropy"}, {"rule": "bottom_entropy"}),
        ("rule", {"rule": "top_entropy"}, {"rule": "random"}),
        ("rule", {"rule": "top_entropy"}, {"rule": "threshold", "threshold": 0.9}),
        ("ratio", {"ratio": 0.2}, {"ratio": 0.5}),
        ("threshold", {"rule": "threshold", "threshold": 0.5}, {"rule": "threshold", "threshold": 1.5}),
        ("scope", {"scope": "micro_batch"}, {"scope": "mini_batch"}),
        ("scope", {"scope": "mini_batch"}, {"scope": "sequence"}),
        ("scope", {"scope": "micro_batch"}, {"scope": "sequence"}),
        ("entropy", {"entropy": "current"}, {"entropy": "rollout"}),
    ],
)
def test_each_selection_flag_changes_the_gradient(
    policy: Policy, batch: TokenBatch, flag: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    first, _ = gradient(policy, batch, recipe(micro_batch_tokens=2 * SEQUENCE_ROOM, selection=one))
    second, _ = gradient(policy, batch, recipe(micro_batch_tokens=2 * SEQUENCE_ROOM, selection=other))
    assert not close(first, second), flag


@pytest.mark.parametrize(
    "loss",
    [
        {"denominator": "response"},
        {"clip_low": 0.05},
        {"clip_high": 0.05},
        {"dual_clip": 1.01},
        {"entropy_coef": 0.1},
        {"kl_coef": 0.5},
    ],
    ids=lambda value: next(iter(value)),
)
def test_each_loss_setting_changes_the_gradient(policy: Policy, batch: TokenBatch, loss: dict[str, Any]) -> None:
    reference = random_policy(seed=1) if "kl_coef" in loss else None
    plain, _ = gradient(policy, batch, recipe())
    changed, _ = gradient(policy, batch, recipe(loss=loss), reference)
    assert not close(plain, changed)


def test_denominators_differ_by_the_kept_fraction_alone(policy: Policy, batch: TokenBatch) -> None:
    selected, update = gradient(policy, batch, recipe())
    response, _ = gradient(policy, batch, recipe(loss={"denominator": "response"}))
    number, _ = gradient(policy, batch, recipe(loss={"denominator": 50}))
    kept = int(update.selected_BT.sum())
    assert close(response, selected * kept / batch.num_response_tokens)
    assert close(number, selected * kept / 50)


def test_a_selection_that_finds_no_token_gives_zero_gradient(policy: Policy, batch: TokenBatch) -> None:
    measured, update = gradient(policy, batch, recipe(selection={"rule": "threshold", "threshold": 50.0}))
    assert not update.selected_BT.any()
    assert not measured.any()
    assert update.metrics["loss/policy"] == 0


def test_temperature_reaches_the_gradient(policy: Policy, batch: TokenBatch) -> None:
    values = recipe().model_dump()
    values["rollout"]["temperature"] = 0.7
    assert not close(gradient(policy, batch, recipe())[0], gradient(policy, batch, TrainConfig(**values))[0])


def test_the_reference_is_measured_at_the_rollout_s_temperature(policy: Policy, batch: TokenBatch) -> None:
    """A reference with the policy's own weights is at no distance, whatever the temperature."""
    values = recipe(loss={"kl_coef": 1.0}).model_dump()
    values["rollout"]["temperature"] = 0.7
    _, update = gradient(policy, batch, TrainConfig(**values), reference=policy)
    assert update.metrics["loss/kl"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch"])
def test_clip_fraction_is_over_the_tokens_that_contribute(policy: Policy, batch: TokenBatch, scope: str) -> None:
    """Selected tokens of sequences without an advantage have no gradient to clip; they are not counted."""
    advantages_B = batch.advantages.clone()
    advantages_B[: 2 * GROUP] = 0.0
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    some_idle = TokenBatch(**fields | {"advantages": advantages_B})
    _, update = gradient(policy, some_idle, recipe(selection={"scope": scope, "ratio": 0.5}))
    with torch.no_grad():
        ratio_BT = (compute_token_stats(policy, batch, temperature=1.0).logprobs - batch.old_logprobs).exp()
    advantages_BT = advantages_B[:, None].expand_as(ratio_BT)
    clipped_BT = ((ratio_BT > 1.28) & (advantages_BT > 0)) | ((ratio_BT < 0.8) & (advantages_BT < 0))
    carrying_BT = update.selected_BT & (advantages_BT != 0)
    assert 0 < carrying_BT.sum() < update.selected_BT.sum()
    expected = float(clipped_BT[carrying_BT].float().mean())
    assert 0 < expected < 1
    assert update.metrics["loss/clip_fraction"] == pytest.approx(expected)


def test_padding_cannot_reach_the_gradient(policy: Policy, batch: TokenBatch) -> None:
    padding = ~batch.attention_mask
    assert padding.any()
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    other = TokenBatch(
        **fields | {"input_ids": batch.input_ids.where(~padding, 7), "targets": batch.targets.where(~padding, 9)}
    )
    assert gradient(policy, batch, recipe())[0].equal(gradient(policy, other, recipe())[0])


@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch"])
def test_a_diverged_model_stops_before_its_weights_change(batch: TokenBatch, scope: str) -> None:
    broken = random_policy()
    with torch.no_grad():
        broken.head_weight[2, 2] = torch.inf
    before = copy.deepcopy(broken.model.state_dict())
    optimizer = torch.optim.SGD(broken.model.parameters(), lr=1.0)
    for selection in ({"scope": scope}, {"rule": "all"}, {"rule": "random", "scope": scope}):
        with pytest.raises(TrainingHalted, match="entropy is NaN or infinite at .* response tokens; the model"):
            update_policy(Workers(broken), optimizer, batch, recipe(selection=selection), torch.Generator())
    assert all(tensor.equal(before[name]) for name, tensor in broken.model.state_dict().items())


@pytest.mark.parametrize("on_policy", [False, True])
def test_sequences_without_advantage_are_left_out_and_change_nothing(
    policy: Policy, batch: TokenBatch, on_policy: bool
) -> None:
    advantages_B = batch.advantages.clone()
    advantages_B[: 2 * GROUP], advantages_B[2 * GROUP : 4 * GROUP] = 0.0, 1.0
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    some_idle = TokenBatch(**fields | {"advantages": advantages_B})
    working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
    seen: list[int] = []
    hook = working.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    config = recipe(selection={"scope": "mini_batch"})
    update = update_policy(Workers(working), optimizer, some_idle, config, torch.Generator(), on_policy=on_policy)
    hook.remove()
    informative_B = advantages_B != 0
    carrying_B = (update.selected_BT & informative_B[:, None]).any(1)
    assert carrying_B.sum() < informative_B.sum(), "some sequence has an advantage and no selected token"
    ran_B = carrying_B if on_policy else informative_B  # the graph of the entropy pass is made before the selection
    assert seen == [count_tokens(some_idle.rows(ran_B.nonzero()[:, 0]), packed=True)]
    measured = torch.cat([p.grad.flatten() for p in working.model.parameters() if p.grad is not None])
    kept = int(update.selected_BT.sum())
    assert kept == -(-batch.num_response_tokens // 5), "tokens without advantage compete for the selection all the same"
    assert update.selected_BT[: 2 * GROUP].any()
    assert close(measured, naive_gradient(policy, some_idle, update.selected_BT, kept))


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("loss", [{}, {"kl_coef": 0.1}, {"entropy_coef": 0.01}], ids=["alone", "kl", "bonus"])
def test_once_entropies_are_known_the_head_is_asked_about_selected_tokens_alone(
    policy: Policy, batch: TokenBatch, on_policy: bool, loss: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def spy(hidden_ND: torch.Tensor, *args: Any, **kwargs: Any) -> TokenStats:
        if torch.is_grad_enabled():
            asked.append(len(hidden_ND))
        return token_stats(hidden_ND, *args, **kwargs)

    monkeypatch.setattr(dense, "token_stats", spy)
    working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    workers = Workers(working, policy if "kl_coef" in loss else None)
    optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
    config = recipe(selection={"scope": "mini_batch"}, loss=loss)
    update = update_policy(workers, optimizer, batch, config, torch.Generator(), on_policy=on_policy)
    num_carrying = int((update.selected_BT & (batch.advantages != 0)[:, None]).sum())
    # A KL penalty and an entropy bonus are of every token; so is the entropy pass, whose graph is used again.
    assert sum(asked) == (num_carrying if on_policy and not loss else batch.num_response_tokens)


@pytest.mark.parametrize(
    "selection",
    [{"scope": "mini_batch"}, {"scope": "micro_batch"}, {"entropy": "rollout", "scope": "mini_batch"}],
    ids=str,
)
def test_the_threshold_is_the_lowest_entropy_that_was_selected(
    policy: Policy, batch: TokenBatch, selection: dict[str, Any]
) -> None:
    """As the rule read it: of the current policy, or of the policy that sampled."""
    with torch.no_grad():
        entropy_BT = compute_token_stats(policy, batch, temperature=1.0).entropy
    if "entropy" in selection:
        entropy_BT = batch.rollout_entropy
    _, update = gradient(policy, batch, recipe(selection=selection))
    assert update.metrics["entropy/threshold"] == pytest.approx(float(entropy_BT[update.selected_BT].min()), abs=1e-5)


def test_without_any_advantage_the_gradient_is_zero_and_there(policy: Policy, batch: TokenBatch) -> None:
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    idle = TokenBatch(**fields | {"advantages": torch.zeros_like(batch.advantages)})
    measured, _ = gradient(policy, idle, recipe(selection={"scope": "mini_batch"}))
    assert len(measured) > 0
    assert not measured.any()
    assert _contributing_rows(idle.response_mask, idle, recipe()).tolist() == [0], "one sequence is enough"


def test_without_response_tokens_nothing_is_selected(policy: Policy, batch: TokenBatch) -> None:
    empty = replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    measured, update = gradient(policy, empty, recipe())
    assert not measured.any() and not update.selected_BT.any()
    assert math.isnan(update.metrics["entropy/threshold"])


def test_the_graph_of_one_micro_batch_is_kept_from_the_entropy_pass(policy: Policy, batch: TokenBatch) -> None:
    """Each worker keeps one, which leaves the others to be computed again, and the gradient as it was."""
    working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    assert working.packs
    passes: list[bool] = []
    hook = working.decoder.register_forward_pre_hook(lambda module, args: passes.append(torch.is_grad_enabled()))
    optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
    config = recipe(micro_batch_tokens=2 * SEQUENCE_ROOM, selection={"scope": "mini_batch"})
    workers = Workers(working)
    update = update_policy(workers, optimizer, batch, config, torch.Generator())
    hook.remove()
    num_cuts = len(cut_micro_batches(batch, 2 * SEQUENCE_ROOM, packed=True))
    assert num_cuts > 2
    assert passes == [True] + [False] * (num_cuts - 1) + [True] * (num_cuts - 1)
    assert not workers.local.kept
    measured = torch.cat([p.grad.flatten() for p in working.model.parameters() if p.grad is not None])
    assert close(measured, naive_gradient(policy, batch, update.selected_BT, int(update.selected_BT.sum())))


def test_what_a_failed_update_kept_is_dropped(
    policy: Policy, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
    workers, config = Workers(working), recipe(selection={"scope": "mini_batch"})

    def fail(*args: Any) -> None:
        raise RuntimeError("between the passes")

    with monkeypatch.context() as patch:
        patch.setattr("forkrl.training.update.choose", fail)
        with pytest.raises(RuntimeError, match="between the passes"):
            update_policy(workers, optimizer, batch, config, torch.Generator())
    assert workers.local.kept
    other = replace(batch, advantages=batch.advantages.flip(0))
    update = update_policy(workers, optimizer, other, config, torch.Generator())
    measured = torch.cat([p.grad.flatten() for p in working.model.parameters() if p.grad is not None])
    assert close(measured, naive_gradient(policy, other, update.selected_BT, int(update.selected_BT.sum())))
