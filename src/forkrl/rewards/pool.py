"""Scores responses in worker processes that can be killed.

A verifier may hang in C code, exhaust memory or crash. Workers are forked from small single-threaded supervisors
(``worker.py``), because forking a process with torch threads or an accelerator is unsafe.
"""

from __future__ import annotations

import logging
import selectors
import socket
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from forkrl.errors import UserError, printable
from forkrl.rewards.batch import Batch, Item, Source, setting_of
from forkrl.rewards.worker_process import Failure, Settings, WorkerProcess
from forkrl.types import TERM, Prompt, VerifierResult, VerifierSpec

_log = logging.getLogger("forkrl")
_FORGERY = "wrote on the pipe that carries results"


class VerifierPool:
    """Processes that run verifiers; a context manager.

    Two workers may hold the same item if the first stalls; the first answer counts. A "crash" or "memory" failure in a
    worker that had answered other items is retried once in a fresh worker, since earlier items may have caused it.

    ``verifiers`` (by ``Prompt.source``) are imported only in the workers. ``timeout_s`` is wall-clock time per
    response, ``memory_mb`` address space per process in MiB (not enforced on macOS); ``hide`` removes credentials from
    messages. ``failures`` counts by kind ("timeout", "crash", "memory", "error"); ``announce`` gets the first of each
    kind, from the pool's thread. ``remedy`` replaces the advice for responses in which no answer is found.
    """

    def __init__(
        self,
        verifiers: Mapping[str, VerifierSpec],
        *,
        workers: int = 1,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        hide: Callable[[str], str] = str,
        remedy: str = "",
    ) -> None:
        for source, spec in verifiers.items():
            module, _, function = spec.path.partition(":")
            if not module or not function:
                raise UserError(f'{setting_of(source)} = {spec.path!r} is not an import path; write "module:function"')
        if sys.platform == "darwin":
            warnings.warn("macOS does not enforce reward.memory_mb; only the timeout bounds a verifier", stacklevel=2)
        self.failures: Counter[str] = Counter()
        self.first_failures: dict[str, str] = {}
        self.announce: Callable[[str], None] = _log.warning
        self._sources = {
            source: Source(spec, timeout_s if spec.timeout_s is None else spec.timeout_s, remedy)
            for source, spec in verifiers.items()
        }
        named = {
            name: (source.spec.path, dict(source.spec.options), source.timeout_s, source.spec.answer_format)
            for name, source in self._sources.items()
        }
        self._settings, self._num_workers, self._hide = Settings(named, memory_mb), workers, hide
        # Used only by the pool's thread. Suspects made a used worker fail; each is retried in a fresh one.
        self._workers: list[WorkerProcess] = []
        self._batches: list[Batch] = []
        self._waiting: deque[Item] = deque()
        self._suspects: deque[Item] = deque()
        # Shared with other threads.
        self._lock = threading.Lock()
        self._submitted: list[Batch] = []
        self._closed = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        try:
            self._start_workers()
            while any(worker.state != "ready" for worker in self._workers):
                self._step()
        except BaseException:
            self._end()
            raise
        self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
        self._thread.start()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel pending items, kill the workers and wait for them; may be called twice."""
        self._wake(close=True)
        self._thread.join()

    def submit(self, items: Sequence[tuple[Prompt, str]]) -> Future[list[VerifierResult]]:
        """Score (prompt, response) pairs in the background, one result per item in order; thread-safe.

        The future fails only if a replacement worker cannot start (UserError). Cancelling it drops unscored items.
        """
        batch = Batch(items, self._sources)
        with self._lock:
            if self._closed:
                raise RuntimeError("this VerifierPool is closed")
            self._submitted.append(batch)
        self._wake()
        batch.future.add_done_callback(self._wake_if_cancelled)
        return batch.future

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
        """``submit`` and wait; Ctrl-C drops the batch, and the pool stays usable."""
        future = self.submit(items)
        try:
            return future.result()
        finally:
            future.cancel()

    def _wake_if_cancelled(self, future: Future[Any]) -> None:
        if future.cancelled():
            self._wake()

    def _wake(self, *, close: bool = False) -> None:
        """Wake the pool's thread; after ``close`` it owns the sockets alone."""
        with self._lock:
            if not self._closed:
                self._closed = close
                with suppress(BlockingIOError):  # full: enough bytes to wake it
                    self._wake_writer.send(b"!")

    def _run(self) -> None:
        try:
            while not self._closed:
                try:
                    self._step()
                except BaseException as error:  # passed to all pending futures; the next batch gets new workers
                    for batch in self._batches:
                        batch.fail(error)
                    self._end_workers()
        finally:
            self._end()

    def _end(self) -> None:
        self._take_submitted()
        for batch in self._batches:
            batch.future.cancel()
        self._end_workers()
        self._wake_reader.close()
        self._wake_writer.close()

    def _end_workers(self) -> None:
        self._batches.clear()
        self._waiting.clear()
        self._suspects.clear()
        for worker in self._workers:
            worker.hang_up()  # all first, so that they end at the same time
        while self._workers:
            self._workers.pop().close()

    def _start_workers(self) -> None:
        while len(self._workers) < self._num_workers:
            self._workers.append(WorkerProcess(self._settings))

    def _step(self) -> None:
        """Hand out items, then wait for and handle the next event; raises UserError if a worker cannot start."""
        self._take_submitted()
        for worker in self._workers:  # a cancelled item could block its worker until the timeout
            if worker.in_flight and worker.in_flight[0].item.batch.future.cancelled():
                worker.kill(None)
        if self._batches:
            self._start_workers()
            self._hand_out()
        asked = time.monotonic()
        ready = self._wait(asked)
        if self._wake_reader.fileno() in ready:
            self._wake_reader.recv(1 << 12)
        for worker in list(self._workers):
            has_answers = worker.channel.fileno() in ready
            if has_answers:
                self._collect(worker)
            if worker.control.fileno() in ready:
                self._read_reports(worker)
            elif not has_answers:  # uses the time before the select, so a late answer is still read
                self._check_time(worker, asked)

    def _take_submitted(self) -> None:
        with self._lock:
            submitted, self._submitted = self._submitted, []
        self._batches = [batch for batch in self._batches + submitted if not batch.future.done()]
        for batch in submitted:
            self._waiting.extend(batch.items)

    def _wait(self, asked: float) -> set[int]:
        """The descriptors that are readable after the next event or deadline."""
        due = min((min(worker.due, self._stalls_at(worker)) for worker in self._workers), default=float("inf"))
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            for worker in self._workers:
                selector.register(worker.control, selectors.EVENT_READ)
                if worker.state != "ending":
                    write = selectors.EVENT_WRITE if worker.has_outbox else 0
                    selector.register(worker.channel, selectors.EVENT_READ | write)
            events = selector.select(max(0.0, due - asked) if due < float("inf") else None)
        return {key.fd for key, event in events if event & selectors.EVENT_READ}

    def _stalls_at(self, worker: WorkerProcess) -> float:
        return worker.stalls_at if len(self._workers) > 1 else float("inf")

    def _hand_out(self) -> None:
        taking = [worker for worker in self._workers if worker.has_room]
        while taking:
            for worker in list(taking):
                item = self._next_item(fresh=not worker.served) if worker.has_room else None
                if item is None:
                    taking.remove(worker)
                else:
                    worker.request(item)
        for worker in self._workers:
            if worker.has_outbox:
                worker.flush()

    def _next_item(self, *, fresh: bool) -> Item | None:
        for queue in (self._suspects, self._waiting) if fresh else (self._waiting,):
            while queue:
                item = queue.popleft()
                if item.is_open:
                    return item
        return None

    def _collect(self, worker: WorkerProcess) -> bool:
        """Handle the answers that have arrived; returns whether more may follow."""
        lines, ended = worker.read_answers()
        for line in lines:
            if worker.state == "starting":
                self._set_ready(worker, line)
            elif worker.state == "ready":
                self._accept(worker, line)
        if ended:  # probably dead; the supervisor reports how
            worker.kill(Failure("crash", ""))
        return bool(lines) and not ended

    def _set_ready(self, worker: WorkerProcess, line: Any) -> None:
        match line:
            case {"ready": int(pid)}:
                worker.set_ready(pid)
            case {"failed": str(reason), "path": str(path)}:
                raise self._start_failure(reason, path)
            case _:
                raise self._start_failure(f"it {_FORGERY}")

    def _accept(self, worker: WorkerProcess, line: Any) -> None:
        match line:
            case str(token) if worker.expects(token) and worker.in_flight[0].withdrawn:
                worker.end_turn(None)
            case [str(token), float(), "memory", str(message), None, float()] if worker.expects(token):
                worker.kill(Failure("memory", message))
            case [str(token), float(score), str(failure), str(message), str() | None as read, float(took)] if (
                worker.expects(token)
            ):
                self._settle(worker.end_turn(took), VerifierResult(score, failure, read), message)
                if worker.is_worn():
                    worker.kill(None)
            case _:
                worker.kill(Failure("crash", _FORGERY))

    def _read_reports(self, worker: WorkerProcess) -> None:
        reports, gone = worker.read_reports()
        for how in reports:
            idle = not (worker.served or worker.in_flight or self._batches)
            self._clear(worker, how)
            if idle:  # ended by itself and would end again; the next batch starts another
                self._drop(worker)
                return
            worker.restart()
        if gone:
            self._drop(worker)

    def _check_time(self, worker: WorkerProcess, asked: float) -> None:
        if asked >= worker.due:
            if worker.state == "starting":
                raise self._start_failure(f"it was not ready in time{worker.last_stderr_line()}")
            if worker.state == "ending":  # the supervisor is stopped, or a child process cannot be killed now
                self._drop(worker, timeout_s=0.0)
            else:
                item = worker.in_flight[0].item
                spec = self._sources[item.prompt.source].spec
                where = f" (with task.answer_format = {spec.answer_format!r})" if spec.answer_format else ""
                worker.kill(Failure("timeout", f"gave no answer within {item.timeout_s:g} s{where}"))
        elif asked >= self._stalls_at(worker):
            self._waiting.extendleft(reversed(worker.withdraw()))

    def _drop(self, worker: WorkerProcess, timeout_s: float | None = None) -> None:
        """End a supervisor and its worker; the next step starts a replacement."""
        self._workers.remove(worker)
        self._clear(worker, f"lost its supervisor, which {worker.close(timeout_s)}")

    def _clear(self, worker: WorkerProcess, how: str) -> None:
        """A worker died: read its last answers, assign the failure to its current item, requeue the others."""
        while worker.channel.fileno() >= 0 and worker.state != "ending" and self._collect(worker):
            pass
        if not worker.pid:
            raise self._start_failure(f"it {how}{worker.last_stderr_line()}")
        failure = worker.failure if worker.state == "ending" else Failure("crash", how)
        given_back = [request.item for request in worker.in_flight if not request.withdrawn and request.item.is_open]
        if given_back and failure and worker.in_flight[0].item is given_back[0]:
            culprit = given_back.pop(0)
            if failure.kind == "timeout" or not worker.served:
                self._settle(culprit, VerifierResult(0.0, failure.kind), failure.message or how)
            else:
                self._suspects.append(culprit)
        self._waiting.extendleft(reversed(given_back))

    def _settle(self, item: Item, result: VerifierResult, message: str) -> None:
        if not item.is_open:  # another worker answered first, or the batch was cancelled
            return
        if result.failure:
            self.failures[result.failure] += 1
            of_term = item.prompt.source.startswith(TERM)
            kind = f"{result.failure} in {setting_of(item.prompt.source)}" if of_term else result.failure
            if kind not in self.first_failures:
                self.first_failures[kind] = printable(f"prompt {item.prompt.id}: {self._hide(message)}")
                self.announce(
                    f"verifier failure ({kind}), {self.first_failures[kind]}; the response scores 0, and further "
                    f"failures of this kind are only counted (docs/verifiers.md)"
                )
        elif unanswered := self._sources[item.prompt.source].count(item.prompt.source, item.response, result.answer):
            self.announce(unanswered)
        item.batch.settle(item.index, result)

    def _start_failure(self, reason: str, path: str = "") -> UserError:
        named = path or ", ".join(dict.fromkeys(path for path, *_ in self._settings.verifiers.values()))
        source = next((source for source, (known, *_) in self._settings.verifiers.items() if known == path), "")
        return UserError(
            f'{setting_of(source)} = "{named}" could not be started: {self._hide(reason)}; '
            f"name an importable module:function that fits in reward.memory_mb = {self._settings.memory_mb}"
        )
