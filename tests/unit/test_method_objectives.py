"""The objectives of methods.py: numbers worked by hand, verl's losses, and hostile values."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.config import LossConfig, TrainConfig
from forkrl.method.advantages import group_advantages
from forkrl.method.loss import Counts, _sum_up, step_loss
from forkrl.method.objectives.archer import archer
from forkrl.method.objectives.cispo import cispo
from forkrl.method.objectives.covariance import clip_cov, kl_cov
from forkrl.method.objectives.dapo import dapo
from forkrl.method.objectives.dppo_tv import dppo_tv
from forkrl.method.objectives.gmpo import gmpo
from forkrl.method.objectives.gspo import gspo
from forkrl.method.objectives.hapo import _relative_entropy, hapo
from forkrl.method.objectives.sapo import sapo
from forkrl.method.signals import Terms
from forkrl.methods import OBJECTIVES, objective_of
from forkrl.types import TokenStats

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dapo": dapo, "cispo": cispo, "gspo": gspo, "gmpo": gmpo, "sapo": sapo, "dppo_tv": dppo_tv, "clip_cov": clip_cov,
    "kl_cov": kl_cov, "hapo": hapo, "archer": archer,
}  # fmt: skip
needs_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason='needs the extra "verl"')


def terms_of(
    ratios: list[list[float]],
    advantages: list[float],
    *,
    old: float | list[list[float]] = -1.3,
    selected: list[list[bool]] | None = None,
    **given: Any,
) -> Terms:
    """Terms of responses with the given ratios; 0 stands for a position outside the response."""
    ratio_BT = torch.tensor(ratios, dtype=torch.float64)
    read_BT = ratio_BT > 0
    old_BT = torch.where(read_BT, torch.as_tensor(old, dtype=torch.float64), 0.0)
    logprobs_BT = old_BT + torch.where(read_BT, ratio_BT, 1.0).log()
    values: dict[str, Any] = {
        "read": read_BT,
        "selected": read_BT if selected is None else torch.tensor(selected),
        "logprobs": logprobs_BT.requires_grad_(),
        "old_logprobs": old_BT,
        "ref_logprobs": old_BT,
        "entropy": torch.zeros_like(old_BT),
        "advantages": torch.tensor(advantages, dtype=torch.float64)[:, None].expand_as(old_BT) * read_BT,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": None,
    }
    return Terms(**(values | given))


def random_terms(seed: int = 0, **given: Any) -> Terms:
    """Some ratios are clipped; every response has both selected and other tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(8, 11, generator=generator, dtype=torch.float64)

    read_BT = torch.arange(11) < torch.randint(4, 12, (8, 1), generator=generator)
    old_BT = -draw().abs() * read_BT
    values: dict[str, Any] = {
        "read": read_BT,
        "selected": read_BT,
        "logprobs": (old_BT + 0.3 * draw() * read_BT).requires_grad_(),
        "old_logprobs": old_BT,
        "ref_logprobs": old_BT + 0.2 * draw() * read_BT,
        "entropy": draw().abs() * read_BT,
        "advantages": draw()[:, :1].expand_as(old_BT) * read_BT,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": None,
    }
    return Terms(**(values | given))


def evaluate(name: str, terms: Terms, divisor: float | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient in the log-probs, and where a clip removed the gradient."""
    per_response = objective_of(name).per_response
    found = FUNCTIONS.get(name, dapo)(terms, **options)
    divisor = divisor or float(len(terms.read) if per_response else terms.selected.sum())
    loss = _sum_up(terms, found, divisor, per_response=per_response).loss
    cut_BT = found[1] if isinstance(found, tuple) else torch.zeros_like(terms.read)
    return loss, torch.autograd.grad(loss, terms.logprobs)[0], cut_BT


def reinforce(terms: Terms, *, per_response: bool) -> Tensor:
    """The gradient of ``-A ln p``, averaged."""
    counts = terms.selected.sum(1, keepdim=True) * len(terms.read) if per_response else terms.selected.sum()
    return torch.where(terms.selected, -terms.advantages / counts, 0.0)


def test_every_objective_is_tested() -> None:
    assert {*FUNCTIONS, "dr_grpo", "maxrl"} == set(OBJECTIVES)


# Numbers worked by hand


def test_advantages_of_dr_grpo_and_maxrl() -> None:
    """Rewards 1 0 0 0: mean 1/4. MaxRL divides 3/4 and -1/4 by it."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], [1, -1, 1, -1], [1, -3, 0, 0]])
    none = [0.0] * 4
    assert group_advantages(rewards, "centred").tolist() == [
        [0.75, -0.25, -0.25, -0.25], none, none, [1, -1, 1, -1], [1.5, -2.5, 0.5, 0.5],
    ]  # fmt: skip
    assert group_advantages(rewards, "relative").tolist() == [[3, -1, -1, -1], none, none, none, none]
    assert group_advantages(rewards, "standardised").equal(group_advantages(rewards))
    with pytest.raises(ValueError, match='kind = \'mean\' must be "standardised", "centred" or "relative"'):
        group_advantages(rewards, "mean")  # type: ignore[arg-type]


def test_cispo_by_hand() -> None:
    """The gradient is the clipped ratio times -A: from above at 1.28; from below only if asked to."""
    terms = terms_of([[1.5, 1.1, 0.5], [1.5, 0.5, 0]], [2.0, -1.0])
    loss, gradient, cut = evaluate("cispo", terms, 1.0)
    expected = torch.tensor([[-2.56, -2.2, -1.0], [1.28, 0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)
    assert loss.item() == pytest.approx(float((expected * terms.logprobs.detach()).sum()))
    assert cut.tolist() == [[True, False, False], [True, False, False]]
    _, both, cut = evaluate("cispo", terms, 1.0, clip_below=0.2)
    assert both[0, 2].item() == pytest.approx(-1.6)
    assert both[1, 1].item() == pytest.approx(0.8)
    assert cut.tolist() == [[True, False, True], [True, True, False]]


def test_gspo_by_hand() -> None:
    """Ratios 4 and 1/4 and 1 have the geometric mean 1; 1.44 and 1 have 1.2, which is clipped at 1.1 if A > 0."""
    terms = terms_of([[4.0, 0.25, 1.0], [1.44, 1.0, 0], [1.44, 1.0, 0]], [3.0, 2.0, -2.0], clip_low=0.1, clip_high=0.1)
    loss, gradient, cut = evaluate("gspo", terms)
    assert loss.item() == pytest.approx((-3 * 1 - 2 * 1.1 + 2 * 1.2) / 3)
    expected = torch.tensor([[-3 / 3] * 3, [0, 0, 0], [2 * 1.2 / 2] * 2 + [0]], dtype=torch.float64) / 3
    torch.testing.assert_close(gradient, expected)
    assert cut.any(1).tolist() == [False, True, False]


def test_gspo_with_a_mask_keeps_the_ratio_of_the_whole_response() -> None:
    terms = terms_of([[1.44, 1.0, 0]], [-2.0], selected=[[False, True, False]])
    loss, gradient, _ = evaluate("gspo", terms)
    assert loss.item() == pytest.approx(2.4)
    torch.testing.assert_close(gradient, torch.tensor([[0, 2.4, 0]], dtype=torch.float64))


def test_gmpo_by_hand() -> None:
    """A = 2, ratios e, 1/e, 1, clipped at e^0.4: mean log (0.4 - 1 + 0) / 3 = -0.2. A = -1: (1 - 0.3) / 2 = 0.35."""
    terms = terms_of([[math.e, 1 / math.e, 1.0], [math.e, 1 / math.e, 0]], [2.0, -1.0], clip_low=0.3, clip_high=0.4)
    loss, gradient, cut = evaluate("gmpo", terms)
    first, second = math.exp(-0.2), math.exp(0.35)
    assert loss.item() == pytest.approx((-2 * first + second) / 2)
    expected = torch.tensor([[0, -2 * first / 3, -2 * first / 3], [second / 2, 0, 0]], dtype=torch.float64) / 2
    torch.testing.assert_close(gradient, expected)
    assert cut.tolist() == [[True, False, False], [False, True, False]]
    masked = replace(terms, selected=torch.tensor([[False, True, False], [False] * 3]))
    loss, gradient, _ = evaluate("gmpo", masked)
    assert loss.item() == pytest.approx(-2 * first / 2)
    assert gradient[0].tolist() == pytest.approx([0, -2 * first / 2, 0])


def test_sapo_by_hand() -> None:
    """tau = 1, r = 1 + ln 3: sigmoid 3/4, so the loss is -3 A and the gradient -4 (3/4)(1/4) r A."""
    ratio = 1 + math.log(3)
    loss, gradient, _ = evaluate("sapo", terms_of([[ratio]], [2.0]))
    assert loss.item() == pytest.approx(-6)
    assert gradient.item() == pytest.approx(-0.75 * ratio * 2)
    loss, gradient, _ = evaluate("sapo", terms_of([[ratio]], [-2.0]), tau_negative=2.0)
    assert loss.item() == pytest.approx(2 * 2 * 0.9)  # sigmoid(2 ln 3) = 9/10
    assert gradient.item() == pytest.approx(4 * 0.09 * ratio * 2)


def test_dppo_by_hand() -> None:
    """Old probability 0.1: a ratio of 2.5 adds 0.15 (kept), 4 adds 0.3 (cut if A > 0). 0.001 x 30: capped at 20."""
    old = [[math.log(0.1), math.log(0.1), math.log(0.001)]] * 2
    terms = terms_of([[2.5, 4, 30], [0.5, 4, 30]], [1.0, -1.0], old=old, clip_low=0.01, clip_high=0.2)
    loss, gradient, cut = evaluate("dppo_tv", terms, 1.0)
    torch.testing.assert_close(gradient, torch.tensor([[-2.5, 0, -20], [0, 4, 20]], dtype=torch.float64))
    assert loss.item() == pytest.approx(-2.5 * math.log(0.25) + 4 * math.log(0.4))  # the capped tokens cancel
    assert cut.tolist() == [[False, True, False], [True, False, False]]


def test_kl_cov_by_hand() -> None:
    """A = -1, -1, -3, -3 (mean -2), ln p = -1, -4, -2, -2 (mean -2.25): covariances 1.25, -1.75, -0.25, -0.25."""
    ratios = [[1.5, 0.5], [2.0, 2.0]]
    old = [[-1 - math.log(1.5), -4 - math.log(0.5)], [-2 - math.log(2.0)] * 2]
    loss, gradient, cut = evaluate("kl_cov", terms_of(ratios, [-1.0, -3.0], old=old), 1.0, kl_coef=10.0)
    assert loss.item() == pytest.approx(1.5 + 0.5 + 6 + 6 + 10 * math.log(1.5))
    torch.testing.assert_close(gradient, torch.tensor([[1.5 + 10, 0.5], [6, 6]], dtype=torch.float64))
    assert not cut.any()
    _, three, _ = evaluate("kl_cov", terms_of(ratios, [-1.0, -3.0], old=old), 1.0, kl_coef=10.0, fraction=0.75)
    torch.testing.assert_close(three, torch.tensor([[1.5 + 10, 0.5], [16, 16]], dtype=torch.float64))


def test_clip_cov_by_hand() -> None:
    """The covariances above; one of the two tokens with -0.25 is dropped, and the same one each time."""
    old = [[-1.0, -4.0], [-2.0, -2.0001]]
    terms = terms_of([[1.0, 1.0], [1.0, 1.0]], [1.0, -1.0], old=old)
    found = [evaluate("clip_cov", terms, 1.0, lowest=-1.0, highest=1.0, fraction=0.25) for _ in range(3)]
    dropped = found[0][2]
    assert dropped[0].tolist() == [False, False]
    assert dropped[1].sum() == 1
    assert all(each[1].equal(found[0][1]) for each in found)
    expected = torch.where(dropped, 0.0, torch.tensor([[-1.0, -1], [1, 1]], dtype=torch.float64))
    torch.testing.assert_close(found[0][1], expected)
    assert found[0][0].item() == pytest.approx(-1)
    turned = replace(terms, **{name: getattr(terms, name).flip(1) for name in ("logprobs", "old_logprobs")})
    assert evaluate("clip_cov", turned, 1.0, lowest=-1.0, highest=1.0, fraction=0.25)[2].equal(dropped.flip(1))


def test_clip_cov_draws_among_tokens_that_have_a_gradient() -> None:
    """Of two tokens with a covariance of about -0.25, the one that the clip has cut is never drawn."""
    for number in range(10):
        cut_ratios = [0.5, 1.0] if number % 2 else [1.0, 0.5]
        old = [[-1.0, -4.0], [-2 - 0.01 * number - math.log(ratio) for ratio in cut_ratios]]
        terms = terms_of([[1.0, 1.0], cut_ratios], [1.0, -1.0], old=old)
        _, gradient, cut = evaluate("clip_cov", terms, 1.0, lowest=-1.0, highest=1.0, fraction=0.25)
        assert cut.tolist() == [[False, False], [True, True]]
        assert gradient.tolist() == [[-1, -1], [0, 0]]


def test_clip_cov_drops_tokens_of_all_probabilities() -> None:
    """The stand-in for random numbers has no relation to the log-prob, and drops the asked number."""
    old_BT = -torch.rand(4, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    read_BT = torch.ones_like(old_BT, dtype=torch.bool)
    advantages_BT = torch.tensor([[1.0], [-1], [1], [-1]], dtype=torch.float64).expand_as(old_BT)
    terms = random_terms(
        read=read_BT, selected=read_BT, logprobs=old_BT.clone().requires_grad_(), old_logprobs=old_BT,
        advantages=advantages_BT,
    )  # fmt: skip
    dropped_BT = evaluate("clip_cov", terms, fraction=0.1, lowest=-9.0, highest=9.0)[2]
    assert dropped_BT.sum() == 2000
    assert float(old_BT[dropped_BT].mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(old_BT[dropped_BT].std()) == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    assert (dropped_BT.sum(1) - 500).abs().max() < 80


def test_hapo_by_hand() -> None:
    """ln H = 0, 1, 2, 3, 5 with the quantile 0.75: h = -1, -2/3, -1/3, 0, 1. Ratios are cut at the edges."""
    entropy = torch.tensor([0.0, 1, 2, 3, 5], dtype=torch.float64).exp().expand(2, 5)
    low, high = [0.4, 0.2 * 5 / 3, 0.2 * 4 / 3, 0.2, 0.2], [0.28] * 4 + [0.56]
    inside = [[1 + width - 1e-6 for width in high], [1 - width + 1e-6 for width in low]]
    outside = [[1 + width + 1e-6 for width in high], [1 - width - 1e-6 for width in low]]
    for ratios, cut in ((inside, False), (outside, True)):
        terms = terms_of(ratios, [1.0, -1.0], entropy=entropy)
        _, gradient, cut_BT = evaluate("hapo", terms, 1.0, quantile=0.75)
        assert bool(cut_BT.all()) == cut and bool(cut_BT.any()) == cut
        assert bool((gradient == 0).all()) == cut


def test_hapo_reads_entropies_of_the_whole_micro_batch() -> None:
    """The 80% quantile of 0.1 ... 1.0, 0.1 ... 0.6 and 0.1 ... 0.4 is rank 15 of 0 ... 19, which is 0.6."""
    values = torch.tensor([0.1 * number for number in range(1, 11)], dtype=torch.float64)
    read = torch.arange(10) < torch.tensor([[10], [6], [4]])
    terms = random_terms(read=read, selected=read[:, :1] & read, entropy=torch.where(read, values, math.nan))
    terms = replace(
        terms,
        **{
            name: getattr(terms, name)[:3, :10].detach()
            for name in ("logprobs", "old_logprobs", "ref_logprobs", "advantages")
        },
    )
    h = _relative_entropy(terms, 0.8)
    assert h[0, 5] == 0 and h[1, 5] == 0
    assert h[0, 9] == 1 and h[0, 0] == -1 and h[2, 0] == -1
    assert h[0, 7].item() == pytest.approx(math.log(0.8 / 0.6) / math.log(1.0 / 0.6))
    assert h[0, 2].item() == pytest.approx(-math.log(0.6 / 0.3) / math.log(0.6 / 0.1))
    assert not h[~read].any()


def test_archer_by_hand() -> None:
    """Entropies 1 ... 6 and 10 ... 40: quantiles 5 and 34, above which lies one token each, clipped at 0.5, not 0.2."""
    entropy = torch.tensor([[1.0, 2, 3, 4, 5, 6], [10, 20, 30, 40, 0, 0]], dtype=torch.float64)
    ratios = [[1.1, 1.3, 1, 1, 1.3, 1.4], [0.7, 1, 1, 0.6, 0, 0]]
    terms = terms_of(ratios, [1.0, -1.0], entropy=entropy)
    _, gradient, cut = evaluate("archer", terms, 1.0, kl_coef=0.0)
    expected = torch.tensor([[-1.1, 0, -1, -1, 0, -1.4], [0, 1, 1, 0.6, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)
    assert cut.tolist() == [[False, True, False, False, True, False], [True, False, False, False, False, False]]
    # With the reference at the old policy, d = -ln r, and the gradient of the k3 estimate is 1 - 1 / r.
    kl = torch.tensor([[0.1 / 1.1, 0.3 / 1.3, 0, 0, 0.3 / 1.3, 0], [1 - 1 / 0.7, 0, 0, 0, 0, 0]], dtype=torch.float64)
    loss, with_kl, _ = evaluate("archer", terms, 1.0, kl_coef=10.0)
    torch.testing.assert_close(with_kl, expected + 10 * kl)
    surrogate = -1.1 - 1.2 - 1 - 1 - 1.2 - 1.4 + 0.8 + 1 + 1 + 0.6
    penalties = sum(1 / ratio - 1 + math.log(ratio) for ratio in (1.1, 1.3, 1.3, 0.7))
    assert loss.item() == pytest.approx(surrogate + 10 * penalties)
    torch.testing.assert_close(evaluate("archer", replace(terms, dual_clip=0.5 + 1), 1.0, kl_coef=0.0)[1], expected)


# Limits


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("masked", [False, True])
def test_on_policy_the_gradient_is_that_of_reinforce(name: str, masked: bool) -> None:
    """Without a KL penalty, and without tokens that Clip-Cov drops."""
    terms = random_terms()
    drawn_BT = torch.rand(8, 11, generator=torch.Generator().manual_seed(3)) < 0.4
    selected_BT = terms.read & drawn_BT if masked else terms.read
    terms = replace(terms, old_logprobs=terms.logprobs.detach(), selected=selected_BT)
    options = {"archer": {"kl_coef": 0.0}, "clip_cov": {"lowest": 1e9, "highest": 1e9}}.get(name, {})
    _, gradient, cut = evaluate(name, terms, **options)
    assert not cut.any() or name == "clip_cov"
    expected = reinforce(terms, per_response=objective_of(name).per_response)
    torch.testing.assert_close(gradient, torch.where(expected.isnan(), 0.0, expected))


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_responses_of_equal_ratios_are_as_in_dapo(name: str) -> None:
    """Inside the clips of all three: the geometric mean of equal ratios is that ratio."""
    terms = random_terms(clip_low=0.19, clip_high=0.19)
    shift_B1 = torch.linspace(-0.16, 0.16, 8, dtype=torch.float64)[:, None]
    terms = replace(terms, old_logprobs=torch.where(terms.read, terms.logprobs.detach() - shift_B1, 0.0))
    expected = reinforce(terms, per_response=True) * torch.where(terms.read, shift_B1.exp(), 0.0)
    torch.testing.assert_close(evaluate(name, terms)[1], expected)


@pytest.mark.parametrize(
    ("name", "options", "clips"),
    [
        ("clip_cov", {"lowest": 1e9, "highest": 1e9}, {"dual_clip": 1.2}),
        ("hapo", {"strength": 0.0}, {"dual_clip": 1.2}),
        ("archer", {"clip_above": 0.2, "kl_coef": 0.0}, {"clip_high": 0.2}),
        ("archer", {"quantile": 1.0, "kl_coef": 0.0}, {"clip_high": 0.2, "dual_clip": 1.2}),
    ],
)
def test_neutral_options_are_dapo_to_the_bit(name: str, options: dict[str, float], clips: dict[str, Any]) -> None:
    for seed in range(5):
        terms = random_terms(seed, **clips)
        plain, changed = evaluate("dapo", terms), evaluate(name, terms, **options)
        assert all(a.equal(b) for a, b in zip(plain, changed, strict=True))
        assert plain[2].any()


@pytest.mark.parametrize(
    ("name", "options", "clips"),
    [
        ("kl_cov", {"kl_coef": 0.0}, {}),
        ("cispo", {}, {"clip_high": 1e9}),
        ("dppo_tv", {"cap": 1e9}, {"clip_low": 1.0, "clip_high": 1.0}),
        ("sapo", {"tau_positive": 1e-5, "tau_negative": 1e-5}, {}),
    ],
)
def test_without_their_clips_they_are_the_surrogate_without_a_clip(
    name: str, options: dict[str, float], clips: dict[str, Any]
) -> None:
    terms = random_terms(**clips)
    counts = terms.read.sum(1, keepdim=True) * 8 if name == "sapo" else terms.read.sum()
    unclipped = -terms.advantages * (terms.logprobs - terms.old_logprobs).exp().detach() / counts
    torch.testing.assert_close(evaluate(name, terms, **options)[1], unclipped, rtol=1e-5, atol=1e-7)


# verl


def of_verl(name: str, terms: Terms, **policy_loss: float) -> tuple[Tensor, Tensor]:
    """verl's loss and its gradient, with the clips of ``terms``."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig, PolicyLossConfig

    config = ActorConfig(
        strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1, clip_ratio_low=terms.clip_low,
        clip_ratio_high=terms.clip_high, clip_ratio_c=20.0, policy_loss=PolicyLossConfig(**policy_loss),
    )  # fmt: skip
    mode = "seq-mean-token-mean" if name in ("gspo", "sapo") else "token-mean"
    mask_BT = terms.read.double()
    # Some of verl's losses write into their arguments.
    arguments = (terms.old_logprobs.clone(), terms.logprobs * 1, terms.advantages.clone(), mask_BT, mode, config)
    loss, _ = get_policy_loss_fn(name)(*arguments)
    return loss, torch.autograd.grad(loss, terms.logprobs)[0]


@needs_verl
@pytest.mark.verl
@pytest.mark.parametrize(
    ("name", "theirs", "clips", "options", "policy_loss"),
    [
        ("gspo", "gspo", {"clip_low": 0.03, "clip_high": 0.04}, {}, {}),
        ("gmpo", "geo_mean", {"clip_low": 0.2, "clip_high": 0.3}, {}, {}),
        ("sapo", "sapo", {}, {}, {}),
        ("dppo_tv", "dppo_tv", {"clip_low": 0.05, "clip_high": 0.06}, {}, {}),
        ("kl_cov", "kl_cov", {}, {"fraction": 0.1, "kl_coef": 0.7}, {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.7}),
        (
            "clip_cov",  # as many as there are candidates, since verl draws at random
            "clip_cov",
            {},
            {"fraction": 1.0, "lowest": 0.2, "highest": 0.8},
            {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 0.8},
        ),
        ("cispo", "cispo", {"clip_low": 0.2, "clip_high": 0.2}, {"clip_below": 0.2}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_with_everything_selected_it_is_verl_s(
    name: str, theirs: str, clips: dict[str, Any], options: dict[str, float], policy_loss: dict[str, float]
) -> None:
    some_cut = 0
    for seed in range(5):
        terms = random_terms(seed, **clips)
        loss, gradient, cut = evaluate(name, terms, **options)
        verl_loss, verl_gradient = of_verl(theirs, terms, **policy_loss)
        torch.testing.assert_close(loss, verl_loss.to(loss.dtype), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, verl_gradient, rtol=1e-6, atol=1e-7)
        some_cut += int(cut.sum())
    assert some_cut or name in ("sapo", "kl_cov"), "no clip was compared"


# Hostile values


def step(
    name: str, stats: TokenStats, old: Tensor, advantages: Tensor, response: Tensor, selected: Tensor, ref: Tensor
) -> Tensor:
    fixed = {"denominator": 100} if OBJECTIVES[name].fixed_denominator else {}
    config = LossConfig.model_validate({"objective": name} | fixed)
    counts = Counts(int(response.sum()), int(selected.sum()), len(response))
    return step_loss(stats, old, advantages, response, selected, counts, config, ref)[0]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("shift", [0.0, 5.0, 19.0, 25.0, 90.0, 1e4, -19.0, -25.0, -90.0, -1e4])
def test_extreme_ratios_leave_loss_and_gradient_finite(name: str, shift: float) -> None:
    for advantage in (2.0, -2.0, 1e-30, -1e6):
        logprobs = torch.tensor([[-1e-7, -3.0, -1e4], [-0.5, -90.0, -2.0]], requires_grad=True)
        mask = torch.ones(2, 3, dtype=torch.bool)
        entropy, advantages = torch.tensor([[0.0, 1e-12, 3.0], [11.0, 0.1, 0.1]]), torch.tensor([advantage, 1.0])
        old, ref = logprobs.detach() - shift, logprobs.detach() + shift
        loss = step(name, TokenStats(logprobs, entropy), old, advantages, mask, mask, ref)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 500.0])
def test_nothing_outside_what_is_read_counts(name: str, rubbish: float) -> None:
    """Positions outside the response; and, unless it reads whole responses, response tokens that are not selected."""
    terms = random_terms()
    drawn_BT = torch.rand(8, 11, generator=torch.Generator().manual_seed(3)) < 0.5
    selected_BT = terms.read & drawn_BT
    read_BT = terms.read if OBJECTIVES[name].all_tokens else selected_BT
    found = []
    for filling in (0.0, rubbish):
        logprobs = torch.where(read_BT, terms.logprobs, filling).detach().requires_grad_()
        assert terms.ref_logprobs is not None
        entropy, old, ref = (
            torch.where(read_BT, each, filling) for each in (terms.entropy, terms.old_logprobs, terms.ref_logprobs)
        )
        advantages = torch.where(read_BT, terms.advantages, 1.0)
        loss = step(name, TokenStats(logprobs, entropy), old, advantages, terms.read, selected_BT, ref)
        gradient = torch.autograd.grad(loss, logprobs)[0]
        assert not gradient[~selected_BT].any(), "only selected tokens carry a gradient"
        assert gradient[selected_BT].any()
        found.append((loss, gradient))
    assert found[0][0].equal(found[1][0]) and found[0][1].equal(found[1][1])


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("empty", ["no advantage", "nothing selected", "no response", "no token of one response"])
def test_without_tokens_the_gradient_is_zero(name: str, empty: str) -> None:
    terms = random_terms()
    none_BT = torch.zeros_like(terms.read)
    response = none_BT if empty == "no response" else terms.read
    selected = none_BT if empty in ("nothing selected", "no response") else terms.read.clone()
    if empty == "no token of one response":
        selected[0] = False
    advantages = terms.advantages * (empty != "no advantage")
    assert terms.ref_logprobs is not None
    stats = TokenStats(terms.logprobs, terms.entropy)
    loss = step(name, stats, terms.old_logprobs, advantages, response, selected, terms.ref_logprobs)
    gradient = torch.autograd.grad(loss, terms.logprobs)[0]
    assert gradient.isfinite().all() and not gradient[~selected].any()
    if empty != "no token of one response":
        assert loss == 0 and not gradient.any()
    else:
        assert gradient[1:].any()


def test_a_response_is_read_whole_where_a_weight_is_0() -> None:
    """A token that a weight or a correction removes still counts in the ratio of its response; padding does not."""
    old = torch.tensor([[-1.0, -1.0, -1.0]])
    logprobs = (old + torch.tensor([[-0.5, 0.0, 9.0]])).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    stats, advantages = TokenStats(logprobs, torch.zeros_like(old)), torch.tensor([[0.0, 1.0, -9.0]])
    for name in ("gspo", "gmpo"):
        assert step(name, stats, old, advantages, mask, mask, old).item() == pytest.approx(-math.exp(-0.25))


def test_archer_takes_the_quantile_over_the_whole_response() -> None:
    """Entropies 1 ... 6, of which the quantile is 5: whichever token is selected alone, only the last is above."""
    entropy = torch.tensor([[1.0, 2, 3, 4, 5, 6]], dtype=torch.float64)
    for place in range(6):
        selected = [[place == index for index in range(6)]]
        terms = terms_of([[1.3] * 6], [1.0], entropy=entropy, selected=selected)
        assert bool(evaluate("archer", terms)[2][0, place]) == (place < 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cispo", {"clip_below": 1.5}, r"loss.options.clip_below = 1.5 must be a finite number in \[0, 1\]"),
        ("cispo", {"clip_below": "no"}, "loss.options.clip_below = no must be a finite number"),
        ("sapo", {"tau_positive": 0.0}, "loss.options.tau_positive = 0.0 must be above 0"),
        ("sapo", {"tau_negative": math.nan}, "loss.options.tau_negative = nan must be a finite number of at least 0"),
        ("dppo_tv", {"cap": 0.5}, "loss.options.cap = 0.5 must be a finite number of at least 1"),
        ("clip_cov", {"fraction": 1.1}, r"loss.options.fraction = 1.1 must be a finite number in \[0, 1\]"),
        ("clip_cov", {"lowest": 6.0}, "loss.options.highest = 5.0 must be a finite number of at least 6.0"),
        ("kl_cov", {"fraction": -0.1}, "loss.options.fraction = -0.1 must be a finite number"),
        ("kl_cov", {"kl_coef": -1.0}, "loss.options.kl_coef = -1.0 must be a finite number of at least 0"),
        ("hapo", {"quantile": 2}, r"loss.options.quantile = 2 must be a finite number in \[0, 1\]"),
        ("hapo", {"strength": math.inf}, "loss.options.strength = inf must be a finite number"),
        ("archer", {"quantile": -1}, "loss.options.quantile = -1 must be"),
        ("archer", {"clip_above": 1.1}, "loss.options.clip_above = 1.1 must be"),
        ("archer", {"clip_below": True}, "loss.options.clip_below = True must be"),
        ("archer", {"kl_coef": -0.1}, "loss.options.kl_coef = -0.1 must be"),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(name, random_terms(), **options)


# Settings that do not fit


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"objective": "sapo", "clip_high": 0.2},
            'loss.clip_high = 0.2 is not read by loss.objective = "sapo"; remove',
        ),
        ({"objective": "kl_cov", "clip_low": 0.1}, 'loss.clip_low = 0.1 is not read by loss.objective = "kl_cov"'),
        ({"objective": "cispo", "clip_low": 0.1}, 'loss.clip_low = 0.1 is not read by loss.objective = "cispo"'),
        ({"objective": "gspo", "dual_clip": 10.0}, 'loss.dual_clip = 10.0 is not read by loss.objective = "gspo"'),
        ({"objective": "gspo", "denominator": "response"}, 'loss.denominator = "response" is not read by .*"gspo"'),
        ({"objective": "gmpo", "denominator": 9}, 'loss.denominator = 9 is not read by loss.objective = "gmpo"'),
        ({"objective": "dr_grpo"}, 'loss.denominator = "selected" counts tokens, but loss.objective = "dr_grpo"'),
        ({"objective": "archer", "kl_coef": 0.1}, 'loss.kl_coef = 0.1: loss.objective = "archer" has a KL penalty'),
        (
            {"objective": "kl_cov", "old_logprobs": "trainer", "sampler_correction": "masked"},
            'loss.sampler_correction = "masked" multiplies advantages, by which loss.objective = "kl_cov" ranks',
        ),
    ],
)
def test_settings_that_an_objective_does_not_read_are_refused(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**loss)


def test_settings_that_an_objective_reads_are_accepted() -> None:
    for name, objective in OBJECTIVES.items():
        values: dict[str, Any] = {"objective": name}
        values |= {clip: 3.0 if clip == "dual_clip" else 0.3 for clip in objective.clips}
        values |= {"denominator": 64} if objective.fixed_denominator else {}
        assert LossConfig.model_validate(values).needs_reference == (name == "archer")
    LossConfig(objective="mine:objective", dual_clip=2.0, clip_low=0.1)


def test_maxrl_refuses_negative_rewards() -> None:
    message = 'reward.overlong_cache = 4096 makes rewards negative, and loss.objective = "maxrl" divides by their mean'
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({"loss": {"objective": "maxrl"}})
    term = {"name": "length", "verifier": "format", "weight": -0.5}
    with pytest.raises(ValueError, match=r"reward.terms \(length\): weight = -0.5 makes rewards negative"):
        TrainConfig.model_validate({"loss": {"objective": "maxrl"}, "reward": {"overlong_cache": 0, "terms": (term,)}})
    TrainConfig.model_validate({"loss": {"objective": "maxrl"}, "reward": {"overlong_cache": 0}})


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.all_tokens])
def test_whole_responses_need_the_dense_backward(name: str) -> None:
    values: dict[str, Any] = {"loss": {"objective": name}, "training": {"backward": "forks_only"}}
    with pytest.raises(ValueError, match=f'loss.objective = "{name}" reads the log-probs of whole responses'):
        TrainConfig.model_validate(values)
