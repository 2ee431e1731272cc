"""Weights of published methods: hand-worked numbers, neutral options, and values that could overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.config import SelectionConfig, WeightsConfig
from forkrl.method.masks.proximal_entropy import proximal_entropy as proximal_entropy_mask
from forkrl.method.plugins import load_method
from forkrl.method.selection import choose
from forkrl.method.signals import Signals
from forkrl.methods import WEIGHTS
from tests.signals import signals_of

NEUTRAL: dict[str, dict[str, float]] = {
    "w_reinforce": {"scale": 1.0},
    "entropy_advantage": {"alpha": 0.0},
    "proximal_entropy": {"window": 1},
    "steer": {"w_min": 1.0},
    "stare": {"positive": 1.0, "negative": 1.0},
    "prob_reweight": {"alpha": 0.0},
}
"""Options with which a weight is 1 everywhere."""


def weights(rule: str, signals: Signals, **options: Any) -> Tensor:
    """As training computes them, over all given tokens; 1 outside the response."""
    selection = SelectionConfig(rule="all", scope="mini_batch")
    chosen = choose(signals, selection, WeightsConfig(rule=rule, options=options), [])
    assert chosen.weights_BT is not None
    return chosen.weights_BT


def some_signals(seed: int = 0) -> Signals:
    """Four responses of up to 9 tokens, one of them empty, with tokens of another role within; NaN outside."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.rand(4, 9, generator=generator) < 0.7
    mask_BT[2] = False
    old_BT = -3 * torch.rand(4, 9, generator=generator)
    logprobs_BT = (old_BT + 0.3 * torch.randn(4, 9, generator=generator)).clamp(max=0)
    values = {"entropy": 2 * torch.rand(4, 9, generator=generator), "logprobs": logprobs_BT, "old_logprobs": old_BT}
    outside = {name: torch.where(mask_BT, value, math.nan) for name, value in values.items()}
    return signals_of(mask_BT, **outside, advantages=torch.tensor([1.2, -0.7, 0.4, 0.9]))


def test_every_weight_has_a_neutral_value() -> None:
    assert set(NEUTRAL) == set(WEIGHTS)


@pytest.mark.parametrize("rule", NEUTRAL)
@pytest.mark.parametrize("seed", range(5))
def test_neutral_options_give_exactly_1(rule: str, seed: int) -> None:
    signals = some_signals(seed)
    assert weights(rule, signals, **NEUTRAL[rule]).equal(torch.ones(4, 9))
    given = {"target_entropy": 9.0} if rule == "stare" else {}
    assert not weights(rule, signals, **given).equal(torch.ones(4, 9)), "the default does nothing"


def test_a_window_of_one_token_is_neutral_at_any_range_of_entropies() -> None:
    """A difference of running sums would not be: exp(12) drowns exp(0)."""
    entropy_BT = torch.tensor([0.0, 12.0, 1e-3]).repeat(20_000)[None]
    signals = signals_of(torch.ones(1, 60_000, dtype=torch.bool), entropy=entropy_BT, advantages=torch.ones(1))
    assert weights("proximal_entropy", signals, window=1).equal(torch.ones(1, 60_000))


@pytest.mark.parametrize("rule", NEUTRAL)
def test_hostile_values_give_finite_weights(rule: str) -> None:
    entropy_BT = torch.tensor([[0.0, -1e-7, 12.0, 80.0]]).repeat(6, 1)
    logprobs_BT = torch.tensor([[0.0, -1e4, -math.inf, -1e-9]]).repeat(6, 1)
    for old_BT in (logprobs_BT, logprobs_BT.flip(1)):
        signals = signals_of(
            torch.ones(6, 4, dtype=torch.bool),
            entropy=entropy_BT,
            logprobs=logprobs_BT,
            old_logprobs=old_BT,
            advantages=torch.tensor([0.0, 1e-45, -1e-45, 1e6, -1e6, 1.0]),
        )
        weights_BT = load_method("weights.rule", rule, WEIGHTS[rule].path, {})(signals).float()
        assert weights_BT.isfinite().all()
        assert (weights_BT >= 0).all()
    nothing = signals_of(torch.zeros(2, 3, dtype=torch.bool), advantages=torch.ones(2))
    assert load_method("weights.rule", rule, WEIGHTS[rule].path, {})(nothing).isfinite().all()
    assert weights(rule, nothing).equal(torch.ones(2, 3))
    assert weights(rule, signals_of(torch.zeros(0, 3, dtype=torch.bool))).shape == (0, 3)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("w_reinforce", {"scale": -0.1}, "scale = -0.1 must be at least 0"),
        ("entropy_advantage", {"alpha": -0.4}, "alpha = -0.4 must be finite and at least 0"),
        ("entropy_advantage", {"alpha": math.inf}, "alpha = inf must be"),
        ("entropy_advantage", {"kappa": 1.0}, "kappa = 1.0 must be above 1"),
        ("entropy_advantage", {"kappa": math.nan}, "kappa = nan must be"),
        ("proximal_entropy", {"window": 0}, "window = 0 must be at least 1"),
        ("steer", {"w_min": 0.0}, r"w_min = 0.0 must lie in \(0, 1\]"),
        ("steer", {"w_min": 1.1}, "w_min = 1.1 must"),
        ("stare", {"ratio": 0.0}, r"ratio = 0.0 must lie in \(0, 1\]"),
        ("stare", {"ratio": 1.5}, "ratio = 1.5 must"),
        ("stare", {"positive": 0.0}, "positive = 0.0 must be finite and above 0"),
        ("stare", {"negative": math.inf}, "negative = inf must be"),
        ("stare", {"target_entropy": -0.1}, "target_entropy = -0.1 must be at least 0 nats"),
        ("stare", {"target_entropy": math.nan}, "target_entropy = nan must"),
        ("prob_reweight", {"alpha": 1.1}, r"alpha = 1.1 must lie in \[0, 1\]"),
        ("prob_reweight", {"alpha": math.nan}, "alpha = nan must"),
    ],
)
def test_options_out_of_range_are_named(rule: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_method("weights.rule", rule, WEIGHTS[rule].path, options)(some_signals())


def test_w_reinforce() -> None:
    signals = signals_of(torch.ones(3, 2, dtype=torch.bool), advantages=torch.tensor([2.0, -1.0, 0.0]))
    assert weights("w_reinforce", signals).equal(torch.tensor([[0.1, 0.1], [1.0, 1.0], [1.0, 1.0]]))


def test_entropy_advantage() -> None:
    """alpha = 0.4, kappa = 2. A = 1: H = 0.5 adds 0.2; H = 2 would add 0.8, at most 0.5.

    A = -0.5: H = 0.5 adds 0.2, so -0.3 = 0.6 A; H = 2 adds at most 0.25, so -0.25 = 0.5 A.
    """
    entropy_BT = torch.tensor([[0.5, 2.0, 0.0]]).repeat(3, 1)
    signals = signals_of(
        torch.ones(3, 3, dtype=torch.bool), entropy=entropy_BT, advantages=torch.tensor([1.0, -0.5, 0.0])
    )
    expected = torch.tensor([[1.2, 1.5, 1.0], [0.6, 0.5, 1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(weights("entropy_advantage", signals), expected)
    # alpha = 0.1: 1 + 0.05, and 1 + 0.2; kappa = 10: at most 1.1.
    found = weights("entropy_advantage", signals, alpha=0.1, kappa=10)[0]
    torch.testing.assert_close(found, torch.tensor([1.05, 1.1, 1.0]))


def test_proximal_entropy_by_hand() -> None:
    """exp(H) = 1, 2, 3 and a window of 3: e = 1/3, 2/6, 3/5; their sum is 19/15, and T = 3.

    Weights: 3 * (1/3) / (19/15) = 15/19, 15/19 and 27/19.
    """
    entropy_BT = torch.tensor([[1.0, 2.0, 3.0, 7.0]]).log().repeat(3, 1)
    mask_BT = torch.tensor([True, True, True, False]).repeat(3, 1)
    signals = signals_of(mask_BT, entropy=entropy_BT, advantages=torch.tensor([0.5, -0.5, 0.0]))
    expected = torch.tensor([[15 / 19, 15 / 19, 27 / 19, 1.0], [1.0] * 4, [1.0] * 4])
    torch.testing.assert_close(weights("proximal_entropy", signals, window=3), expected)


@pytest.mark.parametrize("window", [1, 3, 5, 101])
def test_proximal_entropy_by_loops(window: int) -> None:
    signals = some_signals(1)
    found_BT = weights("proximal_entropy", signals, window=window).double()
    for row, advantage in enumerate(signals.advantages.tolist()):
        at = signals.response_mask[row].nonzero()[:, 0].tolist()
        grown = {t: math.exp(float(signals.entropy[row, t])) for t in at}
        score = {t: grown[t] / sum(grown[k] for k in at if abs(k - t) <= window / 2) for t in at}
        for t in at:
            expected = len(at) * score[t] / sum(score.values()) if advantage > 0 else 1.0
            assert float(found_BT[row, t]) == pytest.approx(expected, rel=1e-6)
        if at:
            assert float(found_BT[row, at].mean()) == pytest.approx(1.0), "the mean of a response stays"


def test_the_mask_of_one_token_windows_scores_all_tokens_alike() -> None:
    signals = some_signals(1)
    assert proximal_entropy_mask(signals, window=1).equal(signals.response_mask.float())


def test_steer_by_hand() -> None:
    """p = 0.5, A = 1, H = ln 4. Token 0, p_old = 0.5: Omega = 2 * 0.25 * (ln 4 - ln 2) = 0.5 ln 2.

    Token 1, p_old = 0.25: twice that, which is the maximum. Weights: 0.8 ** 0.5 and 0.8.
    """
    logprobs_BT, old_BT = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.5, 0.25]]).log()
    given = {"entropy": torch.full((1, 2), math.log(4)), "logprobs": logprobs_BT, "old_logprobs": old_BT}
    signals = signals_of(torch.ones(1, 2, dtype=torch.bool), **given, advantages=torch.ones(1))
    torch.testing.assert_close(weights("steer", signals), torch.tensor([[math.sqrt(0.8), 0.8]]))
    # A = -0.02: |Omega| = 0.01 ln 2 and 0.02 ln 2, both below 0.02: 0.8 ** (0.5 ln 2) and 0.8 ** ln 2.
    small = signals_of(torch.ones(1, 2, dtype=torch.bool), **given, advantages=torch.tensor([-0.02]))
    expected = torch.tensor([[0.8 ** (0.5 * math.log(2)), 0.8 ** math.log(2)]])
    torch.testing.assert_close(weights("steer", small), expected)


def test_steer_by_loops() -> None:
    signals = some_signals(2)
    omega: dict[tuple[int, int], float] = {}
    for row, t in signals.response_mask.nonzero().tolist():
        p, old = (math.exp(float(each[row, t])) for each in (signals.logprobs, signals.old_logprobs))
        change = p * (1 - p) * (math.log(p) + float(signals.entropy[row, t]))
        omega[row, t] = abs(float(signals.advantages[row]) / old * change)
    rate = -math.log(0.7) / max(max(omega.values()), 0.02)
    found_BT = weights("steer", signals, w_min=0.7)
    for (row, t), value in omega.items():
        assert float(found_BT[row, t]) == pytest.approx(math.exp(-rate * value), rel=1e-5)
    assert float(found_BT.min()) == pytest.approx(0.7)


def stare_signals(entropy: float = 0.2) -> Signals:
    """A > 0: tokens of surprisal 1, 5, 2 and 9, 3; A < 0: 4, 8, 6 and a token of another role; A = 0: 20, 20, 20."""
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    surprisal_BT = torch.tensor([[1.0, 5, 2, 99], [9, 3, 99, 99], [4, 8, 6, 99], [20, 20, 20, 99]])
    return signals_of(
        mask_BT,
        entropy=torch.full((4, 4), entropy),
        logprobs=-surprisal_BT,
        advantages=torch.tensor([1.0, 2.0, -1.0, 0.0]),
    )


def test_stare_by_hand() -> None:
    """40% of the 5 tokens with A > 0 are 2: surprisal 9 and 5. Of the 3 with A < 0 they are 1.2, so 2: 8 and 6."""
    expected = torch.ones(4, 4)
    expected[0, 1] = expected[1, 0] = 1.1
    assert weights("stare", stare_signals(), ratio=0.4).equal(expected)
    expected[2, 1] = expected[2, 2] = 0.9
    assert weights("stare", stare_signals(), ratio=0.4, negative=0.9).equal(expected)
    at_least_one = torch.ones(4, 4)
    at_least_one[1, 0] = 1.1
    assert weights("stare", stare_signals()).equal(at_least_one), "a tenth of 5 is still a token"


def test_stare_waits_for_a_low_entropy() -> None:
    ones_BT = torch.ones(4, 4)
    assert not weights("stare", stare_signals(0.29)).equal(ones_BT)
    assert weights("stare", stare_signals(0.31)).equal(ones_BT)
    assert not weights("stare", stare_signals(5.0), target_entropy=99.0).equal(ones_BT)
    assert weights("stare", stare_signals(0.0), target_entropy=0.0).equal(ones_BT)


def test_stare_takes_the_mean_entropy_of_response_tokens() -> None:
    signals = stare_signals(0.2)
    signals.entropy[~signals.response_mask] = 50.0
    assert float(weights("stare", signals).max()) == pytest.approx(1.1)


def test_prob_reweight() -> None:
    """alpha = 0.2 and p_old = 1, 0.5, 0: 1, 0.9, 0.8, whatever the current policy and the sign of A."""
    old_BT = torch.tensor([[1.0, 0.5, 0.0]]).log().repeat(2, 1)
    signals = signals_of(
        torch.ones(2, 3, dtype=torch.bool),
        logprobs=torch.full((2, 3), -7.0),
        old_logprobs=old_BT,
        advantages=torch.tensor([1.0, -1.0]),
    )
    torch.testing.assert_close(weights("prob_reweight", signals), torch.tensor([[1.0, 0.9, 0.8]]).repeat(2, 1))
