"""Training from Python: plug-ins, the callback, resuming, and results as data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import forkrl
from forkrl.errors import UserError
from forkrl.rollout import open_engine
from forkrl.types import Prompt, VerifierResult

SETTINGS = (
    "training.steps=2", "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_prompt_tokens=64",
    "rollout.max_response_tokens=8", "reward.overlong_cache=0", "dynamic_sampling.enabled=false",
    "training.mini_batch_prompts=2", "training.micro_batch_tokens=512", "eval.problems=2", "runtime.device=cpu",
    "runtime.workers=1", "log.rollouts_every=1",
)  # fmt: skip


class LengthVerifier:
    """The longer the better: a verifier that is an object."""

    first_failures: Mapping[str, str] = {}

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
        return [VerifierResult(min(1.0, len(text) / 10)) for _, text in items]

    def submit(self, items: Sequence[tuple[Prompt, str]]) -> Future[list[VerifierResult]]:
        future: Future[list[VerifierResult]] = Future()
        future.set_result(self.verify(items))
        return future


class ListTracker:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True


def test_a_run_with_plug_ins_and_its_results(tmp_path: Path) -> None:
    tracker, engines, seen = ListTracker(), [], []

    def engine(workers: Any, config: forkrl.TrainConfig) -> forkrl.RolloutEngine:
        engines.append(open_engine(workers, config))
        return engines[0]

    results = forkrl.train(
        forkrl.load_recipe(None, *SETTINGS),
        tmp_path / "run",
        verifier=LengthVerifier(),
        tracker=tracker,
        engine=engine,
        on_step=lambda run, metrics: seen.append((run.step, metrics["reward/mean"])),
    )
    assert [step for step, _ in seen] == [1, 2] and len(engines) == 1
    assert tracker.closed and set(tracker.steps) == {0, 1, 2}
    assert results.metrics["reward/mean"].dropna().tolist() == pytest.approx([reward for _, reward in seen])
    assert {"eval/accuracy", "loss/policy"} <= set(results.metrics.columns)
    rollouts = results.rollouts("train-000002")
    assert len(rollouts) == 4
    assert rollouts["score"].tolist() == pytest.approx([min(1.0, len(text) / 10) for text in rollouts["response"]])


def test_a_task_of_the_callers_own(tmp_path: Path) -> None:
    prompts = tuple(Prompt(f"own-{number}", f"{number} {number + 1} {number + 2} = ", "") for number in range(4))
    task = forkrl.Task("own", prompts, prompts[:1], verifiers={}, fingerprint="own")
    results = forkrl.train(forkrl.load_recipe(None, *SETTINGS), tmp_path / "run", task=task, verifier=LengthVerifier())
    assert set(results.rollouts("train-000001")["prompt_id"]) <= {prompt.id for prompt in prompts}


def test_resuming_from_python(tmp_path: Path) -> None:
    forkrl.train(forkrl.load_recipe(None, *SETTINGS), tmp_path / "run", verifier=LengthVerifier())
    with forkrl.Run.resume(tmp_path / "run", {"training.steps": 3}, verifier=LengthVerifier()) as run:
        assert run.step == 2 and run.config.training.steps == 3
    with pytest.raises(UserError, match="optimizer.lr: .* -> 0.5"):
        forkrl.Run.resume(tmp_path / "run", {"optimizer.lr": 0.5}).__enter__()
    with pytest.raises(UserError, match="training.step is not a setting; did you mean training.steps"):
        forkrl.Run.resume(tmp_path / "run", {"training.step": 3})
