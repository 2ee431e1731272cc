"""Judges responses in worker processes that can be killed.

Model output is hostile text, and a verifier fed with it may loop inside C code, exhaust memory or crash. No time-out
inside the process survives that (a SIGALRM one does not even work off the main thread, and then scores 0 in silence),
so every verifier runs in a process of its own session: past the deadline the whole session is killed, that response
gets a verdict that says so, and a fresh process takes over. The workers are new interpreters, not forks: a fork of a
process that holds torch threads or an accelerator is not safe, and would weigh as much.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

from forkrl.config import RewardConfig
from forkrl.errors import UserError
from forkrl.processes import child_environment
from forkrl.types import Prompt, Verdict, VerifierSpec

_START_LIMIT_S = 60.0
"""For the interpreter and the verifier's imports, on a loaded machine; no item pays for it."""
_PIPELINE = 16
"""Requests given to a worker ahead of its answers, so that it need not wait for the parent between two of them."""
_MAX_OUTBOX = 1 << 20
"""Bytes waiting for one worker above which it is given no further request."""
_MAX_LINE = 1 << 14
"""No honest answer is longer."""
_FORGERY = "wrote on the pipe that carries verdicts"


class VerifierPool:
    """Processes that run verifiers; a context manager.

    Args:
        verifiers: one for every ``Prompt.source``. Imported in the workers only, with the import path of this process
            and the current folder.
        workers: number of processes.
        deadline_s: wall-clock seconds for judging one response, where the verifier sets none.
        memory_mb: address space of one process, in MiB. macOS enforces none; a warning says so.

    Attributes:
        failures: how many verdicts were failures, by kind ("deadline", "crash", "memory", "error").
        first_failures: for each kind seen, the prompt and the message of its first failure.

    Raises:
        UserError: a verifier cannot be imported, naming the path and the reason.
    """

    def __init__(
        self,
        verifiers: Mapping[str, VerifierSpec],
        *,
        workers: int = 1,
        deadline_s: float = 10.0,
        memory_mb: int = 2048,
    ) -> None:
        for spec in verifiers.values():
            module, _, function = spec.path.partition(":")
            if not module or not function:
                raise UserError(f'task.verifier = {spec.path!r} is not an import path; write "module:function"')
        if sys.platform == "darwin":
            warnings.warn("macOS does not enforce reward.memory_mb; only the deadline bounds a verifier", stacklevel=2)
        self.failures: Counter[str] = Counter()
        self.first_failures: dict[str, str] = {}
        self._verifiers, self._memory_mb = dict(verifiers), memory_mb
        self._num_workers, self._deadline_s = workers, deadline_s
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._staff()
            while not all(worker.ready for worker in self._workers):
                self._step(_Batch(()))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers and wait for them; may be called twice."""
        with self._lock:
            self._closed = True
            self._kill_all()

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """Judge responses; never raises for what a response contains. May be called from any thread.

        A verdict depends on its own item alone. What the worker answered before may have filled its memory, so
        "crash" and "memory" from a worker that had answered other items are tried once more in a fresh one.

        Args:
            items: pairs of a prompt and a response to it.

        Returns:
            One verdict an item, in order.

        Raises:
            UserError: a replacement worker could not be started.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this VerifierPool is closed")
            batch = _Batch(items)
            try:
                self._bury_dead()
                self._staff()
                while batch.unanswered:
                    self._step(batch)
            except BaseException:
                self._kill_all()  # what they still answer belongs to a batch that nobody waits for
                raise
            return [batch.verdicts[index] for index in range(len(items))]

    def _step(self, batch: _Batch) -> None:
        """Hand out work, wait for whatever happens first, and deal with it."""
        for worker in self._workers:
            worker.feed(batch, self._deadline_of)
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.answers_fd, selectors.EVENT_READ, worker)
                if worker.outbox:
                    selector.register(worker.requests_fd, selectors.EVENT_WRITE, worker)
            wake = min(worker.deadline for worker in self._workers)
            asked = time.monotonic()
            events = selector.select(max(0.0, wake - asked) if wake < float("inf") else None)
        readable = {key.data for key, mask in events if mask & selectors.EVENT_READ}
        for worker in list(self._workers):
            if worker in readable:
                self._collect(worker, batch)
            elif asked >= worker.deadline:  # as of the question: an answer that came while we slept is still read
                self._end_overdue(worker, batch)

    def _collect(self, worker: _Worker, batch: _Batch) -> None:
        lines, ended = worker.read()
        for line in lines:
            if not worker.ready:
                self._welcome(worker, line)
            elif not self._accept(worker, batch, line):
                return
        if ended:
            self._dismiss(worker, batch, "crash", ended)

    def _welcome(self, worker: _Worker, line: Any) -> None:
        if isinstance(line, dict) and line.get("ready") is True:
            worker.ready, worker.deadline = True, float("inf")
        else:
            told = line if isinstance(line, dict) else {"failed": str(line)}
            raise self._start_failure(str(told.get("failed")), str(told.get("path") or ""))

    def _accept(self, worker: _Worker, batch: _Batch, line: Any) -> bool:
        """Take one answer; False where the worker had to go."""
        match line:
            case [str(token), float(score), str(failure), str(message), str() | None as read] if worker.expects(token):
                pass
            case _:
                self._dismiss(worker, batch, "crash", _FORGERY)
                return False
        if failure == "memory":
            self._dismiss(worker, batch, failure, message)
            return False
        self._settle(batch, worker.in_flight.popleft().item, Verdict(score, failure, read), message)
        worker.served += 1
        worker.start_clock(batch, self._deadline_of)
        return True

    def _end_overdue(self, worker: _Worker, batch: _Batch) -> None:
        limit = self._deadline_of(batch.items[worker.in_flight[0].item][0]) if worker.ready else _START_LIMIT_S
        self._dismiss(worker, batch, "deadline", f"gave no answer within {limit:g} s")

    def _dismiss(self, worker: _Worker, batch: _Batch, failure: str, message: str) -> None:
        """Kill a worker, blame the item it was at, give the items behind that one to others, and replace it."""
        worker.end()
        if not worker.ready:
            raise self._start_failure(f"it {message}{worker.last_words()}")
        self._workers.remove(worker)
        if worker.in_flight and (failure == "deadline" or not worker.served):
            self._settle(batch, worker.in_flight.popleft().item, Verdict(0.0, failure), message)
        batch.pending.extendleft(request.item for request in reversed(worker.in_flight))
        self._staff()

    def _settle(self, batch: _Batch, index: int, verdict: Verdict, message: str) -> None:
        batch.verdicts[index] = verdict
        if verdict.failure:
            self.failures[verdict.failure] += 1
            self.first_failures.setdefault(verdict.failure, f"prompt {batch.items[index][0].id}: {message}")

    def _staff(self) -> None:
        """Bring the workers to full number."""
        while len(self._workers) < self._num_workers:
            self._workers.append(_Worker(self._verifiers, self._memory_mb))

    def _deadline_of(self, prompt: Prompt) -> float:
        own = self._verifiers[prompt.source].deadline_s
        return self._deadline_s if own is None else own

    def _bury_dead(self) -> None:
        """Remove the workers that died since the last batch, so that no item of this one is blamed for it."""
        for worker in [worker for worker in self._workers if worker.ready and worker.died_idle()]:
            worker.end()
            self._workers.remove(worker)

    def _kill_all(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def _start_failure(self, reason: str, path: str = "") -> UserError:
        named = path or ", ".join(dict.fromkeys(spec.path for spec in self._verifiers.values()))
        return UserError(
            f'task.verifier = "{named}" could not be started: {reason}; '
            f"name an importable module:function that fits in reward.memory_mb = {self._memory_mb}"
        )


def open_verifier(verifiers: Mapping[str, VerifierSpec], config: RewardConfig) -> VerifierPool:
    """The pool that a recipe asks for."""
    return VerifierPool(verifiers, workers=config.workers, deadline_s=config.deadline_s, memory_mb=config.memory_mb)


class _Request(NamedTuple):
    item: int
    token: str


class _Batch:
    """The items of one ``verify`` call: which still wait, and the verdicts so far."""

    def __init__(self, items: Sequence[tuple[Prompt, str]]) -> None:
        self.items = items
        self.pending = deque(range(len(items)))
        self.verdicts: dict[int, Verdict] = {}

    @property
    def unanswered(self) -> int:
        return len(self.items) - len(self.verdicts)


class _Worker:
    """The parent's end of one verifier process. Nothing here waits for the process, except ``end``."""

    def __init__(self, verifiers: Mapping[str, VerifierSpec], memory_mb: int) -> None:
        theirs_requests, self.requests_fd = os.pipe()
        self.answers_fd, theirs_answers = os.pipe()
        theirs_lifeline, self._lifeline_fd = os.pipe()
        theirs = (theirs_requests, theirs_answers, theirs_lifeline)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "forkrl.rewards.worker", str(memory_mb), *map(str, theirs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=child_environment(1) | {"PYTHONHASHSEED": "0"},  # the same hash order, hence the same verdicts
                start_new_session=True,
            )
        except BaseException:
            self._close_files()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        os.set_blocking(self.requests_fd, False)
        os.set_blocking(self.answers_fd, False)
        self.ready = False
        self.served = 0
        self.in_flight: deque[_Request] = deque()
        named = {source: [spec.path, dict(spec.options)] for source, spec in verifiers.items()}
        self.outbox = bytearray(json.dumps(named).encode("ascii") + b"\n")
        self.deadline = time.monotonic() + _START_LIMIT_S
        self._inbox = b""
        self._words = ""

    def feed(self, batch: _Batch, deadline_of: Callable[[Prompt], float]) -> None:
        """Give the worker pending items as far as its pipeline has room."""
        while self.ready and batch.pending and len(self.in_flight) < _PIPELINE and len(self.outbox) < _MAX_OUTBOX:
            request = _Request(batch.pending.popleft(), secrets.token_hex(8))
            prompt, response = batch.items[request.item]
            # ASCII JSON carries anything a Python string can hold, lone surrogates and NULs too.
            self.outbox += json.dumps([request.token, prompt.source, prompt.answer, response]).encode("ascii") + b"\n"
            self.in_flight.append(request)
            if len(self.in_flight) == 1:
                self.start_clock(batch, deadline_of)
        self.flush()

    def start_clock(self, batch: _Batch, deadline_of: Callable[[Prompt], float]) -> None:
        """From now on the first of the requests in flight is being judged; without one, nothing is awaited."""
        limit = deadline_of(batch.items[self.in_flight[0].item][0]) if self.in_flight else float("inf")
        self.deadline = time.monotonic() + limit

    def expects(self, token: str) -> bool:
        """Whether an answer with this token is the one due; none can be forged without having read its request."""
        return bool(self.in_flight) and token == self.in_flight[0].token

    def flush(self) -> None:
        """Write what the pipe takes now."""
        try:
            while self.outbox:
                del self.outbox[: os.write(self.requests_fd, self.outbox)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outbox.clear()  # it is dead; the end of its answers will say so, after those it still gave

    def read(self) -> tuple[list[Any], str]:
        """The answers that have arrived and, where they are the last that can be believed, why."""
        data = os.read(self.answers_fd, 1 << 16)
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        answers = []
        for line in lines:
            try:
                answers.append(json.loads(line))
            except (ValueError, RecursionError):
                return answers, _FORGERY
        if len(self._inbox) > _MAX_LINE:
            return answers, _FORGERY
        return answers, "" if data else self.end()

    def died_idle(self) -> bool:
        """Whether the process has gone while it had nothing to do (or has written unasked, and had better go)."""
        if self.in_flight:
            return False
        try:
            os.read(self.answers_fd, 1)
        except BlockingIOError:
            return False
        return True

    def end(self) -> str:
        """Kill the process and all that it started, reap it, and say how it ended.

        After the end of its answers, that is how it ended by itself: a dying process closes its files after its exit
        code is settled.
        """
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # macOS forbids it for a session of dead processes
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._words = self._read_stderr()
            self._close_files()
        code = self._process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def last_words(self) -> str:
        """The last line on stderr of a process that has ended before it was ready, to follow a message."""
        return f" ({self._words})" if self._words else ""

    def _read_stderr(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def _close_files(self) -> None:
        for fd in (self.requests_fd, self.answers_fd, self._lifeline_fd):
            os.close(fd)
        self._stderr.close()
