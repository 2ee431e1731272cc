"""The workers of a pool and the items they hold: hands out, collects, replaces. Belongs to one thread."""

from __future__ import annotations

import os
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from forkrl.errors import UserError
from forkrl.rewards.reply import with_opened_thinking
from forkrl.rewards.worker_process import FORGERY, Cause, Settings, WorkerProcess
from forkrl.types import Prompt, VerifierResult


@dataclass(eq=False, slots=True)
class Item:
    """One response to judge."""

    batch: Batch
    index: int
    prompt: Prompt
    response: str
    timeout_s: float

    @property
    def open(self) -> bool:
        """Whether a result is still wanted."""
        return self.batch.results[self.index] is None and not self.batch.future.done()


class Batch:
    """The items of one ``submit`` call and the future of their results."""

    def __init__(self, pairs: Sequence[tuple[Prompt, str]], timeout_of: Callable[[Prompt], float]) -> None:
        self.future: Future[list[VerifierResult]] = Future()
        self.items = [
            Item(self, index, prompt, with_opened_thinking(prompt.text, response), timeout_of(prompt))
            for index, (prompt, response) in enumerate(pairs)
        ]
        self.results: list[VerifierResult | None] = [None] * len(self.items)
        self._num_open = len(self.items)

    def settle(self, index: int, result: VerifierResult) -> None:
        self.results[index] = result
        self._num_open -= 1
        self.finish_if_settled()

    def finish_if_settled(self) -> None:
        if not self._num_open and self.future.set_running_or_notify_cancel():
            self.future.set_result([result for result in self.results if result is not None])

    def fail(self, error: BaseException) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Crew:
    """Worker processes and the items that wait for them.

    Two workers may hold the same item if the first was slow to reach it; the first answer counts. A result must depend
    on its own item alone, but earlier items may have filled a worker's memory: so "crash" and "memory" from a worker
    that had answered other items are tried once more in a fresh one.
    """

    def __init__(
        self,
        settings: Settings,
        num_workers: int,
        note_failure: Callable[[Item, str, str], None],
        hide: Callable[[str], str],
    ) -> None:
        self._settings, self._num_workers, self._note_failure = settings, num_workers, note_failure
        self._hide = hide
        self.workers: list[WorkerProcess] = []
        self._batches: list[Batch] = []
        self._waiting: deque[Item] = deque()
        self._suspects: deque[Item] = deque()
        """Items that made a used worker fail; each is tried in a fresh one."""

    def add(self, batch: Batch) -> None:
        self._batches.append(batch)
        self._waiting.extend(batch.items)

    def staff(self) -> None:
        """Start missing workers."""
        for worker in self.workers:
            if worker.state == "resting":
                worker.begin()
        while len(self.workers) < self._num_workers:
            self.workers.append(WorkerProcess(self._settings))

    @property
    def is_ready(self) -> bool:
        """Whether all workers have loaded their verifiers."""
        return all(worker.state in ("ready", "resting") for worker in self.workers)

    def step(self, wake_fd: int) -> None:
        """Hand out work, wait for the next event or a byte on ``wake_fd``, and handle it; raises UserError."""
        self._drop_finished_batches()
        if self._batches:
            self.staff()
            self._hand_out()
        asked = time.monotonic()
        happened = self._wait(wake_fd, asked)
        if wake_fd in happened:
            os.read(wake_fd, 1 << 12)
        for worker in list(self.workers):
            if worker.answers_fd in happened:
                self._collect(worker)
            if worker.control.fileno() in happened:
                self._hear(worker)
            elif worker.answers_fd not in happened:  # time as of the select: a late answer is read
                self._look_at_the_clock(worker, asked)

    def abandon(self, error: BaseException) -> None:
        """Fail all batches and end all workers; the next batch starts new ones."""
        for batch in self._batches:
            batch.fail(error)
        self._end_all()

    def close(self) -> None:
        """Cancel all batches and end all workers."""
        for batch in self._batches:
            batch.future.cancel()
        self._end_all()

    def _end_all(self) -> None:
        self._batches.clear()
        self._waiting.clear()
        self._suspects.clear()
        while self.workers:
            self.workers.pop().close()

    def _wait(self, wake_fd: int, asked: float) -> set[int]:
        with selectors.DefaultSelector() as selector:
            selector.register(wake_fd, selectors.EVENT_READ)
            for worker in self.workers:
                selector.register(worker.control, selectors.EVENT_READ)
                if worker.answers_fd >= 0 and worker.state != "ending":
                    selector.register(worker.answers_fd, selectors.EVENT_READ)
                if worker.outbox and worker.state == "ready":
                    selector.register(worker.requests_fd, selectors.EVENT_WRITE)
            until = min((min(worker.due, self._lingers_at(worker)) for worker in self.workers), default=float("inf"))
            events = selector.select(max(0.0, until - asked) if until < float("inf") else None)
        return {key.fd for key, _ in events}

    def _lingers_at(self, worker: WorkerProcess) -> float:
        return worker.lingers_at if len(self.workers) > 1 else float("inf")

    def _drop_finished_batches(self) -> None:
        """Also end workers that hold an item of a cancelled batch, which might keep them until its deadline."""
        self._batches = [batch for batch in self._batches if not batch.future.done()]
        for worker in self.workers:
            if worker.in_flight and worker.in_flight[0].item.batch.future.cancelled():
                worker.end(None)

    def _hand_out(self) -> None:
        """One item per worker in turn, while any has room."""
        taking = [worker for worker in self.workers if worker.has_room]
        while taking:
            for worker in list(taking):
                item = self._next_item(fresh=not worker.served) if worker.has_room else None
                if item is None:
                    taking.remove(worker)
                else:
                    worker.ask(item)
        for worker in self.workers:
            if worker.state == "ready":
                worker.flush()

    def _next_item(self, *, fresh: bool) -> Item | None:
        for queue in (self._suspects, self._waiting) if fresh else (self._waiting,):
            while queue:
                item = queue.popleft()
                if item.open:
                    return item
        return None

    def _collect(self, worker: WorkerProcess) -> bool:
        """Handle the answers that have arrived; whether more may follow."""
        lines, problem = worker.read_answers()
        for line in lines:
            if worker.state == "starting":
                self._welcome(worker, line)
            elif worker.state == "ready":
                self._accept(worker, line)
        if problem:  # at the end of the pipe it is probably dead; the warden reports how
            worker.end(Cause("crash", "" if problem == "end" else problem))
        return bool(lines) and not problem

    def _welcome(self, worker: WorkerProcess, line: Any) -> None:
        match line:
            case {"ready": int(pid)}:
                worker.welcome(pid)
            case {"failed": str(reason), "path": str(path)}:
                raise self._start_failure(reason, path)
            case _:
                raise self._start_failure(f"it {FORGERY}")

    def _accept(self, worker: WorkerProcess, line: Any) -> None:
        match line:
            case str(token) if worker.expects(token) and worker.in_flight[0].withdrawn:
                worker.next_turn(None)
            case [str(token), float(), "memory", str(message), None, float()] if worker.expects(token):
                worker.end(Cause("memory", message))
            case [str(token), float(score), str(failure), str(message), str() | None as read, float(took)] if (
                worker.expects(token)
            ):
                self._settle(worker.next_turn(took), VerifierResult(score, failure, read), message)
                if worker.has_swollen():
                    worker.end(None)
            case _:
                worker.end(Cause("crash", FORGERY))

    def _hear(self, worker: WorkerProcess) -> None:
        reports, gone = worker.read_reports()
        for report in reports:
            if "failed" in report:
                raise self._start_failure(report["failed"], report["path"])
            self._bury(worker, report["ended"])
            if self._batches:
                worker.begin()
            else:
                worker.rest()
        if gone:
            self._replace(worker)

    def _look_at_the_clock(self, worker: WorkerProcess, asked: float) -> None:
        if asked >= worker.due:
            if worker.state == "starting":
                raise self._start_failure(f"it was not ready in time{worker.last_words()}")
            if worker.state == "ending":  # the warden is stopped, or a process below it cannot be killed now
                self._replace(worker, stall_timeout_s=0.0)
            else:
                limit = worker.in_flight[0].item.timeout_s
                worker.end(Cause("timeout", f"gave no answer within {limit:g} s"))
        elif asked >= self._lingers_at(worker):
            self._waiting.extendleft(reversed(worker.take_back()))

    def _replace(self, worker: WorkerProcess, **patience: float) -> None:
        """End a warden and its worker; ``staff`` starts another."""
        self.workers.remove(worker)
        self._bury(worker, f"lost its warden, which {worker.close(**patience)}")

    def _bury(self, worker: WorkerProcess, how: str) -> None:
        """A worker is dead: read its last answers, blame the item it worked on, and requeue the others."""
        while worker.answers_fd >= 0 and worker.state in ("starting", "ready") and self._collect(worker):
            pass
        if not worker.pid:
            raise self._start_failure(f"it {how}{worker.last_words()}")
        cause = worker.cause if worker.state == "ending" else Cause("crash", how)
        given_back = [request.item for request in worker.in_flight if not request.withdrawn and request.item.open]
        if given_back and cause and worker.in_flight[0].item is given_back[0]:
            culprit = given_back.pop(0)
            if cause.failure == "timeout" or not worker.served:
                self._settle(culprit, VerifierResult(0.0, cause.failure), cause.message or how)
            else:
                self._suspects.append(culprit)
        self._waiting.extendleft(reversed(given_back))

    def _settle(self, item: Item, result: VerifierResult, message: str) -> None:
        if item.open:  # else another worker was faster, or the batch is cancelled
            if result.failure:
                self._note_failure(item, result.failure, self._hide(message))
            item.batch.settle(item.index, result)

    def _start_failure(self, reason: str, path: str = "") -> UserError:
        named = path or ", ".join(dict.fromkeys(path for path, *_ in self._settings.verifiers.values()))
        return UserError(
            f'task.verifier = "{named}" could not be started: {self._hide(reason)}; '
            f"name an importable module:function that fits in reward.memory_mb = {self._settings.memory_mb}"
        )
