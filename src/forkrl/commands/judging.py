"""Judging an evaluation's responses while further ones are sampled."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType

from forkrl.evaluation.response_files import BenchmarkFiles
from forkrl.evaluation.samplers import SampleRequest
from forkrl.report.progress import progress
from forkrl.rewards.pool import VerifierPool
from forkrl.types import VerifierResult


class Judging:
    """Hands the responses of one benchmark to the verifiers, and keeps each result as it comes.

    Args:
        pool: the verifiers.
        files: of the benchmark.
    """

    def __init__(self, pool: VerifierPool, files: BenchmarkFiles) -> None:
        self._pool = pool
        self._files = files
        self._pending: dict[SampleRequest, Future[list[VerifierResult]]] = {}
        self._judged: SimpleQueue[SampleRequest] = SimpleQueue()

    def __enter__(self) -> Judging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in self._pending.values():
            future.cancel()

    def add(self, request: SampleRequest, text: str) -> None:
        """Have a response judged; results that have come by now are kept."""
        future = self._pool.submit([(request.prompt, text)])
        self._pending[request] = future
        future.add_done_callback(lambda _: self._judged.put(request))
        while not self._judged.empty():
            self._keep(self._judged.get())

    def finish(self) -> None:
        """Wait for all results."""
        for _ in progress(range(len(self._pending)), "judging the last"):
            self._keep(self._judged.get())

    def _keep(self, request: SampleRequest) -> None:
        (result,) = self._pending.pop(request).result()
        self._files.add_result(request, result)
