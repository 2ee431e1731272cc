"""Rollouts of a real environment of the verifiers package, in its own process."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.method.batches import collate
from forkrl.model.stop_tokens import response_text
from forkrl.rollout import environment as coordinator
from forkrl.rollout.logprob_gap import logprob_gap
from forkrl.tasks.environment import environment_task
from forkrl.training import loop
from forkrl.training.open_run import open_run
from forkrl.training.run import Run
from forkrl.types import RolloutGroup, SamplingParams, TokenBatch
from tests.models import random_policy
from tests.unit.test_dialogue import EOS, chat_tokenizer

if importlib.util.find_spec("verifiers") is None:
    pytest.skip("needs the verifiers package: pip install 'forkrl[environments]'", allow_module_level=True)

ENVIRONMENT = """
import asyncio, time
import verifiers.v1 as vf

class Digit(vf.TaskData):
    digit: int
    score: float

class DigitTask(vf.Task[Digit, vf.State]):
    @vf.reward
    async def even(self, trace) -> float:
        replies = [message.content or "" for message in trace.messages if message.role == "assistant"]
        return self.data.score if self.data.score >= 0 else float(sum(map(len, replies)) % 2)

class DigitsConfig(vf.TasksetConfig):
    score: float = -1.0

class Digits(vf.Taskset[DigitTask, DigitsConfig]):
    def load(self):
        for digit in range(10):
            yield DigitTask(Digit(prompt=f"{digit}", digit=digit, score=self.config.score), self.config.task)

class TwoTurnsConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    hang: str = ""

class TwoTurns(vf.Env[TwoTurnsConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as talk:
            first = await talk.turn()
            if self.config.hang == "sleep" and task.data.digit % 2:
                time.sleep(1000)
            if self.config.hang == "await" and task.data.digit % 2:
                await asyncio.sleep(1000)
            if not first.terminated:
                await talk.turn(f"{task.data.digit}{task.data.digit}")

__all__ = ["Digits", "TwoTurns"]
"""


OTHERS = """
import os, random
import verifiers.v1 as vf

class Number(vf.TaskData):
    number: int

class NumberTask(vf.Task[Number, vf.State]):
    @vf.reward
    async def right(self, trace) -> float:
        return 0.0

class NumbersConfig(vf.TasksetConfig):
    shuffled: bool = False

class Numbers(vf.Taskset[NumberTask, NumbersConfig]):
    def load(self):
        numbers = list(range(24))
        if self.config.shuffled:
            random.Random(os.getpid()).shuffle(numbers)
        for number in numbers:
            yield NumberTask(Number(prompt=f"{number // 4}", number=number), self.config.task)

class OneTurnConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()

class OneTurn(vf.Env[OneTurnConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as talk:
            await talk.turn()

__all__ = ["Numbers", "OneTurn"]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A random chat model; the environment's module can be imported."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "two_turns.py").write_text(ENVIRONMENT)
    (folder / "numbers_of_four.py").write_text(OTHERS)
    tokenizer = chat_tokenizer()
    policy = random_policy(vocab_size=len(tokenizer), sharpness=5.0)
    policy.model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield str(folder / "model")


def recipe(model: str, *, args: dict[str, Any] | None = None, **sections: Any) -> TrainConfig:
    task = {"name": "environment", "environment": "two_turns", "held_out_rows": 2, "environment_args": args or {}}
    defaults: dict[str, Any] = {
        "model": {"path": model},
        "task": {**task, "max_turn_tokens": 6},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_prompt_tokens": 16, "max_response_tokens": 24},
        "reward": {"overlong_cache": 0, "timeout_s": 60},
        "dynamic_sampling": {"enabled": False},
        "selection": {"rule": "all"},
        "training": {"steps": 1, "mini_batch_prompts": 2, "micro_batch_tokens": 512},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
        "eval": {"problems": 2},
        "runtime": {"device": "cpu"},
    }
    return TrainConfig.model_validate({**defaults, **sections})


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with open_run(recipe(model), tmp_path_factory.mktemp("run") / "run") as run:
        yield run


@pytest.fixture(scope="module")
def groups(run: Run) -> list[RolloutGroup]:
    return sample(run)


def sample(run: Run, seed: int = 0) -> list[RolloutGroup]:
    generator = torch.Generator().manual_seed(seed)
    sampling = SamplingParams(max_response_tokens=24)
    return run.engine.generate(run.task.train[:2], group_size=4, sampling=sampling, generator=generator)


def test_tokens_and_mask_are_those_of_the_conversation(run: Run, groups: list[RolloutGroup]) -> None:
    tokenizer = run.policy.tokenizer
    for group in groups:
        digit = group.prompt.question
        for rollout in group.rollouts:
            assert tokenizer.decode(list(rollout.prompt_ids)) == f"?{digit}!"
            between = [place for place, written in enumerate(rollout.written) if not written]
            assert between == list(range(between[0], between[-1] + 1)), "one message of the user, in one piece"
            first, added = rollout.response_ids[: between[0]], rollout.response_ids[between[0] : between[-1] + 1]
            ended = first[-1] == EOS
            assert len(first) == 6 or ended
            assert tokenizer.decode(list(added)) == ("" if ended else "<eos>") + f"?{digit}{digit}!"
            assert len(rollout) == rollout.written.count(True) == len(rollout.logprobs)


def test_each_rollout_has_its_own_score(run: Run, groups: list[RolloutGroup]) -> None:
    """The environment scores whether the model wrote an odd number of characters."""
    scores = set()
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        length, start = 0, 0
        for written, part in groupby(rollout.written):
            ids = rollout.response_ids[start : (start := start + len(list(part)))]
            length += len(response_text(run.policy.tokenizer, ids, finished=ids[-1] == EOS)) if written else 0
        assert rollout.result is not None and not rollout.result.failure
        assert rollout.result.score == length % 2
        scores.add(rollout.result.score)
    assert scores == {0.0, 1.0}


def batch_of(run: Run, groups: list[RolloutGroup]) -> TokenBatch:
    advantages_PG = torch.linspace(-1, 1, 8).view(2, 4)
    return collate(groups, advantages_PG, pad_id=run.policy.tokenizer.eos_token_id)


def test_log_probs_equal_those_of_one_pass(run: Run, groups: list[RolloutGroup]) -> None:
    assert logprob_gap(run.policy, batch_of(run, groups), 1.0).max < 1e-4


def test_the_gradient_does_not_depend_on_masked_targets(run: Run, groups: list[RolloutGroup]) -> None:
    batch = batch_of(run, groups)
    other = TokenBatch(
        batch.input_ids, torch.where(batch.response_mask, batch.targets, 7), *list(batch_fields(batch))[2:]
    )
    weights = {name: value.clone() for name, value in run.policy.model.state_dict().items()}
    metrics = []
    for each in (batch, other):
        metrics.append(loop.take_gradient_step(run, each, done=0.0).metrics)
        run.policy.model.load_state_dict(weights)
        run.optimizer.state.clear()
    lengths_B = batch.response_mask.sum(1)
    by_hand = -float((batch.advantages * lengths_B).sum() / lengths_B.sum())  # all ratios are 1
    assert metrics[0]["loss/policy"] == pytest.approx(by_hand, abs=1e-5)
    assert metrics[0]["grad/norm"] == metrics[1]["grad/norm"] > 0


def batch_fields(batch: TokenBatch) -> Iterator[Any]:
    return (getattr(batch, name) for name in batch.__slots__)


def test_the_same_seed_gives_the_same_rollouts(run: Run, groups: list[RolloutGroup]) -> None:
    again, other = sample(run), sample(run, seed=1)
    ids, repeated, others = ([each.response_ids for group in found for each in group.rollouts]
                             for found in (groups, again, other))  # fmt: skip
    assert ids == repeated != others


def weights_after(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints/step-2/model.safetensors")


def test_a_resumed_run_ends_with_the_same_weights(model: str, tmp_path: Path) -> None:
    training = {"steps": 2, "mini_batch_prompts": 2, "micro_batch_tokens": 512}
    with open_run(recipe(model, training=training), tmp_path / "whole") as whole:
        loop.train(whole)
    with open_run(recipe(model), tmp_path / "parts") as part:
        loop.train(part)
    with Run.resume(tmp_path / "parts", {"training.steps": 2}) as rest:
        loop.train(rest)
    first, second = weights_after(tmp_path / "whole"), weights_after(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert all(line["verifier/failures"] == 0 for line in lines if "verifier/failures" in line)


@pytest.mark.parametrize(("hang", "others"), [("await", {""}), ("sleep", {"crash", "timeout"})])
def test_a_hanging_environment_is_ended_and_counted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang: str, others: set[str]
) -> None:
    monkeypatch.setattr(coordinator, "GRACE_S", 3.0)
    config = recipe(model, args={"hang": hang}, reward={"overlong_cache": 0, "timeout_s": 20})
    with open_run(config, tmp_path / "run") as run:
        prompts = [next(each for each in run.task.train if int(each.question) % 2 == odd) for odd in (0, 1)]
        sampling, generator = SamplingParams(max_response_tokens=24), torch.Generator().manual_seed(0)
        groups = run.engine.generate(prompts, group_size=2, sampling=sampling, generator=generator)
        assert "timeout" in run.verifier.first_failures
    for group in groups:
        failures = {rollout.result.failure for rollout in group.rollouts if rollout.result}
        assert failures <= ({"timeout"} if int(group.prompt.question) % 2 else others)


def test_a_score_outside_of_0_to_1_is_a_failure(model: str, tmp_path: Path) -> None:
    with open_run(recipe(model, args={"taskset": {"score": 2.0}}), tmp_path / "run") as run:
        [first, _] = sample(run)
        assert {rollout.result.failure for rollout in first.rollouts if rollout.result} == {"error"}
        assert "its reward is 2.0, not a number in [0, 1]" in run.verifier.first_failures["error"]


def of_numbers(model: str, **args: Any) -> TrainConfig:
    config = recipe(model, args=args)
    return config.model_copy(update={"task": config.task.model_copy(update={"environment": "numbers_of_four"})})


def test_tasks_with_the_same_first_message_are_held_out_together(model: str) -> None:
    task = environment_task(of_numbers(model).task, chat_tokenizer())
    assert len(task.held_out) == 2 and len(task.train) == 20
    assert not {prompt.text for prompt in task.held_out} & {prompt.text for prompt in task.train}


def test_a_taskset_in_another_order_each_time_is_refused(model: str, tmp_path: Path) -> None:
    config = of_numbers(model, taskset={"shuffled": True})
    with open_run(config, tmp_path / "run") as run, pytest.raises(UserError, match="in another order, each time"):
        sample(run)


def test_settings_that_forkrl_makes_itself_are_refused(model: str, tmp_path: Path) -> None:
    config = recipe(model, args={"player": {"sampling": {"temperature": 0.1}}})
    refused = pytest.raises(UserError, match=r"environment_args.player.sampling is set by ForkRL; remove it")
    with refused, open_run(config, tmp_path / "run"):
        pass


def test_requests_do_not_go_to_a_proxy(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NO_PROXY", "example.org")
    with open_run(recipe(model), tmp_path / "run") as run:
        groups = sample(run)
        assert run.verifier.first_failures == {}
    assert all(rollout.result and not rollout.result.failure for group in groups for rollout in group.rollouts)


def test_a_conversation_that_cannot_be_continued_fails_alone(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(recipe(model), tmp_path / "run") as run:
        heard, calls = run.engine._heard, list[int]()  # type: ignore[attr-defined]

        def once(dialogue: Any, *request: Any) -> Any:
            calls.append(len(dialogue))
            if calls[-1] and sum(map(bool, calls)) == 1:  # the first second turn
                raise UserError("the chat template changes earlier turns")
            return heard(dialogue, *request)

        monkeypatch.setattr(run.engine, "_heard", once)
        groups = sample(run)
        failures = [rollout.result.failure for group in groups for rollout in group.rollouts if rollout.result]
        assert sorted(failures) == [""] * 7 + ["error"]
        assert "changes earlier turns" in run.verifier.first_failures["error"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such_module", "cannot be used: .*not found"), ("two_turns", "cannot be used: .*nothing")],
)
def test_what_cannot_be_opened_is_refused(model: str, tmp_path: Path, name: str, message: str) -> None:
    config = recipe(model, args={} if name == "no_such_module" else {"nothing": 1})
    task = config.task.model_copy(update={"environment": name})
    with pytest.raises(UserError, match=message), open_run(config.model_copy(update={"task": task}), tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
