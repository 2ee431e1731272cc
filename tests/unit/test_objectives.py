"""The policy loss and the KL penalty: numbers worked by hand, and the identities of the method."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forkrl.config import LossConfig
from forkrl.errors import TrainingHalted
from forkrl.method.loss import Counts, TokenSums, kl_penalty, loss_metrics, policy_loss, step_loss, total
from forkrl.method.selection import select_tokens
from forkrl.types import TokenStats

RATIOS = torch.tensor([[1.5, 1.1, 0.5], [1.5, 0.5, 20.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)
RESPONSE = torch.ones(2, 3, dtype=torch.bool)
SELECTED = torch.tensor([[True, True, False], [True, True, False]])


def from_ratios(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs to train and of old that stand in the given ratio."""
    old = torch.full_like(ratios, -1.3)
    return (old + ratios.log()).requires_grad_(), old


def gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logprobs)[0]


def random_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(8, 11, generator=generator, dtype=torch.float64)
    logprobs = old + 0.4 * torch.randn(8, 11, generator=generator, dtype=torch.float64)
    entropy = torch.rand(8, 11, generator=generator, dtype=torch.float64)
    response = torch.arange(11) < torch.randint(1, 12, (8, 1), generator=generator)
    return logprobs.requires_grad_(), old, torch.randn(8, generator=generator, dtype=torch.float64), response, entropy


def test_hand_worked_loss() -> None:
    """A = 2: ratios 1.5, 1.1, 0.5 give 2.56 (clipped), 2.2, 1. A = -1: 1.5, 0.5, 20 give -1.5, -0.8 (clipped), -20."""
    logprobs, old = from_ratios(RATIOS)
    loss, metrics = policy_loss(logprobs, old, ADVANTAGES, RESPONSE)
    assert loss.item() == pytest.approx(-(2.56 + 2.2 + 1.0 - 1.5 - 0.8 - 20) / 6)
    # d(r A) / d logp = r A where no clip holds, else 0.
    expected = -torch.tensor([[0, 2.2, 1.0], [-1.5, 0, -20]], dtype=torch.float64) / 6
    torch.testing.assert_close(gradient(loss, logprobs), expected)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "clip_fraction": 2 / 6,
            "ratio_mean": 25.1 / 6,
            "ratio_max": 20.0,
            "approx_kl": ((RATIOS - 1 - RATIOS.log()).sum() / 6).item(),
            "num_selected": 6,
        }
    )
    assert not any(value.requires_grad for value in metrics.values())


def test_hand_worked_selection_and_denominators() -> None:
    total = -(2.56 + 2.2 - 1.5 - 0.8)
    logprobs, old = from_ratios(RATIOS)
    for denominator, count in (("selected", 4), ("response", 6), (10, 10), (0.5, 0.5)):
        loss, metrics = policy_loss(logprobs, old, ADVANTAGES, RESPONSE, SELECTED, denominator=denominator)  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(total / count)
        assert gradient(loss, logprobs)[0, 1].item() == pytest.approx(-2.2 / count)
        assert metrics["clip_fraction"].item() == 0.5 and metrics["num_selected"].item() == 4
        assert metrics["ratio_max"].item() == pytest.approx(1.5)


def test_dual_clip_bounds_only_negative_advantages() -> None:
    """c = 3: the loss of A = -1, ratio 20 is 3 instead of 20, with no gradient; A = +2 is untouched."""
    logprobs, old = from_ratios(RATIOS)
    loss, metrics = policy_loss(logprobs, old, ADVANTAGES, RESPONSE, dual_clip=3.0)
    assert loss.item() == pytest.approx(-(2.56 + 2.2 + 1.0 - 1.5 - 0.8 - 3.0) / 6)
    expected = -torch.tensor([[0, 2.2, 1.0], [-1.5, 0, 0]], dtype=torch.float64) / 6
    torch.testing.assert_close(gradient(loss, logprobs), expected)
    assert metrics["clip_fraction"].item() == pytest.approx(3 / 6)
    twice = policy_loss(logprobs, old, 2 * ADVANTAGES, RESPONSE, dual_clip=3.0).loss
    assert twice.item() == pytest.approx(2 * loss.item())


def test_clips_may_be_zero() -> None:
    logprobs, old = from_ratios(RATIOS)
    loss, _ = policy_loss(logprobs, old, ADVANTAGES, RESPONSE, clip_low=0.0, clip_high=0.0)
    assert loss.item() == pytest.approx(-(2.0 + 2.0 + 1.0 - 1.5 - 1.0 - 20) / 6)


def test_equal_clips_are_ppo() -> None:
    """PPO's loss is max(-r A, -clamp(r, 1 - eps, 1 + eps) A), averaged over the tokens."""
    logprobs, old, advantages, response, _ = random_batch()
    loss, _ = policy_loss(logprobs, old, advantages, response, clip_low=0.2, clip_high=0.2)
    ratio, advantage = torch.exp(logprobs - old), advantages[:, None]
    ppo = torch.max(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)[response].mean()
    torch.testing.assert_close(loss, ppo)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(ppo, logprobs))
    assert policy_loss(logprobs, old, advantages, response, clip_high=0.28).loss != loss


def test_rule_all_is_plain_dapo_and_other_rules_are_not() -> None:
    logprobs, old, advantages, response, entropy = random_batch(1)
    plain = gradient(policy_loss(logprobs, old, advantages, response).loss, logprobs)
    gradients = {}
    for rule in ("all", "top_entropy", "bottom_entropy", "random"):
        selected = select_tokens(entropy, response, rule, 0.3, generator=torch.Generator().manual_seed(0))
        loss = policy_loss(logprobs, old, advantages, response, selected).loss
        gradients[rule] = gradient(loss, logprobs)
        assert not gradients[rule][~selected].any()
    assert torch.equal(gradients.pop("all"), plain)
    others = [plain, *gradients.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])


def test_first_step_is_the_plain_policy_gradient() -> None:
    """Where the policy is still the one that sampled, the gradient is -A / N and no clip holds."""
    _, old, advantages, response, _ = random_batch()
    logprobs = old.clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, old, advantages, response)
    expected = torch.where(response, -advantages[:, None] / response.sum(), 0.0)
    torch.testing.assert_close(gradient(loss, logprobs), expected)
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] == 0 and metrics["ratio_mean"] == 1


@pytest.mark.parametrize("denominator", ["selected", "response", 0, 12])
@pytest.mark.parametrize("response", [RESPONSE, torch.zeros_like(RESPONSE)])
def test_empty_selection_gives_zero_gradient(response: Tensor, denominator: object) -> None:
    logprobs, old = from_ratios(RATIOS)
    nothing = torch.zeros_like(RESPONSE)
    loss, metrics = policy_loss(logprobs, old, ADVANTAGES, response, nothing, denominator=denominator)  # type: ignore[arg-type]
    assert loss.item() == 0 and torch.equal(gradient(loss, logprobs), torch.zeros_like(logprobs))
    assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 500.0])
def test_unselected_rubbish_reaches_nothing(rubbish: float) -> None:
    """NaN, infinities and overflowing ratios outside the selection change neither loss, gradient nor metrics."""
    logprobs, old = from_ratios(RATIOS)
    advantages = ADVANTAGES[:, None].expand(2, 3)
    clean, clean_metrics = policy_loss(logprobs, old, advantages, RESPONSE, SELECTED, dual_clip=3.0)
    dirty_logprobs = torch.where(SELECTED, logprobs.detach(), rubbish).requires_grad_()
    dirty_old, dirty_advantages = torch.where(SELECTED, old, -rubbish), torch.where(SELECTED, advantages, rubbish)
    dirty, dirty_metrics = policy_loss(dirty_logprobs, dirty_old, dirty_advantages, RESPONSE, SELECTED, dual_clip=3.0)
    assert torch.equal(dirty, clean)
    assert torch.equal(gradient(dirty, dirty_logprobs), gradient(clean, logprobs))
    assert clean_metrics == dirty_metrics


@pytest.mark.parametrize("selection", ["all", "top_entropy"])
def test_one_micro_batch_or_eight(selection: str) -> None:
    """With the mini-batch's own count as denominator the cut does not matter; means of means would differ."""
    logprobs, old, advantages, response, entropy = random_batch(2)
    selected = select_tokens(entropy, response, selection, 0.2)
    whole = gradient(policy_loss(logprobs, old, advantages, response, selected).loss, logprobs)
    count = int(selected.sum())
    parts = [
        policy_loss(logprobs[i], old[i], advantages[i], response[i], selected[i], denominator=count).loss
        for i in torch.arange(8).split(1)
    ]
    torch.testing.assert_close(gradient(torch.stack(parts).sum(), logprobs), whole)
    naive = [
        policy_loss(logprobs[i], old[i], advantages[i], response[i], selected[i]).loss for i in torch.arange(8).split(1)
    ]
    assert not torch.allclose(gradient(torch.stack(naive).mean(), logprobs), whole)


def test_advantages_per_token_or_per_sequence() -> None:
    logprobs, old, advantages, response, _ = random_batch()
    each = advantages[:, None].expand(8, 11).contiguous()
    assert torch.equal(
        policy_loss(logprobs, old, advantages, response).loss, policy_loss(logprobs, old, each, response).loss
    )


def test_old_logprobs_and_advantages_are_constants() -> None:
    logprobs, old, advantages, response, _ = random_batch()
    old.requires_grad_()
    advantages.requires_grad_()
    policy_loss(logprobs, old, advantages, response).loss.backward()
    assert logprobs.grad is not None and old.grad is None and advantages.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old_logprobs": torch.zeros(2, 4)}, r"old_logprobs \(2, 4\) is not shaped like logprobs \(2, 3\)"),
        ({"advantages": torch.zeros(3)}, r"advantages \(3, 3\) is not"),
        ({"response_mask": torch.ones(2, 3)}, "response_mask is torch.float32; it must be bool"),
        ({"selected_mask": torch.ones(2, 3)}, "selected_mask is torch.float32"),
        ({"response_mask": SELECTED, "selected_mask": RESPONSE}, "outside response_mask"),
        ({"clip_low": 1.0}, "clip_low = 1.0"),
        ({"clip_high": -0.1}, "clip_high = -0.1"),
        ({"dual_clip": 1.0}, "dual_clip = 1.0 must be finite and above 1"),
        ({"denominator": "tokens"}, "denominator = 'tokens'"),
        ({"denominator": -1.0}, "denominator = -1.0"),
        ({"denominator": math.nan}, "denominator = nan"),
        ({"denominator": 0}, "denominator = 0, yet 6 tokens enter the loss"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logprobs": torch.zeros(2, 3),
        "old_logprobs": torch.zeros(2, 3),
        "advantages": torch.ones(2),
        "response_mask": RESPONSE,
    }
    with pytest.raises(ValueError, match=message):
        policy_loss(**(arguments | changes))  # type: ignore[arg-type]
    for name in arguments:
        with pytest.raises(TypeError, match=f"^{name}: torch tensor expected, got list"):
            policy_loss(**(arguments | {name: [[0.0]]}))  # type: ignore[arg-type]


@pytest.mark.parametrize("log_ratio", [21.0, 89.0, 100.0, 3e38, -21.0, -100.0, -3e38])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_log_ratio_beyond_20_has_no_gradient(log_ratio: float, advantage: float, dual_clip: float | None) -> None:
    """fp32 overflows above 88, and infinity times the zero gradient of a clipped token would be NaN."""
    logprobs = torch.tensor([[-1.0, max(0.0, log_ratio)]]).requires_grad_()
    old = torch.tensor([[-1.0, max(0.0, -log_ratio)]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = policy_loss(logprobs, old, torch.tensor([advantage]), mask, dual_clip=dual_clip)
    assert loss.isfinite()
    assert gradient(loss, logprobs).tolist() == [[-advantage / 2, 0.0]]
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["clip_fraction"] == 0.5
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(20.0) if log_ratio > 0 else 1.0)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(*[st.floats(-(2.0**100), 0, width=32)] * 2, st.floats(-10, 10, width=32)), min_size=1, max_size=8
    ),
    st.sampled_from([None, 3.0]),
)
def test_losses_and_gradients_are_finite_for_any_finite_logprobs(
    tokens: list[tuple[float, float, float]], dual_clip: float | None
) -> None:
    logprobs_B1, other_B1, advantages_B1 = torch.tensor(tokens).T[..., None]
    mask_B1 = torch.ones_like(other_B1, dtype=torch.bool)
    logprobs_B1.requires_grad_()
    for loss, metrics in (
        policy_loss(logprobs_B1, other_B1, advantages_B1, mask_B1, dual_clip=dual_clip),
        kl_penalty(logprobs_B1, other_B1, mask_B1),
    ):
        assert loss.isfinite() and gradient(loss, logprobs_B1).isfinite().all()
        assert all(value.isfinite() for value in metrics.values())


def test_clamping_changes_nothing_up_to_20() -> None:
    log_ratio = torch.tensor([[19.9, -19.9, 3.0, -3.0]], dtype=torch.float64)
    logprobs = log_ratio.clone().requires_grad_()
    mask = torch.ones_like(log_ratio, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, torch.zeros_like(log_ratio), torch.tensor([-1.0]).double(), mask)
    expected = torch.where(log_ratio > 0, log_ratio.exp(), 0.0) / 4  # below 1 - clip_low a clip holds
    torch.testing.assert_close(gradient(loss, logprobs), expected)


def test_kl_by_hand() -> None:
    """d = ln 2: 2 - ln 2 - 1; d = -ln 2: 1/2 + ln 2 - 1. Their derivative in the log-prob is 1 - exp(d): -1 and 1/2."""
    difference = torch.tensor([[math.log(2), -math.log(2), math.nan]], dtype=torch.float64)
    logprobs = torch.full_like(difference, -1.0).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    loss, metrics = kl_penalty(logprobs, logprobs.detach() + difference, mask)
    assert loss.item() == pytest.approx((2 + 0.5 - 2) / 2) == metrics["kl"].item()
    assert metrics["num_response"].item() == 2
    torch.testing.assert_close(gradient(loss, logprobs), torch.tensor([[-0.5, 0.25, 0.0]], dtype=torch.float64))
    assert kl_penalty(logprobs, logprobs.detach() + difference, mask, 10).loss.item() == pytest.approx(0.05)


def test_kl_far_from_the_reference() -> None:
    """d = ref - logprob. Above 20 exp is clamped, without gradient; far below, k3 is -d - 1, whose gradient remains."""
    difference = torch.tensor([[100.0, 3e38, -100.0, -1000.0]])
    for place, (value, slope) in enumerate([(math.exp(20) - 21, 0.0)] * 2 + [(99.0, 1.0), (999.0, 1.0)]):
        logprobs = -difference[:, [place]].clamp(min=0)
        ref_logprobs = logprobs + difference[:, [place]]
        logprobs.requires_grad_()
        loss, _ = kl_penalty(logprobs, ref_logprobs, torch.ones(1, 1, dtype=torch.bool))
        assert loss.item() == pytest.approx(value)
        assert gradient(loss, logprobs).item() == slope


def test_kl_keeps_its_digits_near_zero() -> None:
    """At d = 1e-3 the value is d^2 / 2 = 5e-7; exp(d) - 1 - d in fp32 would miss it by a tenth."""
    logprobs = torch.zeros(1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert kl_penalty(logprobs, logprobs + 1e-3, mask).loss.item() == pytest.approx(5.0017e-7, rel=1e-3)


def test_kl_of_nothing_and_bad_input() -> None:
    logprobs = torch.full((1, 2), torch.nan, requires_grad=True)
    loss, metrics = kl_penalty(logprobs, torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert loss.item() == 0 == metrics["kl"].item() and not gradient(loss, logprobs).any()
    with pytest.raises(ValueError, match="denominator = 'selected'"):
        kl_penalty(logprobs, logprobs, torch.ones(1, 2, dtype=torch.bool), "selected")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ref_logprobs"):
        kl_penalty(logprobs, torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="response_mask is torch.float32; it must be bool"):
        kl_penalty(logprobs, logprobs, torch.ones(1, 2))


def test_step_loss_by_hand() -> None:
    """The hand-worked loss and KL, over the counts of a mini-batch twice as large; a zero advantage contributes 0."""
    logprobs, old = from_ratios(RATIOS)
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    config = LossConfig(kl_coef=0.5, entropy_coef=0.1, denominator="response")
    stats, ref = TokenStats(logprobs, entropy), logprobs.detach() + math.log(2)
    advantages_BT = ADVANTAGES[:, None].expand(2, 3).clone()
    for advantages in (ADVANTAGES, advantages_BT):
        loss, sums = step_loss(stats, old, advantages, RESPONSE, SELECTED, Counts(12, 8), config, ref)
        policy, kl, bonus = -(2.56 + 2.2 - 1.5 - 0.8) / 12, (1 - math.log(2)) / 2, 21 / 12
        assert loss.item() == pytest.approx(policy + 0.5 * kl - 0.1 * bonus)
        chosen = RATIOS[SELECTED]
        k3 = float((chosen - 1 - chosen.log()).sum())
        assert sums == pytest.approx(TokenSums(policy, kl, bonus, 4, 2, k3, 1.5))
    advantages_BT[0, 0] = 0
    assert step_loss(stats, old, advantages_BT, RESPONSE, SELECTED, Counts(12, 8), config, ref)[1].contributing == 3


def test_step_loss_refuses_tokens_outside_the_response_and_halts_on_a_loss_that_is_not_finite() -> None:
    logprobs, old = from_ratios(RATIOS)
    stats, counts = TokenStats(logprobs, logprobs), Counts(6, 4)
    with pytest.raises(ValueError, match="outside response_mask"):
        step_loss(stats, old, ADVANTAGES, SELECTED, RESPONSE, counts, LossConfig())
    with pytest.raises(TrainingHalted, match="^the loss is nan; the policy's logits or log-probs are out of range"):
        step_loss(stats, old, ADVANTAGES * math.inf, RESPONSE, SELECTED, counts, LossConfig())


@pytest.mark.parametrize("contributing", [0, 1, 4])
def test_loss_metrics_are_means_over_contributing_tokens(contributing: int) -> None:
    parts = [
        TokenSums(0.5, 0.25, 1.0, contributing, contributing / 2, contributing * 3.0, 1.5),
        TokenSums(0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0),
    ]
    assert loss_metrics(total(parts)) == {
        "loss/policy": 0.5,
        "loss/kl": 0.25,
        "loss/entropy": 1.0,
        "loss/clip_fraction": 0.5 * (contributing > 0),
        "loss/approx_kl": 3.0 * (contributing > 0),
        "loss/ratio_max": 1.5,
    }
