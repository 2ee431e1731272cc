"""One program inside bubblewrap, monitored from outside until all its processes have ended.

Its input is a sealed memory file, so a program that never reads cannot block the verifier. Limits across processes
(memory, CPU time, number of files), which rlimits cannot express, are checked every 50 ms via the sandbox's ``/proc``.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

from forkrl.rewards.code.sandbox import SandboxUnavailableError

_START_LIMIT_S = 20.0
"""For bubblewrap and the interpreter on a loaded machine; not part of a program's time."""
_WALL_PER_CPU_S = 2
"""Wall-clock seconds per second of CPU time, for loaded machines."""
_WATCH_S = 0.05
_MAX_FILES = 10_000
_READY = b"ready\n"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class SandboxedProcess:
    """A running program; after the ``with`` block all its processes have ended.

    ``memory`` (bytes) counts all processes. With ``answers``, the driver's private pipe is read and standard output is
    discarded. ``user`` None keeps our own user. ``first_pid`` is process 1 as seen from outside; ``failure`` is the
    exceeded limit ("time", "memory", "output" or "files"), or "". Raises SandboxUnavailableError if it does not start.
    """

    def __init__(
        self,
        bubblewrap: Sequence[str],
        driver: Sequence[str],
        *,
        limits: Sequence[int],
        program: bytes,
        stdin: bytes,
        seccomp: bytes,
        user: int | None,
        memory: int,
        max_output: int,
        answers: bool,
    ) -> None:
        self._memory, self._max_output = memory, max_output
        self.failure, self._written = "", 0
        self._next_watch = self._deadline = self._cpu_allowed = 0.0
        self._ours = ExitStack()
        self._first: int | None = None
        with ExitStack() as theirs:
            stdin_fd, program_fd, seccomp_fd = (_sealed_file(theirs, data) for data in (stdin, program, seccomp))
            stdout, stdout_end = _pipe(self._ours, theirs)
            private, private_end = _pipe(self._ours, theirs)
            self._stderr, stderr_end = _pipe(self._ours, theirs)
            self._info, info_end = _pipe(self._ours, theirs)
            lifeline, lifeline_end = socket.socketpair()
            self._ours.enter_context(lifeline)
            theirs.enter_context(lifeline_end)
            fds = (private_end, lifeline_end.fileno(), program_fd)
            outer = [*bubblewrap, "--seccomp", str(seccomp_fd), "--info-fd", str(info_end), "--"]
            try:
                self._process = subprocess.Popen(
                    [*outer, *driver, *map(str, (*fds, *limits))],
                    stdin=stdin_fd,
                    stdout=subprocess.DEVNULL if answers else stdout_end,
                    stderr=stderr_end,
                    pass_fds=(seccomp_fd, info_end, *fds),
                    cwd="/",
                    env={},
                    user=user,
                    group=user,
                    extra_groups=None if user is None else (),
                )
            except (OSError, subprocess.SubprocessError) as error:
                self._ours.close()
                raise SandboxUnavailableError(f"bubblewrap cannot be started: {error}") from error
        try:
            self._await_ready(private)
            self._look_inside()
        except BaseException:
            self.close()
            raise
        self._output = private if answers else stdout
        self._polled = select.poll()
        self._polled.register(self._output, select.POLLIN)
        lifeline.send(b"g")

    def __enter__(self) -> SandboxedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def allow(self, seconds: float, deadline: float) -> None:
        """Allow ``seconds`` of CPU time from now, twice that in wall time, but not past ``deadline`` (monotonic)."""
        _, cpu = self._usage()
        self._cpu_allowed = cpu + seconds * _TICKS_PER_S
        self._deadline = min(time.monotonic() + _WALL_PER_CPU_S * seconds, deadline)

    def output(self) -> Iterator[bytes]:
        """Output chunks until EOF or a limit, which sets ``failure``."""
        while not self.failure:
            now = time.monotonic()
            if now >= self._next_watch:
                self.failure = self._exceeded()
                self._next_watch = now + _WATCH_S
            if now >= self._deadline:
                self.failure = "time"
            if not self.failure and self._polled.poll(1000 * min(_WATCH_S, self._deadline - now)):
                data = os.read(self._output, 1 << 16)
                self._written += len(data)
                if self._written > self._max_output:
                    self.failure = "output"
                elif not data:
                    return
                else:
                    yield data

    def exit_code(self) -> int:
        """The program's exit code; the sandbox ends when its stdout closes."""
        return self._process.wait()

    def close(self) -> None:
        if self._first is None:
            self._process.kill()  # bubblewrap's processes end together
        else:
            with suppress(ProcessLookupError):  # ends all processes inside, then bubblewrap
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
        self._process.wait()
        self._ours.close()

    def _await_ready(self, private: int) -> None:
        waiting = select.poll()
        waiting.register(private, select.POLLIN)
        if not waiting.poll(1000 * _START_LIMIT_S):
            raise SandboxUnavailableError(f"bubblewrap did not start within {_START_LIMIT_S:g} s")
        if os.read(private, len(_READY)) != _READY:
            self._process.wait()
            words = os.read(self._stderr, 4096).decode("utf-8", "replace").strip().splitlines()
            raise SandboxUnavailableError(words[-1] if words else f"bubblewrap ended with {self._process.returncode}")

    def _look_inside(self) -> None:
        """Open process 1, the sandbox's /proc and its /tmp before the program starts."""
        self.first_pid = int(json.loads(os.read(self._info, 4096))["child-pid"])
        try:
            self._first = _held(self._ours, os.pidfd_open(self.first_pid))
            root = f"/proc/{self.first_pid}/root"
            self._proc = _held(self._ours, os.open(f"{root}/proc", os.O_RDONLY | os.O_DIRECTORY))
            self._tmp = _held(self._ours, os.open(f"{root}/tmp", os.O_RDONLY | os.O_DIRECTORY))
        except OSError as error:
            raise SandboxUnavailableError(f"the sandbox cannot be watched: {error}") from error

    def _exceeded(self) -> str:
        memory, cpu = self._usage()
        files = os.fstatvfs(self._tmp)
        if memory > self._memory:
            return "memory"
        if cpu > self._cpu_allowed:
            return "time"
        return "files" if files.f_files - files.f_ffree > _MAX_FILES else ""

    def _usage(self) -> tuple[int, int]:
        """Memory (bytes) and CPU ticks of all processes inside, including reaped children."""
        pages = ticks = 0
        with suppress(ProcessLookupError, FileNotFoundError):  # the sandbox has ended
            for name in os.listdir(self._proc):  # noqa: PTH208  # an open folder has no path
                if name.isdigit() and (stat := _read_stat(self._proc, name)):
                    ticks += sum(map(int, stat[11:15]))
                    pages += int(stat[21])
        return pages * _PAGE, ticks


def _read_stat(proc: int, pid: str) -> list[bytes]:
    """The fields after the process name; [] if the process has just ended."""
    try:
        fd = os.open(f"{pid}/stat", os.O_RDONLY, dir_fd=proc)
    except (ProcessLookupError, FileNotFoundError):
        return []
    try:
        return os.read(fd, 4096).rpartition(b")")[2].split()
    except ProcessLookupError:
        return []
    finally:
        os.close(fd)


def _held(files: ExitStack, fd: int) -> int:
    files.callback(os.close, fd)
    return fd


def _pipe(readers: ExitStack, writers: ExitStack) -> tuple[int, int]:
    reader, writer = os.pipe()
    return _held(readers, reader), _held(writers, writer)


def _sealed_file(files: ExitStack, data: bytes) -> int:
    """An immutable memory file, positioned at its start."""
    fd = _held(files, os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd
