"""The pool's end of one worker and its supervisor; only ``close`` blocks."""

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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from forkrl.parallel.processes import child_environment
from forkrl.rewards.worker import KILL, START, Verifiers, describe_exit

if TYPE_CHECKING:
    from forkrl.rewards.pool import Item

_START_TIMEOUT_S = 60.0
"""For the interpreter and the verifier's imports on a loaded machine."""
_END_TIMEOUT_S = 10.0
"""For killing a worker and everything below it."""
_STALL_TIMEOUT_S = 0.1
"""If an item takes longer, those queued behind it go to other workers."""
_PIPELINE = 16
"""Requests sent ahead to a quick worker, so that it need not wait for the pool between two answers."""
_QUICK_S = 0.01
"""A worker is quick if its last answer took less."""
_MAX_OUTBOX = 1 << 20
"""Bytes queued for a worker above which it gets no further request."""
_MAX_LINE = 1 << 14
"""Longest valid answer."""
_MAX_SERVED = 20_000
"""Answers after which a worker is replaced, against leaks in a verifier."""
_MEASURE_EVERY = 32
"""Answers between two measurements of a worker's memory."""
_NEVER = float("inf")


class Settings(NamedTuple):
    """What every worker of a pool starts with."""

    verifiers: Verifiers
    memory_mb: int


class Failure(NamedTuple):
    """What the current item of a killed worker fails with."""

    kind: str
    message: str


@dataclass(slots=True)
class Request:
    """An item given to a worker. ``withdrawn``: it was requeued, and the worker was told."""

    item: Item
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    withdrawn: bool = False


class WorkerProcess:
    """A worker process, restarted by its supervisor when needed.

    Attributes:
        state: "starting" until the verifiers are loaded, "ready", "ending" while it is killed.
        due: deadline (monotonic) of the worker's start, next answer or end.
        served: answers since its start; before the first one, a failure is its first item's fault.
        failure: in state "ending", of the current item; None where it is not to blame.
        in_flight: the requests it has, the current one first.
    """

    def __init__(self, settings: Settings) -> None:
        self.control, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._stderr_text = ""
        self._memory = settings.memory_mb << 20
        try:
            self.supervisor = _start_supervisor(settings, theirs, self._stderr.fileno())
        except BaseException:
            self.control.close()
            self._stderr.close()
            raise
        finally:
            theirs.close()
        self.control.setblocking(False)
        self._reports = b""
        self._begin()

    def restart(self) -> None:
        """Have the supervisor fork a new worker, after the end of the old one."""
        self.channel.close()
        self._begin()

    def _begin(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs, suppress(ConnectionError):  # the supervisor is dead; its closed socket will say so
            socket.send_fds(self.control, [START], [theirs.fileno()])
        self.state: Literal["starting", "ready", "ending"] = "starting"
        self.due = time.monotonic() + _START_TIMEOUT_S
        self.failure: Failure | None = None
        self.pid = self.served = 0
        self.in_flight: deque[Request] = deque()
        self._outbox, self._inbox = bytearray(), b""
        self._turn_began, self._depth, self._memory_at_start = 0.0, 1, 0

    def set_ready(self, pid: int) -> None:
        """Its verifiers are loaded."""
        self.state, self.due, self.pid = "ready", _NEVER, pid
        self._memory_at_start = _resident_bytes(pid)

    @property
    def has_room(self) -> bool:
        """Whether it can take another request."""
        return self.state == "ready" and len(self.in_flight) < self._depth and len(self._outbox) < _MAX_OUTBOX

    @property
    def has_outbox(self) -> bool:
        return self.state == "ready" and bool(self._outbox)

    def request(self, item: Item) -> None:
        """Queue an item for it."""
        request = Request(item)
        self.in_flight.append(request)
        self._send([request.token, item.prompt.source, item.prompt.answer, item.response])
        if len(self.in_flight) == 1:
            self._start_turn()

    def withdraw(self) -> list[Item]:
        """Withdraw and return the items behind the current one."""
        withdrawn = self._withdrawable()
        for request in withdrawn:
            request.withdrawn = True
        self._send(len(withdrawn))
        self._depth = 1
        return [request.item for request in withdrawn]

    @property
    def stalls_at(self) -> float:
        """When to withdraw the items behind the current one; never if there are none."""
        stalls = self.state == "ready" and self._withdrawable()
        return self._turn_began + _STALL_TIMEOUT_S if stalls else _NEVER

    def expects(self, token: str) -> bool:
        """Whether this token belongs to the answer due; only who has read the request can know it."""
        return bool(self.in_flight) and token == self.in_flight[0].token

    def end_turn(self, took: float | None) -> Item:
        """Take the current item off: it was answered in ``took`` seconds, or withdrawn (None)."""
        item = self.in_flight.popleft().item
        if took is not None:
            self.served += 1
            self._depth = _PIPELINE if took < _QUICK_S else 1
        self._start_turn()
        return item

    def is_worn(self) -> bool:
        """Whether to replace it: it has served many items, or has used half of its free memory."""
        if self.served >= _MAX_SERVED:
            return True
        bound = (self._memory + self._memory_at_start) / 2
        return self.served % _MEASURE_EVERY == 0 and _resident_bytes(self.pid) > bound

    def kill(self, failure: Failure | None) -> None:
        """Have it killed with everything it started; its supervisor reports the end."""
        if self.state != "ending":
            self.state, self.failure, self.due = "ending", failure, time.monotonic() + _END_TIMEOUT_S
            with suppress(ConnectionError):
                self.control.send(KILL)

    def flush(self) -> None:
        """Write what fits into the socket."""
        try:
            while self._outbox:
                del self._outbox[: self.channel.send(self._outbox)]
        except BlockingIOError:
            pass
        except ConnectionError:
            self._outbox.clear()  # it is dead; its supervisor reports that

    def read_answers(self) -> tuple[list[Any], bool]:
        """The answers that have arrived, None for an invalid one, and whether they have ended."""
        lines, self._inbox, ended = _read_lines(self.channel, self._inbox)
        if len(self._inbox) > _MAX_LINE:
            lines.append(b"")
        return list(map(_parse, lines)), ended

    def read_reports(self) -> tuple[list[str], bool]:
        """How workers have ended, and whether the supervisor itself has."""
        lines, self._reports, ended = _read_lines(self.control, self._reports)
        return list(map(_parse, lines)), ended

    def last_stderr_line(self) -> str:
        """The last line on stderr before the worker was ready, in brackets to follow a message."""
        if not self._stderr.closed:
            self._stderr.seek(0)
            self._stderr_text = self._stderr.read().decode("utf-8", "replace").strip()
        return f" ({self._stderr_text.splitlines()[-1][:300]})" if self._stderr_text else ""

    def close(self, timeout_s: float | None = None) -> str:
        """End the supervisor and all processes below it, by force after ``timeout_s``; say how it ended."""
        self.channel.close()
        with suppress(OSError):  # the supervisor is already gone
            self.control.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold the socket open
        self.control.close()
        try:
            self.supervisor.wait(_END_TIMEOUT_S if timeout_s is None else timeout_s)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()
        code = self.supervisor.returncode
        if code and self.pid:  # it ended abnormally and may have left its worker
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.last_stderr_line()
        self._stderr.close()
        return describe_exit(code)

    def _send(self, message: object) -> None:
        # ASCII JSON carries anything a Python string can hold, lone surrogates and NULs too.
        self._outbox += json.dumps(message).encode("ascii") + b"\n"

    def _start_turn(self) -> None:
        self._turn_began = time.monotonic()
        self.due = self._turn_began + self.in_flight[0].item.timeout_s if self.in_flight else _NEVER

    def _withdrawable(self) -> list[Request]:
        return [request for request in list(self.in_flight)[1:] if not request.withdrawn]


def _start_supervisor(settings: Settings, control: socket.socket, stderr_fd: int) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as file:  # not as arguments, which `ps` shows: options may hold credentials
        file.write(json.dumps(settings._asdict()).encode("ascii"))
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "forkrl.rewards.worker", str(control.fileno())],
            pass_fds=[control.fileno()],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=stderr_fd,
            env=child_environment(1) | {"PYTHONHASHSEED": "0"},  # the same hash order, hence the same results
            start_new_session=True,
        )


def _read_lines(source: socket.socket, begun: bytes) -> tuple[list[bytes], bytes, bool]:
    """The lines that have arrived, given the beginning of the first; that of the next one; and whether it has ended."""
    try:
        data = source.recv(1 << 16)
    except BlockingIOError:
        return [], begun, False
    except ConnectionError:
        data = b""
    *lines, rest = (begun + data).split(b"\n")
    return lines, rest, not data


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if unknown."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
