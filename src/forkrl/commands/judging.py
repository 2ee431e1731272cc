"""Judging an evaluation's responses while further ones are sampled."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from forkrl.evaluation.response_files import BenchmarkFiles
from forkrl.evaluation.samplers import SampleRequest
from forkrl.progress import progress
from forkrl.rewards.pool import VerifierPool
from forkrl.types import Verdict

_BATCH = 16
"""Responses that are handed over at once."""

Item = tuple[SampleRequest, str]


class Judging:
    """Hands the responses of one benchmark to the verifiers, and keeps each verdict as it comes.

    Args:
        pool: the verifiers.
        files: of the benchmark.
    """

    def __init__(self, pool: VerifierPool, files: BenchmarkFiles) -> None:
        self._pool = pool
        self._files = files
        self._waiting: list[Item] = []
        self._handed_over: deque[tuple[Sequence[Item], Future[list[Verdict]]]] = deque()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Judging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def add(self, request: SampleRequest, text: str) -> None:
        """Have a response judged; verdicts that have come by now are kept."""
        self._waiting.append((request, text))
        if len(self._waiting) >= _BATCH:
            self._hand_over()
        while self._handed_over and self._handed_over[0][1].done():
            self._keep_next()

    def finish(self) -> None:
        """Wait for all verdicts."""
        self._hand_over()
        for _ in progress(range(len(self._handed_over)), "judging the last"):
            self._keep_next()

    def _hand_over(self) -> None:
        batch, self._waiting = self._waiting, []
        if batch:
            items = [(request.prompt, text) for request, text in batch]
            self._handed_over.append((batch, self._thread.submit(self._pool.verify, items)))

    def _keep_next(self) -> None:
        batch, verdicts = self._handed_over.popleft()
        for (request, _), verdict in zip(batch, verdicts.result(), strict=True):
            self._files.add_verdict(request, verdict)
