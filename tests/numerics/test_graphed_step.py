"""The buffers of a step of fixed shapes, and how it becomes a graph; CUDA stands in for itself where it is named."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forkrl.rollout import graphed_step
from forkrl.rollout.graphed_step import Capture, GraphedStep, bucket
from forkrl.store.interruption import Interrupted, Interruption
from tests.models import random_policy


def test_buckets_hold_what_they_must_and_little_more() -> None:
    """At most 63 tokens (7 rows) more, or a quarter where that is more."""
    assert [bucket(number, 64) for number in (1, 64, 65, 129, 193, 257, 321)] == [64, 64, 128, 192, 256, 320, 384]
    assert sorted({bucket(number, 8) for number in range(1, 257)}) == [
        8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256,
    ]  # fmt: skip
    for least in (8, 64):
        for number in range(1, 5000):
            assert 0 <= bucket(number, least) - number <= max(least - 1, number / 4)
            assert bucket(bucket(number, least), least) == bucket(number, least)


def make_step(num_sequences: int, capacity: int) -> GraphedStep:
    with torch.no_grad():
        return GraphedStep(random_policy(), num_sequences, capacity)


def test_buffers_are_the_next_bucket_of_rows_and_of_whole_sixty_fours_of_tokens() -> None:
    step = make_step(17, 257)
    assert [buffer.shape for buffer in step.buffers] == [(2, 24, 2, 320, 8)] * 2
    assert step.capacity == 320 and step.bias_ST.shape == (24, 320)
    assert step.tokens_S.shape == step.position_S.shape == (24,) and step.hidden_SD.shape == (24, 32)
    assert make_step(16, 320).buffers[0].shape == (2, 16, 2, 320, 8)
    assert make_step(9, 641).capacity == 704, "not a bucket, which would be 768: no step reads beyond it"


class Copied(TorchDispatchMode):
    """Notes the shapes of what is copied into rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "index_copy" in func.name():
            self.shapes.append(tuple(args[3].shape))
        return func(*args, **(kwargs or {}))


def test_only_rows_that_are_not_in_their_place_are_copied_and_of_them_what_is_filled() -> None:
    step = make_step(16, 192)
    step.rows, step.length = 16, 70
    with Copied() as copied:
        step.keep([0, 9, 2, 3, 15, 5, 6, 7])
    assert copied.shapes == [(2, 2, 2, 70, 8)] * 2 + [(2, 192), (2,)], "keys and values of two layers, mask, positions"
    with Copied() as copied:
        step.keep(range(8))
    assert copied.shapes == [] and step.rows == 8


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What happens to a stand-in for CUDA, in order."""
    events: list[Any] = []

    @contextmanager
    def graph(graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        events.append("begin")
        yield
        events.append("end")

    def make_stream(device: torch.device) -> Any:
        events.append(("stream", device))
        return SimpleNamespace(wait_stream=lambda other: None)

    cuda = SimpleNamespace(
        Stream=make_stream, graph_pool_handle=lambda: (0, 1), graph=graph, device=nullcontext, stream=nullcontext,
        current_stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: events.append("replay")),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", cuda)
    graphed_step._capture_stream.cache_clear()
    yield events
    graphed_step._capture_stream.cache_clear()


def test_all_captures_of_a_device_take_one_stream(events: list[Any]) -> None:
    devices = [torch.device("cuda", index) for index in (0, 1)]
    captures = [Capture(device) for device in (devices[0], devices[0], devices[1])]
    assert captures[0].stream is captures[1].stream is not captures[2].stream
    assert events == [("stream", device) for device in devices]


def test_a_step_runs_once_before_its_capture_and_once_in_it(events: list[Any]) -> None:
    replay = Capture(torch.device("cuda", 0))(lambda: events.append("run"))
    replay()
    assert events[1:] == ["run", "begin", "run", "end", "replay"]


def test_ctrl_c_waits_for_the_end_of_a_capture(events: list[Any]) -> None:
    def run() -> None:
        if events[-1] == "begin":
            signal.raise_signal(signal.SIGINT)
        events.append("run")

    with Interruption() as interruption, pytest.raises(Interrupted), interruption.allowed():
        Capture(torch.device("cuda", 0))(run)
    assert events[1:] == ["run", "begin", "run", "end"]
