"""Before the first update the trainer's log-probs are compared with the sampler's; a gap stops the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.config import TrainConfig
from forkrl.errors import TrainingHalted
from forkrl.method.batches import collate
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.rollout.logprob_gap import MAX_MEAN_GAP, LogprobGap, logprob_gap, require_small_gap
from forkrl.training.loop import train
from forkrl.training.open_run import open_run
from forkrl.training.run import Run
from forkrl.types import Prompt, RolloutGroup, SamplingParams, TokenBatch
from tests.models import random_policy

NAMES = {f"rollout/logprob_gap_{name}" for name in ("mean", "max", "k3", "beyond_2x")}


def sampled(policy: Policy, **how: Any) -> TokenBatch:
    groups = EmbeddedEngine(Workers(policy), max_prompt_tokens=16).generate(
        [Prompt("a", "12", ""), Prompt("b", "3 45678901", "")],
        group_size=4,
        sampling=SamplingParams(40, **how),
        generator=torch.Generator().manual_seed(0),
    )
    return collate(groups, torch.zeros(2, 4), pad_id=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rounding_alone_is_well_below_the_limit(precision: str) -> None:
    policy = random_policy()
    policy = Policy(policy.model, policy.tokenizer, precision)
    gap = logprob_gap(policy, sampled(policy, temperature=0.7, top_k=3, top_p=0.9), 0.7)
    assert gap.mean <= gap.max and gap.mean < MAX_MEAN_GAP[precision] / 5
    require_small_gap(gap, precision)


def test_the_mean_decides_and_the_maximum_is_only_told() -> None:
    require_small_gap(LogprobGap(0.9e-3, 50.0, 0.0, 0.0), "fp32")
    with pytest.raises(TrainingHalted, match=r"differ .* by 0.0011 nats per token .* the limit of 0.001 .* 'fp32'"):
        require_small_gap(LogprobGap(1.1e-3, 2e-3, 0.0, 0.0), "fp32")
    require_small_gap(LogprobGap(0.099, 1.0, 0.0, 0.0), "bf16")
    with pytest.raises(TrainingHalted, match=r"the limit of 0.1 .* 'bf16'"):
        require_small_gap(LogprobGap(0.101, 1.0, 0.0, 0.0), "bf16")
    with pytest.raises(TrainingHalted):
        require_small_gap(LogprobGap(float("nan"), 0.0, 0.0, 0.0), "fp32")


class OtherLogprobs:
    """An engine whose log-probs are off by a constant."""

    def __init__(self, engine: Any, shift: float) -> None:
        self._engine, self._shift = engine, shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Any, **how: Any) -> list[RolloutGroup]:
        tell = how.pop("on_finished")
        groups = [
            RolloutGroup(
                group.prompt,
                tuple(replace(rollout, logprobs=rollout.logprobs - self._shift) for rollout in group.rollouts),
            )
            for group in self._engine.generate(prompts, **how)
        ]
        for group in groups:
            for rollout in group.rollouts:
                tell(group.prompt, rollout)
        return groups


SOME_VARIANCE = {"name": "order", "verifier": "operator:lt", "weight": 1.0}
"""Nothing here is solved; whether the answer sorts before the response varies."""


def config(**training: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "embedded:countdown-base"},
            "rollout": {"prompts_per_step": 2, "group_size": 4, "max_response_tokens": 8, "max_prompt_tokens": 64},
            "reward": {"overlong_cache": 0, "timeout_s": 300, "terms": [SOME_VARIANCE]},
            "dynamic_sampling": {"enabled": False},
            "training": {"mini_batch_prompts": 2, "micro_batch_tokens": 512, "steps": 2, **training},
            "eval": {"every": 0, "problems": 1, "samples": 1},
            "runtime": {"device": "cpu", "workers": 1, "threads": 1},
            "checkpoint": {"every": 1},
        }
    )


def records(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]


def test_the_gap_is_logged_in_every_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_run(config(), out) as run:
        train(run)
    steps = [record for record in records(run) if "reward/mean" in record]
    assert [record.keys() >= NAMES for record in steps] == [True, True]
    for record in steps:
        assert 0 <= record["rollout/logprob_gap_mean"] <= record["rollout/logprob_gap_max"] < 1e-5
        assert 0 <= record["rollout/logprob_gap_k3"] < 1e-10 and record["rollout/logprob_gap_beyond_2x"] == 0
    whole = run.policy.model.state_dict()

    half = tmp_path / "half"
    with open_run(config(), half) as run:
        run.config = config(steps=1)
        train(run)
    with open_run(config(), resume=half) as run:
        train(run)
    steps = [record for record in records(run) if "reward/mean" in record]
    assert [record.keys() >= NAMES for record in steps] == [True, True]
    for name, weight in run.policy.model.state_dict().items():
        assert torch.equal(weight, whole[name]), name


def test_an_engine_that_samples_from_something_else_stops_the_run_before_any_update(tmp_path: Path) -> None:
    before = open_policy(config().model, "cpu").model.state_dict()
    halted = pytest.raises(TrainingHalted, match=r"^step 1: the sampler's log-probs differ .* by 0.25 nats")
    with halted as stopped, open_run(config(), tmp_path / "run") as run:
        run.engine = OtherLogprobs(run.engine, 0.25)
        train(run)
    assert "\n" not in str(stopped.value)
    assert all(torch.equal(weight, before[name]) for name, weight in run.policy.model.state_dict().items())
    assert run.step == 0


def test_after_a_resume_the_saved_steps_stay(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_run(config(), out) as run:
        run.config = config(steps=1)
        train(run)
    halted = pytest.raises(TrainingHalted, match=r"step 2: the sampler's log-probs .*checkpoint of step 1 is intact")
    with halted, open_run(config(), resume=out) as run:
        run.engine = OtherLogprobs(run.engine, 0.25)
        train(run)
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-1"]
