"""Keeps one verifier process: forks it, and leaves nothing of it behind.

``WorkerProcess`` starts it as ``python -m forkrl.rewards.warden``. It runs no verifier itself, so none can hang it, and
it has one thread, so it can fork safely and in milliseconds. On Linux it adopts the orphans below it: whatever a
verifier starts, in its own session or not, becomes a child of the warden once the verifier is dead, and is killed. When
the pool's process ends, however it ends, the control socket closes, which ends the verifier too.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from forkrl.rewards.worker import describe, limit_memory, load_verifier, send, serve

START, KILL = b"s", b"k"
"""Commands on the control socket; START carries the worker's ends of its two pipes."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    """Obey the control socket given as an argument until it closes. Standard input holds the settings."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    settings = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    path = ""
    try:
        limit_memory(settings["memory_mb"] << 20)
        for path, *_ in settings["verifiers"].values():
            # Our verifiers start no threads, so they are loaded before the fork. Others might.
            if path.startswith("forkrl."):
                load_verifier(path)
    except BaseException as error:
        send(control.fileno(), {"failed": describe(error), "path": path})
        return
    _Warden(control, settings["verifiers"]).run()


class _Warden:
    def __init__(self, control: socket.socket, verifiers: Mapping[str, Any]) -> None:
        self._control = control
        self._verifiers = verifiers
        self._worker: int | None = None
        self._exits, told = os.pipe()
        os.set_blocking(self._exits, False)
        os.set_blocking(told, False)
        self._told = told
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler the signal wakes nobody
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._exits, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._exits in ready:
                os.read(self._exits, 1 << 12)
                self._look_for_the_dead()
            if self._control.fileno() in ready and not self._obey():
                return

    def _obey(self) -> bool:
        """Execute one command; False once the socket is closed."""
        try:
            command, fds, *_ = socket.recv_fds(self._control, 1, 2)
        except ConnectionError:
            command, fds = b"", []
        if command == START:
            self._start(*fds)
        elif self._worker is not None:  # else it ended by itself, which is reported
            how = self._bury(self._worker)
            if command == KILL:
                self._report(how)
        return bool(command)

    def _start(self, requests_fd: int, answers_fd: int) -> None:
        warden = os.getpid()
        self._worker = os.fork()
        if self._worker == 0:
            self._become_worker(warden, requests_fd, answers_fd)
        os.close(requests_fd)
        os.close(answers_fd)

    def _become_worker(self, warden: int, requests_fd: int, answers_fd: int) -> None:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            os.close(self._exits)
            os.close(self._told)
            os.setsid()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == warden:  # it may have died before the signal was armed
                serve(requests_fd, answers_fd, self._verifiers)
                code = 0
        finally:
            os._exit(code)  # none of the warden's own code may run here

    def _look_for_the_dead(self) -> None:
        """Reap ended processes, including adopted orphans; report the worker."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._worker:
                self._bury(pid, status)
                self._report(status)
                return

    def _report(self, status: int) -> None:
        self._worker = None
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        with suppress(ConnectionError):  # the socket is closed; ``_obey`` sees that
            send(self._control.fileno(), {"ended": how})

    def _bury(self, worker: int, status: int | None = None) -> int:
        """Kill the worker, unless its status is known, and everything below it; return the worker's status.

        A killed process leaves its children to the warden, so killing the warden's children until none are left reaches
        all generations.
        """
        if status is None:
            os.kill(worker, signal.SIGKILL)  # it is not reaped yet, so this is still its id
        with suppress(ProcessLookupError, PermissionError):  # macOS forbids it for a group of dead processes
            os.killpg(worker, signal.SIGKILL)
        while True:
            try:
                pid, ended = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                assert status is not None
                return status
            if pid == worker:
                status = ended
            elif pid == 0:
                for child in _children():
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                time.sleep(0.001)


def _children() -> list[int]:
    """Child processes; empty without /proc."""
    me, found = os.getpid(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is gone
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[1]) == me:
                found.append(int(folder.name))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    main()
