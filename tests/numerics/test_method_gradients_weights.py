"""Weights in a gradient step: each changes the gradient, to that of the weighted loss written down once more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.methods import WEIGHTS
from forkrl.model.policy import Policy
from forkrl.types import TokenBatch
from tests.models import random_policy
from tests.numerics.test_update import SEQUENCE_ROOM, close, gradient, make_batch, naive_gradient, recipe


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy()


@pytest.fixture(scope="module")
def batch(policy: Policy) -> TokenBatch:
    """With two responses that have no advantage."""
    made = make_batch(policy)
    return replace(made, advantages=torch.where(torch.arange(len(made)) < 2, 0.0, made.advantages))


class Tokens:
    """Response tokens of a batch in fp64, flat: entropies and probabilities by the model's own logits."""

    def __init__(self, policy: Policy, batch: TokenBatch) -> None:
        with torch.no_grad():
            logits_BTV = policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        logprobs_BTV = logits_BTV.double().log_softmax(-1)
        at_BT = batch.response_mask
        self.entropy = -(logprobs_BTV.exp() * logprobs_BTV).sum(-1)[at_BT]
        self.p = logprobs_BTV.gather(-1, batch.targets[..., None])[..., 0].exp()[at_BT]
        self.old = batch.old_logprobs.double().exp()[at_BT]
        self.advantage = batch.advantages.double()[:, None].expand(at_BT.shape)[at_BT]
        self.row, self.place = at_BT.nonzero(as_tuple=True)


def naive_entropy_advantage(tokens: Tokens) -> Tensor:
    shaped = tokens.advantage + torch.minimum(0.4 * tokens.entropy, tokens.advantage.abs() / 2)
    return torch.where(tokens.advantage == 0, 1.0, shaped / tokens.advantage)


def naive_proximal_entropy(tokens: Tokens) -> Tensor:
    """Window 5."""
    same_NN = tokens.row[:, None] == tokens.row
    near_NN = same_NN & ((tokens.place[:, None] - tokens.place).abs() <= 2)
    score = tokens.entropy.exp() / (near_NN * tokens.entropy.exp()).sum(1)
    return torch.where(tokens.advantage > 0, score / (same_NN * score).sum(1) * same_NN.sum(1), 1.0)


def naive_steer(tokens: Tokens) -> Tensor:
    """The batch's old log-probs are moved at random, some to above 0."""
    omega = tokens.advantage / tokens.old.clamp(max=1) * tokens.p * (1 - tokens.p) * (tokens.p.log() + tokens.entropy)
    rate = -math.log(0.8) / max(float(omega.abs().max()), 0.02)
    return torch.exp(-rate * omega.abs())


def naive_stare(tokens: Tokens) -> Tensor:
    """The tenth of each sign, rounded up; the random model's entropy is far above 0.3."""
    weight = torch.ones_like(tokens.p)
    for sign, factor in ((1, 1.1), (-1, 0.9)):
        candidates = (tokens.advantage.sign() == sign).nonzero()[:, 0]
        least_likely = candidates[tokens.p[candidates].argsort()[: -(-len(candidates) // 10)]]
        weight[least_likely] = factor
    return weight


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Tokens], Tensor]]] = {
    "w_reinforce": ({}, {"scale": 1.0}, lambda tokens: torch.where(tokens.advantage > 0, 0.1, 1.0)),
    "entropy_advantage": ({}, {"alpha": 0.0}, naive_entropy_advantage),
    "proximal_entropy": ({"window": 5}, {"window": 1}, naive_proximal_entropy),
    "steer": ({}, {"w_min": 1.0}, naive_steer),
    "stare": (
        {"negative": 0.9, "target_entropy": 9.0},
        {"positive": 1.0, "negative": 1.0, "target_entropy": 9.0},
        naive_stare,
    ),
    "prob_reweight": ({}, {"alpha": 0.0}, lambda tokens: 0.2 * tokens.old + 0.8),
}
"""Options, neutral options, and the weights of response tokens with the former."""


def test_every_weight_has_a_case() -> None:
    assert set(CASES) == set(WEIGHTS)


@pytest.mark.parametrize("selection", [{"rule": "all"}, {"rule": "top_entropy"}], ids=["all", "top"])
@pytest.mark.parametrize("rule", CASES)
def test_a_weight_in_a_gradient_step(policy: Policy, batch: TokenBatch, rule: str, selection: dict[str, Any]) -> None:
    options, neutral, naive = CASES[rule]
    selection = selection | {"scope": "mini_batch"}
    plain, _ = gradient(policy, batch, recipe(selection=selection))
    settings: dict[str, Any] = {"selection": selection, "weights": {"rule": rule, "options": options}}
    weighted, update = gradient(policy, batch, recipe(**settings))
    assert float((weighted - plain).norm() / plain.norm()) > 1e-3

    weights_BT = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
    weights_BT[batch.response_mask] = naive(Tokens(policy, batch)).double()
    selected_BT = update.selected_BT
    expected = naive_gradient(policy, batch, (weights_BT * selected_BT).float(), int(selected_BT.sum()))
    assert close(weighted, expected)

    unchanged, _ = gradient(policy, batch, recipe(selection=selection, weights={"rule": rule, "options": neutral}))
    assert unchanged.equal(plain)

    pieces, _ = gradient(policy, batch, recipe(micro_batch_tokens=SEQUENCE_ROOM, **settings))
    assert close(pieces, weighted)
