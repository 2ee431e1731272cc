"""Several processes on the same weights do what one does, and end when they should."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.config import ModelConfig, RuntimeConfig, TrainConfig
from forkrl.errors import TrainingHalted, UserError
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.workers import Worker, Workers, divide, open_workers
from forkrl.rollout import EmbeddedEngine
from forkrl.training.update import update_policy
from forkrl.types import Counts, Prompt, RolloutGroup, SamplingParams, TokenBatch
from tests.models import random_policy
from tests.numerics.test_update import NUM_PROMPTS, make_batch, recipe
from tests.processes import is_running, wait_until

COUNT = 3


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(random_policy(), random_policy(seed=1), count=COUNT) as opened:
        yield opened


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return make_batch(random_policy())


def whereabouts(worker: Worker, item: int) -> tuple[int, int, float]:
    return os.getpid(), item, next(worker.policy.model.parameters())[0, 0].item()


class Unspeakable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("no pickling")


class Particular(Exception):
    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)


def misbehave(worker: Worker, item: str) -> None:
    if item == "raise":
        raise TrainingHalted("told to")
    if item == "raise what cannot travel":
        raise Unspeakable
    if item == "raise what does not come back":
        raise Particular("the reason", 1)
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def test_items_are_divided_among_processes_and_come_back_in_order(workers: Workers) -> None:
    answers = workers.map(whereabouts, range(10))
    assert [item for _, item, _ in answers] == list(range(10))
    assert len({pid for pid, _, _ in answers}) == COUNT
    assert workers.map(whereabouts, []) == []


def test_weights_changed_here_are_changed_there(workers: Workers) -> None:
    weight = next(workers.policy.model.parameters())
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = 42.0
    assert {value for _, _, value in workers.map(whereabouts, range(COUNT))} == {42.0}
    with torch.no_grad():
        weight[0, 0] = before


FORKS_ONLY = {"mini_batch_prompts": NUM_PROMPTS, "micro_batch_tokens": 100, "backward": "forks_only"}
SECTIONS: list[dict[str, Any]] = [
    {"selection": {"scope": "mini_batch"}},
    {"selection": {"scope": "micro_batch"}, "loss": {"kl_coef": 0.1, "entropy_coef": 0.01}},
    {"selection": {"rule": "random"}, "loss": {"denominator": "response"}},
    {"selection": {"scope": "mini_batch"}, "training": FORKS_ONLY, "forks_only": {"sampled": 0.3}},
    {"selection": {"scope": "micro_batch"}, "training": FORKS_ONLY, "forks_only": {"projections": True}},
]


@pytest.mark.parametrize("sections", SECTIONS, ids=str)
def test_the_gradient_is_that_of_one_process(workers: Workers, batch: TokenBatch, sections: dict[str, Any]) -> None:
    config = recipe(micro_batch_tokens=100, **sections)
    own = Policy(copy.deepcopy(workers.policy.model), workers.policy.tokenizer)
    alone = Workers(own, workers.local.reference)
    expected = gradient(alone, batch, config)
    measured = gradient(workers, batch, config)
    assert (measured - expected).norm() <= 1e-5 * expected.norm()
    assert gradient(workers, batch, config).equal(measured), "the same to the bit, every time"


def gradient(workers: Workers, batch: TokenBatch, config: TrainConfig) -> torch.Tensor:
    optimizer = torch.optim.SGD(workers.policy.model.parameters(), lr=0.0)
    update_policy(workers, optimizer, batch, config, torch.Generator().manual_seed(5))
    gradients = [parameter.grad for parameter in workers.policy.model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def sample(workers: Workers, max_sequences: int = 5) -> list[RolloutGroup]:
    engine = EmbeddedEngine(workers, max_prompt_tokens=16, max_sequences=max_sequences)
    prompts = [Prompt(str(index), str(index) * (index + 1), "") for index in range(7)]
    return engine.generate(
        prompts, group_size=4, sampling=SamplingParams(20), generator=torch.Generator().manual_seed(0)
    )


def test_counts_are_of_all_workers(workers: Workers) -> None:
    before, finished = workers.counts, workers.sequences_finished
    lengths = [len(rollout) for group in sample(workers) for rollout in group.rollouts]
    done = Counts(*((now - then) * COUNT for now, then in zip(workers.counts, before, strict=True)))
    assert workers.sequences_finished - finished == len(lengths)
    assert done.finished == done.begun == pytest.approx(len(lengths))
    assert done.tokens == pytest.approx(sum(lengths))
    assert done.room == pytest.approx(0)
    assert max(lengths) <= done.steps <= sum(lengths)
    assert min(done.reading_ns, done.working_ns) > 0


def test_responses_are_the_policys_own_in_order_and_repeatable(workers: Workers) -> None:
    groups = sample(workers)
    assert [group.prompt.id for group in groups] == [str(index) for index in range(7)]
    assert len({rollout.response_ids for group in groups for rollout in group.rollouts}) > 20
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.prompt_ids == tuple(workers.policy.tokenizer.encode(group.prompt.text))
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            with torch.no_grad():
                logits_TV = workers.policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
            expected = logits_TV.log_softmax(-1).gather(1, ids[0, len(rollout.prompt_ids) :, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs, expected, atol=1e-4, rtol=0)
    again = sample(workers)
    assert [[rollout.response_ids for rollout in group.rollouts] for group in groups] == [
        [rollout.response_ids for rollout in group.rollouts] for group in again
    ]


def test_layers_recomputed_in_the_backward_pass(batch: TokenBatch, tmp_path: Path) -> None:
    made = random_policy()
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    config = recipe(micro_batch_tokens=100)
    policies = [
        open_policy(ModelConfig(path=str(tmp_path), gradient_checkpointing=flag), "cpu") for flag in (True, False)
    ]
    with Workers(policies[0], count=2) as workers:
        measured, expected = gradient(workers, batch, config), gradient(Workers(policies[1]), batch, config)
    assert (measured - expected).norm() <= 1e-5 * expected.norm()


def test_a_parameter_that_no_loss_touches_has_no_gradient(batch: TokenBatch) -> None:
    policy = random_policy()
    unused = torch.nn.Parameter(torch.ones(3))
    policy.model.register_parameter("unused", unused)
    with Workers(policy, count=2) as workers:
        gradient(workers, batch, recipe(micro_batch_tokens=100))
    assert unused.grad is None


def test_signals_to_every_process_are_for_the_first_to_answer(workers: Workers) -> None:
    others = {pid for pid, _, _ in workers.map(whereabouts, range(COUNT))} - {os.getpid()}
    for pid in others:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert {pid for pid, _, _ in workers.map(whereabouts, range(COUNT))} - {os.getpid()} == others


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("raise", "told to"),
        ("raise what cannot travel", "(?s)in a worker: .*no pickling"),
        ("raise what does not come back", "(?s)in a worker: .*the reason"),
        ("die", "a worker was killed by SIGKILL, as the system does when memory runs out"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told_here(item: str, message: str) -> None:
    with Workers(random_policy(), count=2) as workers:
        with pytest.raises((TrainingHalted, RuntimeError), match=message):
            workers.map(misbehave, ["", item])
        with pytest.raises(RuntimeError, match="these workers are closed"):
            workers.map(misbehave, ["", ""])


def test_workers_end_with_the_process_that_started_them() -> None:
    program = (
        "import time; from forkrl.parallel.workers import Workers; from tests.models import random_policy;"
        "from tests.numerics.test_workers import whereabouts;"
        "print(Workers(random_policy(), count=2).map(whereabouts, [0, 1])[1][0], flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert is_running(worker)
        process.kill()
        process.wait()
    assert wait_until(lambda: not is_running(worker), limit_s=60), "it outlived its parent"


def test_the_largest_items_are_divided_first() -> None:
    assert divide([5, 1, 1, 4, 3], 2) == [[0, 1, 2], [3, 4]]
    assert divide([1, 1, 1], 5) == [[0], [1], [2], [], []]
    assert divide([], 2) == [[], []]


@pytest.mark.parametrize(
    ("settings", "count", "threads"),
    [
        ({"threads": 1}, 1, 1),
        ({"threads": 2, "workers": 1}, 1, 2),
        ({"threads": 5, "workers": 2}, 2, 2),
        ({"threads": 2}, 2, 1),
    ],
    ids=str,
)
def test_the_threads_are_divided_among_workers(settings: dict[str, int], count: int, threads: int) -> None:
    before = torch.get_num_threads()
    with open_workers(random_policy(), None, RuntimeConfig.model_validate(settings)) as workers:
        assert (workers.count, torch.get_num_threads()) == (count, threads)
    torch.set_num_threads(before)


def test_more_workers_than_threads_are_refused() -> None:
    with pytest.raises(UserError, match=r"runtime.workers = 3 is more than the number of threads, 2"):
        open_workers(random_policy(), None, RuntimeConfig(threads=2, workers=3))
