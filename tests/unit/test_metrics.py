"""The figures of a step count what their names say, also where nothing is there to count."""

from __future__ import annotations

import math

import pytest
import torch

from forkrl.training.metrics import rollout_metrics, update_metrics
from forkrl.training.update import Update
from forkrl.types import Prompt, Rollout, RolloutGroup, TokenBatch, VerifierResult


def mini_batch(advantages_B: list[float]) -> TokenBatch:
    """Three response tokens a sequence."""
    shape = (len(advantages_B), 3)
    whole, numbers = torch.ones(shape, dtype=torch.bool), torch.zeros(shape)
    return TokenBatch(
        input_ids=numbers.long(),
        attention_mask=whole,
        targets=numbers.long(),
        response_mask=whole,
        old_logprobs=numbers,
        rollout_entropy=numbers,
        advantages=torch.tensor(advantages_B),
    )


def update(selected_BT: list[list[bool]], ratio_max: float = 1.0) -> Update:
    selected = torch.tensor(selected_BT)
    metrics = {"loss/ratio_max": ratio_max, "loss/approx_kl": ratio_max, "entropy/threshold": 0.5 / ratio_max}
    return Update(selected, metrics, torch.zeros(0))


def test_kept_fractions_leave_tokens_without_advantage_out() -> None:
    selected = [[True, False, False], [True, True, False], [True, True, True]]
    figures = update_metrics([mini_batch([1.0, -1.0, 0.0])], [update(selected)])
    assert figures["selection/kept_fraction"] == pytest.approx(6 / 9)
    assert figures["selection/kept_fraction_positive"] == pytest.approx(1 / 3)
    assert figures["selection/kept_fraction_negative"] == pytest.approx(2 / 3)


def test_a_kept_fraction_of_no_tokens_is_undefined() -> None:
    figures = update_metrics([mini_batch([1.0, 0.0])], [update([[True] * 3, [True] * 3])])
    assert math.isnan(figures["selection/kept_fraction_negative"])


def test_extremes_of_a_step_are_those_of_any_gradient_step() -> None:
    updates = [update([[True] * 3], ratio_max) for ratio_max in (1.0, 4.0, 1.0)]
    figures = update_metrics([mini_batch([1.0])] * 3, updates)
    assert figures["loss/ratio_max"] == 4
    assert figures["entropy/threshold"] == 0.125, "the lowest of any gradient step"
    assert figures["loss/approx_kl"] == 2


def test_responses_that_could_not_be_judged_are_counted_by_reason() -> None:
    results = tuple(VerifierResult(0.0, failure) for failure in ("", "crash", "error", "crash"))
    rollout = Rollout((1,), (2,), torch.zeros(1), torch.zeros(1), "", finished=True)
    group = RolloutGroup(Prompt("", "", ""), (rollout,) * 4, results)
    figures = rollout_metrics([group, group], [], 2, 1, {"rollout": 1.0, "reward": 1.0})
    failures = {name: value for name, value in figures.items() if name.startswith("verifier/")}
    assert failures == {
        "verifier/failures": 6,
        "verifier/failures_timeout": 0,
        "verifier/failures_crash": 4,
        "verifier/failures_memory": 0,
        "verifier/failures_error": 2,
    }
