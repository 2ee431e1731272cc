"""The pool's side of one worker and its supervisor; only ``close`` blocks."""

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
    from forkrl.rewards.batch import Item

_START_TIMEOUT_S = 60.0
"""For the interpreter and the verifier's imports on a loaded machine."""
_END_TIMEOUT_S = 10.0
"""For killing a worker and its descendants."""
_STALL_TIMEOUT_S = 0.1
"""After this, the items queued behind a slow one move to other workers."""
_PIPELINE = 16
"""Requests sent ahead to a quick worker, to hide the pool's latency."""
_QUICK_S = 0.01
"""A worker is quick if its last answer took less."""
_MAX_OUTBOX = 1 << 20
"""Bytes queued for a worker above which it gets no more requests."""
_MAX_LINE = 1 << 14
_MAX_SERVED = 20_000
"""Answers after which a worker is replaced, in case a verifier leaks."""
_MEASURE_EVERY = 32
"""Answers between two memory measurements."""
_NEVER = float("inf")


class Settings(NamedTuple):
    verifiers: Verifiers
    memory_mb: int


class Failure(NamedTuple):
    kind: str
    message: str


@dataclass(slots=True)
class Request:
    """An item sent to a worker. ``withdrawn``: it was requeued and the worker was notified."""

    item: Item
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    withdrawn: bool = False


class WorkerProcess:
    """A worker process, restarted by its supervisor when needed.

    ``state`` is "starting" until the verifiers are loaded, "ready", or "ending" while it is being killed. ``due`` is
    the monotonic deadline for its start, next answer or end; ``failure`` (when ending) is the current item's, None if
    it is not to blame; ``in_flight`` holds the requests sent, the current one first.
    """

    def __init__(self, settings: Settings) -> None:
        self.control, theirs = socket.socketpair()
        theirs.setblocking(True)  # also if socket.setdefaulttimeout was called
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
        self.channel.close()
        self._begin()

    def _begin(self) -> None:
        self.channel, theirs = socket.socketpair()
        theirs.setblocking(True)
        self.channel.setblocking(False)
        with theirs, suppress(ConnectionError):  # the supervisor is dead; its closed socket reports that
            socket.send_fds(self.control, [START], [theirs.fileno()])
        self.state: Literal["starting", "ready", "ending"] = "starting"
        self.due = time.monotonic() + _START_TIMEOUT_S
        self.failure: Failure | None = None
        self.pid = self.served = 0
        self.in_flight: deque[Request] = deque()
        self._outbox, self._inbox = bytearray(), b""
        self._turn_began, self._depth, self._memory_at_start = 0.0, 1, 0

    def set_ready(self, pid: int) -> None:
        self.state, self.due, self.pid = "ready", _NEVER, pid
        self._memory_at_start = _resident_bytes(pid)

    @property
    def has_room(self) -> bool:
        return self.state == "ready" and len(self.in_flight) < self._depth and len(self._outbox) < _MAX_OUTBOX

    @property
    def has_outbox(self) -> bool:
        return self.state == "ready" and bool(self._outbox)

    def request(self, item: Item) -> None:
        request = Request(item)
        self.in_flight.append(request)
        self._send([request.token, item.prompt.source, item.prompt.answer, item.response, item.prompt.text])
        if len(self.in_flight) == 1:
            self._start_turn()

    def withdraw(self) -> list[Item]:
        """Withdraw and return the items queued behind the current one."""
        withdrawn = self._withdrawable()
        for request in withdrawn:
            request.withdrawn = True
        self._send(len(withdrawn))
        self._depth = 1
        return [request.item for request in withdrawn]

    @property
    def stalls_at(self) -> float:
        """When to withdraw the items behind the current one."""
        stalls = self.state == "ready" and self._withdrawable()
        return self._turn_began + _STALL_TIMEOUT_S if stalls else _NEVER

    def expects(self, token: str) -> bool:
        """Whether this is the secret token of the current request; only a process that read the request knows it."""
        return bool(self.in_flight) and token == self.in_flight[0].token

    def end_turn(self, took: float | None) -> Item:
        """Remove the current item: answered in ``took`` seconds, or withdrawn (None)."""
        item = self.in_flight.popleft().item
        if took is not None:
            self.served += 1
            self._depth = _PIPELINE if took < _QUICK_S else 1
        self._start_turn()
        return item

    def is_worn(self) -> bool:
        """Whether to replace it: many items served, or half of its free memory used."""
        if self.served >= _MAX_SERVED:
            return True
        bound = (self._memory + self._memory_at_start) / 2
        return self.served % _MEASURE_EVERY == 0 and _resident_bytes(self.pid) > bound

    def kill(self, failure: Failure | None) -> None:
        """Kill it with all its descendants; the supervisor reports the end."""
        if self.state != "ending":
            self.state, self.failure, self.due = "ending", failure, time.monotonic() + _END_TIMEOUT_S
            with suppress(ConnectionError):
                self.control.send(KILL)

    def flush(self) -> None:
        try:
            while self._outbox:
                del self._outbox[: self.channel.send(self._outbox)]
        except BlockingIOError:
            pass
        except ConnectionError:
            self._outbox.clear()  # dead; the supervisor reports that

    def read_answers(self) -> tuple[list[Any], bool]:
        """The answers that have arrived (None for an invalid one), and whether the channel is closed."""
        lines, self._inbox, ended = _read_lines(self.channel, self._inbox)
        if len(self._inbox) > _MAX_LINE:
            lines.append(b"")
        return list(map(_parse, lines)), ended

    def read_reports(self) -> tuple[list[str], bool]:
        """How workers ended, and whether the supervisor itself has ended."""
        lines, self._reports, ended = _read_lines(self.control, self._reports)
        return list(map(_parse, lines)), ended

    def last_stderr_line(self) -> str:
        """The last stderr line before the worker was ready, in brackets for a message."""
        if not self._stderr.closed:
            self._stderr.seek(0)
            self._stderr_text = self._stderr.read().decode("utf-8", "replace").strip()
        return f" ({self._stderr_text.splitlines()[-1][:300]})" if self._stderr_text else ""

    def hang_up(self) -> None:
        """Tell the supervisor to end itself and its descendants; does not wait."""
        self.channel.close()
        with suppress(OSError):  # the supervisor has already ended
            self.control.shutdown(socket.SHUT_RDWR)  # needed if a fork of this process holds the socket open
        self.control.close()

    def close(self, timeout_s: float | None = None) -> str:
        """End the supervisor and its descendants, by force after ``timeout_s``; return how it ended."""
        self.hang_up()
        try:
            self.supervisor.wait(_END_TIMEOUT_S if timeout_s is None else timeout_s)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()
        code = self.supervisor.returncode
        if code and self.pid:  # abnormal end: its worker may still be running
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.last_stderr_line()
        self._stderr.close()
        return describe_exit(code)

    def _send(self, message: object) -> None:
        # ASCII JSON can encode any Python string, including lone surrogates and NULs.
        self._outbox += json.dumps(message).encode("ascii") + b"\n"

    def _start_turn(self) -> None:
        self._turn_began = time.monotonic()
        self.due = self._turn_began + self.in_flight[0].item.timeout_s if self.in_flight else _NEVER

    def _withdrawable(self) -> list[Request]:
        return [request for request in list(self.in_flight)[1:] if not request.withdrawn]


def _start_supervisor(settings: Settings, control: socket.socket, stderr_fd: int) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as file:  # not in argv, which `ps` shows: options may hold credentials
        file.write(json.dumps(settings._asdict()).encode("ascii"))
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "forkrl.rewards.worker", str(control.fileno())],
            pass_fds=[control.fileno()],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=stderr_fd,
            env=child_environment(1) | {"PYTHONHASHSEED": "0"},  # fixed hash order for reproducible results
            start_new_session=True,
        )


def _read_lines(source: socket.socket, begun: bytes) -> tuple[list[bytes], bytes, bool]:
    """Complete lines read, given a partial first line; the new partial line; whether the socket is closed."""
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
