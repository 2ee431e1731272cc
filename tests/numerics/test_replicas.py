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
from forkrl.parallel.replicas import Replica, Replicas, divide, open_replicas
from forkrl.rollout import EmbeddedEngine
from forkrl.training.update import update_policy
from forkrl.types import Prompt, RolloutGroup, SamplingParams, TokenBatch
from tests.models import random_policy
from tests.numerics.test_update import NUM_PROMPTS, make_batch, recipe

COUNT = 3


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    with Replicas(random_policy(), random_policy(seed=1), count=COUNT) as opened:
        yield opened


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return make_batch(random_policy())


def whereabouts(replica: Replica, item: int) -> tuple[int, int, float]:
    return os.getpid(), item, next(replica.policy.model.parameters())[0, 0].item()


class Unspeakable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("no pickling")


class Particular(Exception):
    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)


def misbehave(replica: Replica, item: str) -> None:
    if item == "raise":
        raise TrainingHalted("told to")
    if item == "raise what cannot travel":
        raise Unspeakable
    if item == "raise what does not come back":
        raise Particular("the reason", 1)
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def test_items_are_divided_among_processes_and_come_back_in_order(replicas: Replicas) -> None:
    answers = replicas.map(whereabouts, range(10))
    assert [item for _, item, _ in answers] == list(range(10))
    assert len({pid for pid, _, _ in answers}) == COUNT
    assert replicas.map(whereabouts, []) == []


def test_weights_changed_here_are_changed_there(replicas: Replicas) -> None:
    weight = next(replicas.policy.model.parameters())
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = 42.0
    assert {value for _, _, value in replicas.map(whereabouts, range(COUNT))} == {42.0}
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
def test_the_gradient_is_that_of_one_process(replicas: Replicas, batch: TokenBatch, sections: dict[str, Any]) -> None:
    config = recipe(micro_batch_tokens=100, **sections)
    own = Policy(copy.deepcopy(replicas.policy.model), replicas.policy.tokenizer)
    alone = Replicas(own, replicas.local.reference)
    expected = gradient(alone, batch, config)
    measured = gradient(replicas, batch, config)
    assert (measured - expected).norm() <= 1e-5 * expected.norm()
    assert gradient(replicas, batch, config).equal(measured), "the same to the bit, every time"


def gradient(replicas: Replicas, batch: TokenBatch, config: TrainConfig) -> torch.Tensor:
    optimizer = torch.optim.SGD(replicas.policy.model.parameters(), lr=0.0)
    update_policy(replicas, optimizer, batch, config, torch.Generator().manual_seed(5))
    gradients = [parameter.grad for parameter in replicas.policy.model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def sample(replicas: Replicas, max_sequences: int = 5) -> list[RolloutGroup]:
    engine = EmbeddedEngine(replicas, max_prompt_tokens=16, max_sequences=max_sequences)
    prompts = [Prompt(str(index), str(index) * (index + 1), "") for index in range(7)]
    return engine.generate(
        prompts, group_size=4, sampling=SamplingParams(20), generator=torch.Generator().manual_seed(0)
    )


def test_responses_are_the_policys_own_in_order_and_repeatable(replicas: Replicas) -> None:
    groups = sample(replicas)
    assert [group.prompt.id for group in groups] == [str(index) for index in range(7)]
    assert len({rollout.response_ids for group in groups for rollout in group.rollouts}) > 20
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.prompt_ids == tuple(replicas.policy.tokenizer.encode(group.prompt.text))
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            with torch.no_grad():
                logits_TV = replicas.policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
            expected = logits_TV.log_softmax(-1).gather(1, ids[0, len(rollout.prompt_ids) :, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs, expected, atol=1e-4, rtol=0)
    again = sample(replicas)
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
    with Replicas(policies[0], count=2) as replicas:
        measured, expected = gradient(replicas, batch, config), gradient(Replicas(policies[1]), batch, config)
    assert (measured - expected).norm() <= 1e-5 * expected.norm()


def test_a_parameter_that_no_loss_touches_has_no_gradient(batch: TokenBatch) -> None:
    policy = random_policy()
    unused = torch.nn.Parameter(torch.ones(3))
    policy.model.register_parameter("unused", unused)
    with Replicas(policy, count=2) as replicas:
        gradient(replicas, batch, recipe(micro_batch_tokens=100))
    assert unused.grad is None


def test_signals_to_every_process_are_for_the_first_to_answer(replicas: Replicas) -> None:
    others = {pid for pid, _, _ in replicas.map(whereabouts, range(COUNT))} - {os.getpid()}
    for pid in others:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert {pid for pid, _, _ in replicas.map(whereabouts, range(COUNT))} - {os.getpid()} == others


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("raise", "told to"),
        ("raise what cannot travel", "(?s)in a replica: .*no pickling"),
        ("raise what does not come back", "(?s)in a replica: .*the reason"),
        ("die", "a replica was killed by SIGKILL, as the system does when memory runs out"),
    ],
)
def test_what_goes_wrong_in_a_replica_is_told_here(item: str, message: str) -> None:
    with Replicas(random_policy(), count=2) as replicas:
        with pytest.raises((TrainingHalted, RuntimeError), match=message):
            replicas.map(misbehave, ["", item])
        with pytest.raises(RuntimeError, match="these replicas are closed"):
            replicas.map(misbehave, ["", ""])


def test_replicas_end_with_the_process_that_started_them() -> None:
    program = (
        "import time; from forkrl.parallel.replicas import Replicas; from tests.models import random_policy;"
        "from tests.numerics.test_replicas import whereabouts;"
        "print(Replicas(random_policy(), count=2).map(whereabouts, [0, 1])[1][0], flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        replica = int(process.stdout.readline())
        assert is_alive(replica)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while is_alive(replica):
        assert time.monotonic() < deadline, "it outlived its parent"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Running, or a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_largest_items_are_divided_first() -> None:
    assert divide([5, 1, 1, 4, 3], 2) == [[0, 1, 2], [3, 4]]
    assert divide([1, 1, 1], 5) == [[0], [1], [2], [], []]
    assert divide([], 2) == [[], []]


@pytest.mark.parametrize(
    ("settings", "count", "threads"),
    [
        ({"threads": 1}, 1, 1),
        ({"threads": 2, "replicas": 1}, 1, 2),
        ({"threads": 5, "replicas": 2}, 2, 2),
        ({"threads": 2}, 2, 1),
    ],
    ids=str,
)
def test_the_threads_are_divided_among_replicas(settings: dict[str, int], count: int, threads: int) -> None:
    before = torch.get_num_threads()
    with open_replicas(random_policy(), None, RuntimeConfig.model_validate(settings)) as replicas:
        assert (replicas.count, torch.get_num_threads()) == (count, threads)
    torch.set_num_threads(before)


def test_more_replicas_than_threads_are_refused() -> None:
    with pytest.raises(UserError, match=r"runtime.replicas = 3 is more than the number of threads, 2"):
        open_replicas(random_policy(), None, RuntimeConfig(threads=2, replicas=3))
