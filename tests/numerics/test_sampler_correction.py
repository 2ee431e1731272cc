"""``loss.old_logprobs`` and ``loss.sampler_correction``: weights, gradients, metrics and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.config import LossConfig, TrainConfig
from forkrl.config.recipe import parse_recipe
from forkrl.errors import UserError
from forkrl.method.batches import collate
from forkrl.method.correction import sampler_weights, weight_metrics
from forkrl.method.signals import MAX_LOG_RATIO
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.rollout.logprob_gap import LogprobGap
from forkrl.training.loop import train
from forkrl.training.open_run import open_run
from forkrl.training.update import recompute_logprobs, update_policy
from forkrl.types import Prompt, RolloutGroup, SamplingParams, TokenBatch
from tests.models import random_policy
from tests.verl_here import needs_verl

KINDS = ("token_truncated", "sequence_truncated", "masked")


def loss_settings(kind: str, cap: float = 2.0) -> LossConfig:
    return LossConfig(old_logprobs="trainer", sampler_correction=kind, sampler_cap=cap)  # type: ignore[arg-type]


def differences(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-ratios ``[B, T]`` of all sizes, NaN outside the response."""
    generator = torch.Generator().manual_seed(seed)
    log_ratio_BT = torch.randn(6, 9, generator=generator) * torch.tensor([[0.01], [0.3], [1], [3], [40], [0]])
    mask_BT = torch.arange(9)[None] >= torch.tensor([0, 1, 2, 3, 4, 8])[:, None]
    return log_ratio_BT.where(mask_BT, torch.nan), mask_BT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [1.5, 2.0, 10.0])
def test_weights_equal_their_definition_in_fp64(kind: str, cap: float) -> None:
    log_ratio_BT, mask_BT = differences()
    weight_BT = sampler_weights(log_ratio_BT, mask_BT, loss_settings(kind, cap))
    assert weight_BT is not None and weight_BT.dtype == torch.float32
    for row, (ratios, mask) in enumerate(zip(log_ratio_BT.double().tolist(), mask_BT.tolist(), strict=True)):
        inside = [ratio for ratio, there in zip(ratios, mask, strict=True) if there]
        for column, there in enumerate(mask):
            exponent = sum(inside) if kind == "sequence_truncated" else ratios[column]
            exact = math.exp(max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, exponent))) if there else 1.0
            if kind == "masked":
                exact = exact if 1 / cap <= exact <= cap else 0.0
            assert float(weight_BT[row, column]) == pytest.approx(min(exact, cap), rel=1e-5), (row, column)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs_verl) for kind in KINDS])
def test_weights_equal_those_of_verl(kind: str) -> None:
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    log_ratio_BT, mask_BT = differences(1)
    log_ratio_BT = log_ratio_BT.nan_to_num()
    level, threshold = ("sequence" if kind == "sequence_truncated" else "token"), 3.0
    theirs_BT, _ = compute_rollout_correction_weights(
        log_ratio_BT, mask_BT.float(), level, f"{1 / threshold!r}_{threshold!r}" if kind == "masked" else threshold
    )
    ours_BT = sampler_weights(log_ratio_BT, mask_BT, loss_settings(kind, threshold))
    assert ours_BT is not None
    assert torch.equal(ours_BT[mask_BT], theirs_BT[mask_BT])


def test_no_correction_has_no_weights() -> None:
    assert sampler_weights(*differences(), LossConfig()) is None


def test_metrics_of_the_gap_equal_their_definitions() -> None:
    gap = LogprobGap.of(torch.tensor([0.0, math.log(2.1), -math.log(2.1), 0.1]))
    expected = (0.0, math.log(2.1), math.log(2.1), 0.1)
    assert gap.mean == pytest.approx(sum(expected) / 4) and gap.max == pytest.approx(math.log(2.1))
    assert gap.k3 == pytest.approx((2.1 - 1 + 1 / 2.1 - 1 + math.expm1(0.1) - 0.1) / 4)
    assert gap.beyond_2x == 0.5
    assert all(math.isnan(value) for value in LogprobGap.of(torch.zeros(0)))
    assert weight_metrics(torch.tensor([1.0, 0.0, 2.0, 0.5]), 2.0) == {
        "rollout/sampler_weight_mean": 0.875,
        "rollout/sampler_weight_cut": 0.5,
    }


def sampled(policy: Policy) -> TokenBatch:
    """A batch whose sampler was off by up to a factor of e in each token's probability."""
    prompts = [Prompt("a", "12", ""), Prompt("b", "3 45678901", "")]
    groups = EmbeddedEngine(Workers(policy), max_prompt_tokens=16).generate(
        prompts, group_size=4, sampling=SamplingParams(20), generator=torch.Generator().manual_seed(0)
    )
    advantages_PG = torch.tensor([[1.0, -1, 0.5, -0.5], [1.5, -0.5, 0, -1]])
    batch = collate(groups, advantages_PG, pad_id=0)
    noise_BT = torch.rand(batch.old_logprobs.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return replace(batch, old_logprobs=(batch.old_logprobs + noise_BT).where(batch.response_mask, 0.0))


SOME_VARIANCE = {"name": "order", "verifier": "operator:lt", "weight": 1.0}
"""Nothing here is solved; whether the answer sorts before the response varies."""


def config(**loss: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "embedded:countdown-base", "precision": "bf16"},
            "rollout": {"prompts_per_step": 2, "group_size": 4, "max_response_tokens": 20, "max_prompt_tokens": 16},
            "selection": {"scope": "mini_batch"},
            "reward": {"overlong_cache": 0, "timeout_s": 300, "terms": [SOME_VARIANCE]},
            "dynamic_sampling": {"enabled": False},
            "training": {"mini_batch_prompts": 1, "micro_batch_tokens": 80, "steps": 3},
            "loss": {"old_logprobs": "trainer", **loss},
            "eval": {"every": 0, "problems": 1, "samples": 1},
            "runtime": {"device": "cpu", "workers": 1, "threads": 1},
            "checkpoint": {"every": 1},
        }
    )


@pytest.mark.parametrize("cap", [1.2, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_weighted_one(kind: str, cap: float) -> None:
    """At ratio 1 the gradient is the mean of w A grad(log-prob) over selected tokens."""
    policy = random_policy()
    settings = config(sampler_correction=kind, sampler_cap=cap)
    batch, workers = sampled(policy), Workers(policy)
    corrected, metrics = recompute_logprobs(workers, batch, settings)
    assert torch.allclose(
        corrected.old_logprobs, compute_token_stats(policy, batch, temperature=1.0).logprobs, atol=1e-6
    )
    assert metrics["rollout/logprob_gap_mean"] == pytest.approx(0.5, abs=0.1)

    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    settings = settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update={"max_grad_norm": 1e9})})
    update = update_policy(workers, optimizer, corrected, settings, torch.Generator(), on_policy=True)
    found = {name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None}

    assert corrected.weights is not None
    policy.model.zero_grad()
    logprobs_BT = compute_token_stats(policy, batch, temperature=1.0).logprobs
    weighted_BT = corrected.weights * batch.advantages[:, None] * logprobs_BT
    (-weighted_BT[update.selected_BT].sum() / update.selected_BT.sum()).backward()
    for name, weight in policy.model.named_parameters():
        if weight.grad is not None:
            assert torch.allclose(found[name], weight.grad, atol=1e-5), name
    assert update.log_ratio_N.abs().max() < 1e-5


class NoisySampler:
    """An engine whose log-probs are off by noise below the limit of the log-prob check."""

    def __init__(self, engine: Any, size: float) -> None:
        self._engine, self._size = engine, size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Any, *, on_finished: Any = None, **how: Any) -> list[RolloutGroup]:
        groups: list[RolloutGroup] = self._engine.generate(prompts, **how)
        for number, group in enumerate(groups):
            rollouts = []
            for rollout in group.rollouts:
                noise = torch.cos(torch.arange(len(rollout)) * 2.0 + number) * self._size
                rollouts.append(replace(rollout, logprobs=rollout.logprobs + noise))
                on_finished(group.prompt, rollouts[-1])
            groups[number] = RolloutGroup(group.prompt, tuple(rollouts))
        return groups


def trained(settings: TrainConfig, out: Path, **how: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    with open_run(settings, out, **how) as run:
        run.engine = NoisySampler(run.engine, 0.05)
        train(run)
        weights = {name: value.clone() for name, value in run.policy.model.state_dict().items()}
    lines = (run.folder.path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if "reward/mean" in record], weights


def test_runs_log_the_gap_and_resume_exactly(tmp_path: Path) -> None:
    settings = config(sampler_correction="token_truncated", sampler_cap=1.02)
    steps, weights = trained(settings, tmp_path / "whole")
    for record in steps:
        assert 0.02 < record["rollout/logprob_gap_mean"] < 0.05 < record["rollout/logprob_gap_max"] < 0.2
        assert 0.1 < record["rollout/sampler_weight_cut"] < 0.9 and record["rollout/sampler_weight_mean"] < 1
        assert record["loss/ratio_max"] < 1.2

    with open_run(settings, tmp_path / "half") as run:
        run.engine = NoisySampler(run.engine, 0.05)
        run.config = settings.model_copy(update={"training": settings.training.model_copy(update={"steps": 1})})
        train(run)
    with open_run(settings, resume=tmp_path / "half") as run:
        run.engine = NoisySampler(run.engine, 0.05)
        train(run)
        for name, weight in run.policy.model.state_dict().items():
            assert torch.equal(weight, weights[name]), name

    other_steps, other_weights = trained(config(old_logprobs="sampler"), tmp_path / "sampler")
    assert other_steps[0].keys() == steps[0].keys() - {"rollout/sampler_weight_mean", "rollout/sampler_weight_cut"}
    assert any(not torch.equal(other_weights[name], weights[name]) for name in weights)


REFUSED = [
    ({"loss": {"sampler_correction": "masked"}}, 'set loss.old_logprobs = "trainer"'),
    ({"loss": {"sampler_cap": 3.0}}, "loss.sampler_cap is read with loss.sampler_correction alone"),
    ({"loss": {"old_logprobs": "trainer", "sampler_correction": "masked", "sampler_cap": 1.0}}, "sampler_cap"),
    ({"loss": {"old_logprobs": "trainer", "sampler_correction": "mis"}}, "sampler_correction"),
    ({"loss": {"old_logprobs": "trainer", "sampler_correction": "masked"}}, "compute the same log-probs"),
]


@pytest.mark.parametrize(("recipe", "message"), REFUSED)
def test_meaningless_settings_are_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe(TrainConfig, recipe, "recipe")


@pytest.mark.parametrize("where", [{"model": {"precision": "bf16"}}, {"rollout": {"engine": "vllm"}}])
def test_engines_that_differ_may_be_corrected(where: dict[str, Any]) -> None:
    recipe = {"loss": {"old_logprobs": "trainer", "sampler_correction": "masked"}, **where}
    assert parse_recipe(TrainConfig, recipe, "recipe").loss.sampler_correction == "masked"
