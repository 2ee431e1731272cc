"""Dynamic sampling on verl has an end, and every response that it drops is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from forkrl.errors import NothingToLearn, TrainingHalted
from tests.verl_here import needs_verl

pytestmark = needs_verl


class Queue:
    """A TransferQueue as far as the buffer looks: tags by key, and fields of trajectories."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Any]] = {}
        self.scores: dict[str, float] = {}

    def add_group(self, uid: str, scores: list[float], status: str = "finished") -> None:
        self.items[uid] = {"is_prompt": True, "status": status, "global_steps": 1}
        for session, score in enumerate(scores):
            key = f"{uid}_{session}_0"
            self.items[key] = {"response_len": 3}
            self.scores[key] = score

    def kv_list(self) -> dict[str, dict[str, Any]]:
        return {"train": {key: dict(tag) for key, tag in self.items.items()}}

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, list[Any]]:
        assert select_fields == ["extra_fields"]
        return {"extra_fields": [{"reward_extra_info": {"score": self.scores[key]}} for key in keys]}

    def kv_clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            self.items.pop(key, None)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    import verl.trainer.ppo.v1.replay_buffer as module

    queue = Queue()
    for name in ("kv_list", "kv_batch_get", "kv_clear"):
        monkeypatch.setattr(module.tq, name, getattr(queue, name), raising=False)
    return queue


def open_buffer(
    refill: Callable[[int], int], dropped: list[str], stall_timeout_s: float = 60.0, *, ahead: bool = False
) -> Any:
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

    from forkrl.cluster.replay import BoundedReplayBuffer, BoundedReplayBufferAsync

    verls = (ReplayBufferAsync if ahead else ReplayBuffer)(
        "colocate_async" if ahead else "sync", {}, 8, "drop", {},
        refill_fn=refill, filter_groups_metric="score", train_batch_size=2, gen_batch_size=1,
        sync_refill_failed_groups=True,
    )  # fmt: skip
    return (BoundedReplayBufferAsync if ahead else BoundedReplayBuffer).replacing(
        verls,
        poll_interval=0.001,
        stall_timeout_s=stall_timeout_s,
        on_drop=dropped.extend,
        on_validation=lambda batch: None,
    )


def spent(number: int) -> int:
    from forkrl.cluster.replay import PromptsSpent

    raise PromptsSpent("nothing to learn: all the same")


def test_a_full_step_is_sampled_as_verl_does_and_the_rest_is_told(queue: Queue) -> None:
    dropped: list[str] = []
    buffer = open_buffer(spent, dropped)
    queue.add_group("a", [0.0, 1.0])
    queue.add_group("b", [1.0, 0.0])
    queue.add_group("c", [1.0, 0.0])
    batch, _ = buffer.sample(1, "train", 2)
    assert len(batch.keys) == 4
    assert {key[0] for key in batch.keys} | {key[0] for key in dropped} == {"a", "b", "c"}
    assert len(dropped) == 2  # the group too many


def test_with_its_prompts_spent_a_step_takes_what_there_is(queue: Queue) -> None:
    dropped: list[str] = []
    buffer = open_buffer(spent, dropped)
    queue.add_group("a", [0.0, 0.0])
    queue.add_group("b", [1.0, 0.0])
    batch, _ = buffer.sample(1, "train", 2)
    assert sorted(batch.keys) == ["b_0_0", "b_1_0"]
    assert sorted(dropped) == ["a_0_0", "a_1_0"]


def test_with_nothing_at_hand_the_run_ends_with_a_sentence(queue: Queue) -> None:
    buffer = open_buffer(spent, [])
    queue.add_group("a", [0.0, 0.0])
    queue.add_group("b", [1.0, 1.0])
    with pytest.raises(NothingToLearn, match="all the same"):
        buffer.sample(1, "train", 2)


def test_prompts_are_drawn_until_the_step_is_full(queue: Queue) -> None:
    names = iter("cdefgh")

    def refill(number: int) -> int:
        for _ in range(number):
            queue.add_group(next(names), [0.0, 1.0])
        return number

    queue.add_group("a", [0.0, 0.0])
    queue.add_group("b", [1.0, 0.0])
    batch, _ = open_buffer(refill, []).sample(1, "train", 2)
    assert len({key[0] for key in batch.keys}) == 2


def test_a_step_in_which_nothing_moves_ends_the_run(queue: Queue) -> None:
    buffer = open_buffer(spent, [], stall_timeout_s=0.05)
    queue.add_group("a", [], status="running")
    with pytest.raises(TrainingHalted, match=r"0.05 s, and 1 prompts wait.*cluster.stall_timeout_s"):
        buffer.sample(1, "train", 2)


@pytest.mark.parametrize("ahead", [False, True])
def test_where_every_group_fails_the_step_ends(queue: Queue, ahead: bool) -> None:
    names = iter(range(10**6))

    def refill(number: int) -> int:
        for _ in range(number):
            queue.add_group(f"x{next(names)}", [], status="failure")
        assert next(names) < 1000, "for ever"
        return number

    refill(2)
    with pytest.raises(RuntimeError, match="could not be sampled or judged"):
        open_buffer(refill, [], ahead=ahead).sample(1, "train", 2)


def test_failures_are_not_taken_for_wrong_answers(queue: Queue) -> None:
    queue.add_group("a", [], status="failure")
    queue.add_group("b", [0.0, 0.0])
    with pytest.raises(NothingToLearn, match="all the same; 1 of the prompts could not be sampled or judged"):
        open_buffer(spent, []).sample(1, "train", 2)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_group_that_lost_a_response_is_replaced(queue: Queue, ahead: bool) -> None:
    def refill(number: int) -> int:
        queue.add_group("c", [0.0, 1.0])
        return number

    dropped: list[str] = []
    queue.add_group("a", [1.0], status="failure")
    queue.add_group("b", [1.0, 0.0])
    batch, _ = open_buffer(refill, dropped, ahead=ahead).sample(1, "train", 2)
    assert {key[0] for key in batch.keys} == {"b", "c"} and dropped == ["a_0_0"]
