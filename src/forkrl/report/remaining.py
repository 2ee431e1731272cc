"""How much of the sampling of responses is done, from counters that decoding advances."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # avoids importing torch
    from forkrl.parallel.workers import Workers


class Counts(NamedTuple):
    """So far: responses finished, tokens sampled, and the most tokens that unfinished ones may still get."""

    finished: int
    tokens: int
    room: int


class Engine(Protocol):
    """Of ``forkrl.rollout``, a higher layer."""

    workers: Workers

    @property
    def wave_sequences(self) -> int: ...


class SamplingShare:
    """The share of tokens sampled, of those expected for ``total`` responses.

    ``wave``: responses decoded at once. The first to finish are short, so the mean length of finished ones says little
    about the others: an unfinished response is assumed to end at each token with the rate seen so far.
    """

    def __init__(self, read: Callable[[], Counts], total: int, wave: int) -> None:
        self._read, self._total, self._wave = read, total, wave
        self._before = read()

    @classmethod
    def of(cls, engine: Engine, total: int) -> SamplingShare:
        def read() -> Counts:
            return Counts(engine.workers.sequences_finished, *engine.workers.tokens)

        return cls(read, total, engine.wave_sequences)

    def finished(self) -> int:
        return min(self._read().finished - self._before.finished, self._total)

    def __call__(self) -> float:
        counts, finished = self._read(), self.finished()
        tokens = counts.tokens - self._before.tokens
        if finished >= self._total or not tokens:  # some engines count no tokens
            return finished / self._total
        whole = finished // self._wave * self._wave
        between_waves = finished == whole and not counts.room
        going = 0 if between_waves else min(self._wave, self._total - whole) - (finished - whole)
        left = going * _expected_tokens(finished / tokens, counts.room / going) if going else 0.0
        started = finished + going
        if not started:  # a whole wave has just ended, and its responses are not counted yet
            return min(1.0, self._wave / self._total)
        mean = tokens / finished if whole else (tokens + left) / started  # of responses that have not begun
        left += (self._total - started) * mean
        return tokens / (tokens + left)


def _expected_tokens(end_rate: float, room: float) -> float:
    """Mean tokens before an end that has this probability at every token, or before ``room`` is used up."""
    return room if end_rate == 0 else (1 - (1 - min(end_rate, 1.0)) ** room) / end_rate
