"""The pool's end of one verifier process and its warden; only ``close`` blocks."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from forkrl.parallel.processes import child_environment
from forkrl.rewards.warden import KILL, START

if TYPE_CHECKING:
    from forkrl.rewards.crew import Item

_START_LIMIT_S = 60.0
"""For the interpreter and the verifier's imports on a loaded machine."""
_END_LIMIT_S = 10.0
"""For killing a worker and everything below it."""
_STALL_TIMEOUT_S = 0.1
"""If an item takes longer, those queued behind it go to other workers."""
_PIPELINE = 16
"""Requests sent ahead to a quick worker, so that it need not wait for the pool between two answers."""
_QUICK_S, _SLOW_S = 0.01, 0.05
"""Quicker answers double the number of requests sent ahead, slower ones halve it."""
_MAX_OUTBOX = 1 << 20
"""Bytes queued for a worker above which it gets no further request."""
_MAX_LINE = 1 << 14
"""Longest valid answer."""
_MAX_SERVED = 20_000
"""Answers after which a worker is replaced, against leaks in a verifier."""
_MEASURE_EVERY = 32
"""Answers between two measurements of a worker's memory."""
_NEVER = float("inf")

FORGERY = "wrote on the pipe that carries results"


class Settings(NamedTuple):
    """What every worker of a pool starts with: path, options and deadline of a verifier by source."""

    verifiers: Mapping[str, tuple[str, Mapping[str, Any], float]]
    memory_mb: int


class Cause(NamedTuple):
    """Why a worker is killed, and the failure of the item it worked on."""

    failure: str
    message: str


@dataclass(slots=True)
class Request:
    """An item given to a worker. ``withdrawn``: it was requeued, and the worker was told."""

    item: Item
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    withdrawn: bool = False


class WorkerProcess:
    """A verifier process, restarted by its warden when needed.

    Attributes:
        state: "starting" until the verifiers are loaded, "ready", "ending" while it is killed, "resting" without a
            process.
        due: monotonic deadline of the worker's start, answer or end.
        served: answers since its start; before the first one, a failure is its first item's fault.
        cause: in state "ending", why; None where no item is to blame.
    """

    def __init__(self, settings: Settings) -> None:
        self.control, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._memory = settings.memory_mb << 20
        try:
            self._warden = _start_warden(settings, theirs, self._stderr.fileno())
        except BaseException:
            self.control.close()
            self._stderr.close()
            raise
        finally:
            theirs.close()
        self.control.setblocking(False)
        self._reports, self._words = b"", ""
        self.requests_fd = self.answers_fd = -1
        self.begin()

    def begin(self) -> None:
        """Have the warden fork a new worker with new pipes."""
        self._close_pipes()
        theirs_requests, self.requests_fd = os.pipe()
        self.answers_fd, theirs_answers = os.pipe()
        os.set_blocking(self.requests_fd, False)
        os.set_blocking(self.answers_fd, False)
        try:
            with suppress(ConnectionError):  # the warden is dead; its closed socket will say so
                socket.send_fds(self.control, [START], [theirs_requests, theirs_answers])
        finally:
            os.close(theirs_requests)
            os.close(theirs_answers)
        self.state: Literal["starting", "ready", "ending", "resting"] = "starting"
        self.due = time.monotonic() + _START_LIMIT_S
        self.cause: Cause | None = None
        self.pid = self.served = 0
        self.in_flight: deque[Request] = deque()
        self.outbox = bytearray()
        self._inbox, self._turn_began = b"", 0.0
        self._depth, self._memory_at_start = 1, 0

    def rest(self) -> None:
        """Wait for work without a process."""
        self._close_pipes()
        self.state, self.due = "resting", _NEVER
        self.in_flight.clear()

    def welcome(self, pid: int) -> None:
        """Its verifiers are loaded."""
        self.state, self.due, self.pid = "ready", _NEVER, pid
        self._memory_at_start = _resident_bytes(pid)

    @property
    def has_room(self) -> bool:
        """Whether it can take another request."""
        return self.state == "ready" and len(self.in_flight) < self._depth and len(self.outbox) < _MAX_OUTBOX

    def ask(self, item: Item) -> None:
        """Queue an item for it."""
        request = Request(item)
        self.in_flight.append(request)
        prompt = item.prompt
        # ASCII JSON carries anything a Python string can hold, lone surrogates and NULs too.
        self.outbox += json.dumps([request.token, prompt.source, prompt.answer, item.response]).encode("ascii") + b"\n"
        if len(self.in_flight) == 1:
            self._start_clock()

    def take_back(self) -> list[Item]:
        """Withdraw and return the items behind the current one."""
        withdrawn = [request for request in list(self.in_flight)[1:] if not request.withdrawn]
        for request in withdrawn:
            request.withdrawn = True
            self.outbox += json.dumps(request.token).encode("ascii") + b"\n"
        self._depth = 1
        return [request.item for request in withdrawn]

    @property
    def lingers_at(self) -> float:
        """When to withdraw the items behind the first; never if there are none."""
        waits = self.state == "ready" and any(not request.withdrawn for request in list(self.in_flight)[1:])
        return self._turn_began + _STALL_TIMEOUT_S if waits else _NEVER

    def expects(self, token: str) -> bool:
        """Whether this token belongs to the answer due; only who has read the request can know it."""
        return bool(self.in_flight) and token == self.in_flight[0].token

    def next_turn(self, took: float | None) -> Item:
        """Take the first item off: it was answered in ``took`` seconds, or withdrawn (None)."""
        item = self.in_flight.popleft().item
        if took is not None:
            self.served += 1
            if took < _QUICK_S:
                self._depth = min(2 * self._depth, _PIPELINE)
            elif took > _SLOW_S:
                self._depth = max(self._depth // 2, 1)
        self._start_clock()
        return item

    def has_swollen(self) -> bool:
        """Whether to replace it: it has served many items, or has used half of its free memory."""
        if self.served >= _MAX_SERVED:
            return True
        bound = (self._memory + self._memory_at_start) / 2
        return self.served % _MEASURE_EVERY == 0 and _resident_bytes(self.pid) > bound

    def end(self, cause: Cause | None) -> None:
        """Have it killed with everything it started; its warden reports the end."""
        if self.state not in ("starting", "ready"):
            return
        self.state, self.cause, self.due = "ending", cause, time.monotonic() + _END_LIMIT_S
        with suppress(ConnectionError):
            self.control.send(KILL)

    def flush(self) -> None:
        """Write what fits into the pipe."""
        try:
            while self.outbox:
                del self.outbox[: os.write(self.requests_fd, self.outbox)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outbox.clear()  # it is dead; its warden reports that

    def read_answers(self) -> tuple[list[Any], str]:
        """The answers that have arrived, and why no further one is valid ("" if it is, "end" at the end)."""
        try:
            data = os.read(self.answers_fd, 1 << 16)
        except BlockingIOError:
            return [], ""
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        answers = []
        for line in lines:
            try:
                answers.append(json.loads(line))
            except (ValueError, RecursionError):
                return answers, FORGERY
        if len(self._inbox) > _MAX_LINE:
            return answers, FORGERY
        return answers, "" if data else "end"

    def read_reports(self) -> tuple[list[dict[str, str]], bool]:
        """The warden's reports, and whether the warden itself is gone."""
        try:
            data = self.control.recv(1 << 16)
        except BlockingIOError:
            return [], False
        except ConnectionError:
            data = b""
        *lines, self._reports = (self._reports + data).split(b"\n")
        return [json.loads(line) for line in lines], not data

    def last_words(self) -> str:
        """The last line on stderr before the worker was ready, in brackets to follow a message."""
        if not self._stderr.closed:
            self._stderr.seek(0)
            self._words = self._stderr.read().decode("utf-8", "replace").strip()
        return f" ({self._words.splitlines()[-1][:300]})" if self._words else ""

    def close(self, stall_timeout_s: float = _END_LIMIT_S) -> str:
        """End the warden and all processes below it; say how it ended. It is killed after ``stall_timeout_s``."""
        self._close_pipes()
        with suppress(OSError):  # the warden is already gone
            self.control.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold the socket open
        self.control.close()
        try:
            self._warden.wait(stall_timeout_s)
        except subprocess.TimeoutExpired:
            self._warden.kill()
            self._warden.wait()
        if self._warden.returncode and self.pid:  # it ended abnormally and may have left its worker
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.last_words()
        self._stderr.close()
        code = self._warden.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def _start_clock(self) -> None:
        self._turn_began = time.monotonic()
        self.due = self._turn_began + self.in_flight[0].item.timeout_s if self.in_flight else _NEVER

    def _close_pipes(self) -> None:
        for fd in (self.requests_fd, self.answers_fd):
            if fd >= 0:
                os.close(fd)
        self.requests_fd = self.answers_fd = -1


def _start_warden(settings: Settings, control: socket.socket, stderr_fd: int) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as file:  # not as arguments, which `ps` shows: options may hold credentials
        file.write(json.dumps(settings._asdict()).encode("ascii"))
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "forkrl.rewards.warden", str(control.fileno())],
            pass_fds=[control.fileno()],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=stderr_fd,
            env=child_environment(1) | {"PYTHONHASHSEED": "0"},  # the same hash order, hence the same results
            start_new_session=True,
        )


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if unknown."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
