"""The workers of a pool and the items they are at: hands out, collects, replaces. Belongs to one thread."""

from __future__ import annotations

import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from forkrl.errors import UserError
from forkrl.rewards.batch import Batch, Item
from forkrl.rewards.worker_process import FORGERY, Cause, Settings, WorkerProcess
from forkrl.types import Verdict


class Crew:
    """Worker processes and what waits for them.

    An item may be with two workers at once, where the first was slow to come to it; the first answer counts. A verdict
    depends on its own item alone: what a worker answered before may have filled its memory, so "crash" and "memory"
    from a worker that had answered other items are tried once more in a fresh one.

    Args:
        settings: what workers are started with.
        num_workers: how many.
        note_failure: called with the item, the kind and the message of every failed verdict.
        hide: removes credentials from messages.
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
        """Items that a worker with a past came to grief over; each goes to a fresh one."""

    def add(self, batch: Batch) -> None:
        """Take a batch to be judged."""
        self._batches.append(batch)
        self._waiting.extend(batch.items)

    def staff(self) -> None:
        """Bring the workers to full number."""
        for worker in self.workers:
            if worker.state == "resting":
                worker.begin()
        while len(self.workers) < self._num_workers:
            self.workers.append(WorkerProcess(self._settings))

    @property
    def is_ready(self) -> bool:
        """Whether all workers have loaded their verifiers (one that died since is a matter for the next batch)."""
        return all(worker.state in ("ready", "resting") for worker in self.workers)

    def step(self, wake_fd: int) -> None:
        """Hand out work, wait for whatever happens first (a byte on ``wake_fd`` too), and deal with it.

        Raises:
            UserError: a worker could not be started.
        """
        self._drop_what_nobody_wants()
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
            elif worker.answers_fd not in happened:  # as of the question: an answer that came while we slept is read
                self._look_at_the_clock(worker, asked)

    def abandon(self, error: BaseException) -> None:
        """Fail all batches and end all workers; the next batch finds new ones."""
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

    def _drop_what_nobody_wants(self) -> None:
        """Forget batches that are done. A worker at an item of a cancelled one may be so until its deadline."""
        self._batches = [batch for batch in self._batches if not batch.future.done()]
        for worker in self.workers:
            if worker.in_flight and worker.in_flight[0].item.batch.future.cancelled():
                worker.end(None)

    def _hand_out(self) -> None:
        """One each in turn, as long as there are workers with room."""
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

    def _collect(self, worker: WorkerProcess) -> None:
        lines, problem = worker.read_answers()
        for line in lines:
            if worker.state == "starting":
                self._welcome(worker, line)
            elif worker.state == "ready":
                self._accept(worker, line)
        if problem == "end":
            worker.end(Cause("crash", ""))  # most likely dead; the warden knows how
        elif problem:
            worker.end(Cause("crash", problem))

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
                self._settle(worker.next_turn(took), Verdict(score, failure, read), message)
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
            if worker.state == "ending":  # the warden is stopped, or something below it cannot be killed at present
                self._replace(worker, patience_s=0.0)  # it has had its time, and the other workers wait for this thread
            else:
                limit = worker.in_flight[0].item.deadline_s
                worker.end(Cause("deadline", f"gave no answer within {limit:g} s"))
        elif asked >= self._lingers_at(worker):
            self._waiting.extendleft(reversed(worker.take_back()))

    def _replace(self, worker: WorkerProcess, **patience: float) -> None:
        """End a warden, and with it its worker; another takes over once there is work."""
        self.workers.remove(worker)
        self._bury(worker, f"lost its warden, which {worker.close(**patience)}")

    def _bury(self, worker: WorkerProcess, how: str) -> None:
        """A worker is dead: believe what it still said, blame the item it was at, and give the others back."""
        problem = ""
        while worker.answers_fd >= 0 and not problem and worker.state in ("starting", "ready"):
            lines, problem = worker.read_answers()
            if not lines and not problem:
                break
            for line in lines:
                (self._welcome if worker.state == "starting" else self._accept)(worker, line)
        if not worker.pid:
            raise self._start_failure(f"it {how}{worker.last_words()}")
        cause = worker.cause if worker.state == "ending" else Cause("crash", how)
        given_back = [request.item for request in worker.in_flight if not request.withdrawn and request.item.open]
        if given_back and cause and worker.in_flight[0].item is given_back[0]:
            culprit = given_back.pop(0)
            if cause.failure == "deadline" or not worker.served:
                self._settle(culprit, Verdict(0.0, cause.failure), cause.message or how)
            else:
                self._suspects.append(culprit)
        self._waiting.extendleft(reversed(given_back))

    def _settle(self, item: Item, verdict: Verdict, message: str) -> None:
        if item.open:  # else another worker was faster, or nobody waits any more
            if verdict.failure:
                self._note_failure(item, verdict.failure, self._hide(message))
            item.batch.settle(item.index, verdict)

    def _start_failure(self, reason: str, path: str = "") -> UserError:
        named = path or ", ".join(dict.fromkeys(path for path, *_ in self._settings.verifiers.values()))
        return UserError(
            f'task.verifier = "{named}" could not be started: {self._hide(reason)}; '
            f"name an importable module:function that fits in reward.memory_mb = {self._settings.memory_mb}"
        )
