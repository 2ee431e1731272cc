"""The pool's end of one verifier process and its warden. Nothing here waits for them, except ``close``."""

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
from typing import Any, Literal, NamedTuple

from forkrl.parallel.processes import child_environment
from forkrl.rewards.batch import Item
from forkrl.rewards.warden import KILL, START

_START_LIMIT_S = 60.0
"""For the interpreter and the verifier's imports, on a loaded machine; no item pays for it."""
_END_LIMIT_S = 10.0
"""For killing a worker and all below it. What lasts longer hangs in the kernel, and is left to it."""
_PATIENCE_S = 0.1
"""An item that takes longer must not keep those behind it waiting: they go to other workers."""
_PIPELINE = 16
"""Requests given to a quick worker ahead of its answers, so that it need not wait for the pool between two of them."""
_QUICK_S, _SLOW_S = 0.01, 0.05
"""Answers this quick double the requests that a worker is given ahead; answers this slow halve them."""
_MAX_OUTBOX = 1 << 20
"""Bytes waiting for one worker above which it is given no further request."""
_MAX_LINE = 1 << 14
"""No honest answer is longer."""
_MAX_SERVED = 20_000
"""Answers after which a worker is replaced: whatever leaks in a verifier, files among it, starts anew."""
_MEASURE_EVERY = 32
"""Answers between two looks at a worker's memory."""
_NEVER = float("inf")

FORGERY = "wrote on the pipe that carries verdicts"


class Settings(NamedTuple):
    """What every worker of a pool is started with: path, options and deadline of a verifier by source."""

    verifiers: Mapping[str, tuple[str, Mapping[str, Any], float]]
    memory_mb: int


class Cause(NamedTuple):
    """Why a worker has to go, and the failure of the item it was at."""

    failure: str
    message: str


@dataclass(slots=True)
class Request:
    """An item in the hands of a worker. ``withdrawn``: it went back to the pool, and the worker was told."""

    item: Item
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    withdrawn: bool = False


class WorkerProcess:
    """A verifier process, restarted by its warden as often as need be.

    Attributes:
        state: "starting" until the verifiers are loaded, "ready", "ending" once it is to be killed, "resting" with no
            process.
        due: monotonic time by which something has to happen: the worker's start, an answer, or its end.
        served: answers since it was started; without any, what it does is the fault of its first item.
        cause: in the state "ending", why; None where nobody is to blame.
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
        """Have the warden fork a fresh worker, with fresh pipes."""
        self._close_pipes()
        theirs_requests, self.requests_fd = os.pipe()
        self.answers_fd, theirs_answers = os.pipe()
        os.set_blocking(self.requests_fd, False)
        os.set_blocking(self.answers_fd, False)
        try:
            with suppress(ConnectionError):  # the warden is dead; the end of its reports will say so
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
        """Stay without a process until there is work."""
        self._close_pipes()
        self.state, self.due = "resting", _NEVER
        self.in_flight.clear()

    def welcome(self, pid: int) -> None:
        """It has loaded its verifiers."""
        self.state, self.due, self.pid = "ready", _NEVER, pid
        self._memory_at_start = _resident_bytes(pid)

    @property
    def has_room(self) -> bool:
        """Whether it may be given another request."""
        return self.state == "ready" and len(self.in_flight) < self._depth and len(self.outbox) < _MAX_OUTBOX

    def ask(self, item: Item) -> None:
        """Give it an item."""
        request = Request(item)
        self.in_flight.append(request)
        prompt = item.prompt
        # ASCII JSON carries anything a Python string can hold, lone surrogates and NULs too.
        self.outbox += json.dumps([request.token, prompt.source, prompt.answer, item.response]).encode("ascii") + b"\n"
        if len(self.in_flight) == 1:
            self._start_clock()

    def take_back(self) -> list[Item]:
        """The items behind the one it is at, withdrawn."""
        withdrawn = [request for request in list(self.in_flight)[1:] if not request.withdrawn]
        for request in withdrawn:
            request.withdrawn = True
            self.outbox += json.dumps(request.token).encode("ascii") + b"\n"
        self._depth = 1
        return [request.item for request in withdrawn]

    @property
    def lingers_at(self) -> float:
        """When the items behind the first are to be taken back; never where there are none."""
        waits = self.state == "ready" and any(not request.withdrawn for request in list(self.in_flight)[1:])
        return self._turn_began + _PATIENCE_S if waits else _NEVER

    def expects(self, token: str) -> bool:
        """Whether an answer with this token is the one due; none can be forged without having read its request."""
        return bool(self.in_flight) and token == self.in_flight[0].token

    def next_turn(self, took: float | None) -> Item:
        """It goes on to the next item: the first was answered in so many seconds, or was withdrawn in time (None)."""
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
        """Whether it had better be replaced: much served, or half of the memory that it may yet take is taken."""
        if self.served >= _MAX_SERVED:
            return True
        bound = (self._memory + self._memory_at_start) / 2
        return self.served % _MEASURE_EVERY == 0 and _resident_bytes(self.pid) > bound

    def end(self, cause: Cause | None) -> None:
        """Have it killed with all that it started. Its warden reports when that is done."""
        if self.state not in ("starting", "ready"):
            return
        self.state, self.cause, self.due = "ending", cause, time.monotonic() + _END_LIMIT_S
        with suppress(ConnectionError):
            self.control.send(KILL)

    def flush(self) -> None:
        """Write what the pipe takes now."""
        try:
            while self.outbox:
                del self.outbox[: os.write(self.requests_fd, self.outbox)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outbox.clear()  # it is dead; its warden will say so

    def read_answers(self) -> tuple[list[Any], str]:
        """The answers that have arrived, and why nothing further can be believed, if so ("end" at their end)."""
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
        """What the warden reports, and whether the warden itself has gone."""
        try:
            data = self.control.recv(1 << 16)
        except BlockingIOError:
            return [], False
        except ConnectionError:
            data = b""
        *lines, self._reports = (self._reports + data).split(b"\n")
        return [json.loads(line) for line in lines], not data

    def last_words(self) -> str:
        """The last line that warden or worker wrote on stderr before the worker was ready, to follow a message."""
        if not self._stderr.closed:
            self._stderr.seek(0)
            self._words = self._stderr.read().decode("utf-8", "replace").strip()
        return f" ({self._words.splitlines()[-1][:300]})" if self._words else ""

    def close(self, patience_s: float = _END_LIMIT_S) -> str:
        """End the warden, and with it all below it; say how it ended. It is killed after ``patience_s``."""
        self._close_pipes()
        with suppress(OSError):  # the warden has gone already
            self.control.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold the socket open
        self.control.close()
        try:
            self._warden.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._warden.kill()
            self._warden.wait()
        if self._warden.returncode and self.pid:  # it did not end in peace: what it kept may be left
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.last_words()
        self._stderr.close()
        code = self._warden.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def _start_clock(self) -> None:
        self._turn_began = time.monotonic()
        self.due = self._turn_began + self.in_flight[0].item.deadline_s if self.in_flight else _NEVER

    def _close_pipes(self) -> None:
        for fd in (self.requests_fd, self.answers_fd):
            if fd >= 0:
                os.close(fd)
        self.requests_fd = self.answers_fd = -1


def _start_warden(settings: Settings, control: socket.socket, stderr_fd: int) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as file:  # not arguments: options may hold what `ps` must not show
        file.write(json.dumps(settings._asdict()).encode("ascii"))
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "forkrl.rewards.warden", str(control.fileno())],
            pass_fds=[control.fileno()],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=stderr_fd,
            env=child_environment(1) | {"PYTHONHASHSEED": "0"},  # the same hash order, hence the same verdicts
            start_new_session=True,
        )


def _resident_bytes(pid: int) -> int:
    """Memory that a process really takes; 0 where the system does not tell, or it has gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
