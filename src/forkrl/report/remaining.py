"""Seconds left of sampling and measuring responses, from counters that the workers advance."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from forkrl.types import Counts

if TYPE_CHECKING:  # avoids importing torch
    from forkrl.parallel.workers import Workers

STEP_TOKENS = 40
"""Cost of a decoding step apart from its sequences, in tokens of one sequence; 15 to 80 on a CPU."""
PRIOR_ENDED, PRIOR_LENGTH = 0.2, 0.1
"""Assumed before any response has ended: ended ones per response, and their length relative to the limit."""
SAMPLING, MEASURING = "sampling responses", "measuring tokens"
MEASURING_COST = 0.5
"""Time to measure a response relative to sampling it; 0.3 to 0.7 on a CPU."""


class SamplingTime:
    """Seconds until ``total`` responses are sampled, ``wave`` at once; None if unknown.

    The last sequences of a wave take almost as long a step as many, so steps count, not only tokens. Every token is
    assumed to end a response with the rate seen so far. All figures are of the average worker.
    """

    def __init__(self, workers: Workers, total: int, wave: int) -> None:
        self._workers, self._before = workers, workers.counts
        self._total, self._wave = total / workers.count, wave / workers.count

    def finished(self) -> int:
        return round(_since(self._before, self._workers).finished * self._workers.count)

    def __call__(self) -> float | None:
        done = _since(self._before, self._workers)
        if done.finished >= self._total:
            return 0.0
        if not done.working_ns:  # the first prompts are being read, or the engine does not count
            return None
        steps, tokens = _left_of_wave(done)
        waiting = max(self._total - done.begun, 0.0)
        steps += (done.steps + steps) / math.ceil(done.begun / self._wave) * math.ceil(waiting / self._wave)
        tokens += (done.tokens + tokens) / done.begun * waiting
        decoding = done.working_ns / _cost(done.steps, done.tokens) * _cost(steps, tokens)
        return 1e-9 * (decoding + done.reading_ns / done.begun * waiting)


def _cost(steps: float, tokens: float) -> float:
    return STEP_TOKENS * steps + tokens


def _left_of_wave(done: Counts) -> tuple[float, float]:
    """Steps until the last unfinished response ends (the median), and expected tokens of all of them."""
    going = done.begun - done.finished
    if going <= 0 or not done.room:
        return 0.0, 0.0
    room, ended = done.room / going, PRIOR_ENDED * done.begun
    rate = (done.finished + ended) / (done.tokens + ended * PRIOR_LENGTH * room)
    last = -math.log(-math.expm1(-math.log(2) / going)) / rate
    return min(last, room), going * -math.expm1(-rate * room) / rate


def _since(before: Counts, workers: Workers) -> Counts:
    return Counts(*map(operator.sub, workers.counts, before))


class PartWork:
    """How far the parts of a command are, in responses: each part passes through the same stages.

    ``costs``: time of every stage relative to the others, assumed until a part has shown it.
    """

    def __init__(self, workers: Workers, total: int, costs: Mapping[str, float]) -> None:
        self.total, self.stage = total, next(iter(costs))
        self._workers, self._costs = workers, costs
        self._past: dict[str, float] = {}  # seconds of finished stages of this part
        self._done, self._seconds, self._size = 0, 0.0, 0  # responses and seconds of finished parts; of this part
        self._before, self._sequences, self._began = 0, 1, time.monotonic()
        self._stage_left: Callable[[], float | None] = lambda: None

    @contextmanager
    def part(self, size: int) -> Iterator[None]:
        """A part of ``size`` responses."""
        self._size, self._stage_left = size, lambda: None
        yield
        self._seconds, self._done = self._seconds + sum(self._past.values()), self._done + size
        self._costs, self._past, self._size, self._stage_left = self._past, {}, 0, lambda: None

    def sampling(self, stage: str, sequences: int, wave: int) -> AbstractContextManager[None]:
        return self._in_stage(stage, sequences, SamplingTime(self._workers, sequences, wave))

    def measuring(self, tokens: int) -> AbstractContextManager[None]:
        """All responses of the part are measured; ``tokens``: theirs and their prompts'."""
        before = self._workers.counts

        def left() -> float | None:
            done = _since(before, self._workers)
            per_token = 1e-9 * done.working_ns / (done.tokens or 1) / self._workers.count
            return tokens * per_token - (time.monotonic() - self._began) if done.tokens else None

        return self._in_stage(MEASURING, self._size, left)

    @contextmanager
    def _in_stage(self, stage: str, sequences: int, left: Callable[[], float | None]) -> Iterator[None]:
        self._before, self._sequences = self._workers.sequences_finished, max(sequences, 1)
        self.stage, self._stage_left, self._began = stage, left, time.monotonic()
        yield
        self._past[stage] = time.monotonic() - self._began

    def finished(self) -> int:
        """Responses that this stage has finished, in all parts."""
        sequences = self._workers.sequences_finished - self._before
        return self._done + self._size * min(sequences, self._sequences) // self._sequences

    def seconds_left(self) -> float | None:
        known = dict(self._past)  # seconds of this part's stages
        taken, left = time.monotonic() - self._began, self._stage_left()
        spent = sum(known.values()) + (0.0 if self.stage in known else taken)
        if left is not None:
            known.setdefault(self.stage, taken + left)
        if known:
            part = sum(known.values()) / sum(self._costs[stage] for stage in known) * sum(self._costs.values())
        elif self._done:
            part = self._seconds / self._done * self._size
        else:
            return None
        mean = self._seconds / self._done if self._done else part / self._size
        return max(part - spent, 0.0) + (self.total - self._done - self._size) * mean
