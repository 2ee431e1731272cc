"""Child processes that import what this one can and do not outlive it; memory of this process."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path

from forkrl.errors import printable


def return_freed_memory() -> None:
    """Give freed memory back to the system, which glibc does by itself only at the end of its heap."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def allow_many_files() -> None:
    """Raise this process's limit of open files and connections, often 1,024, as far as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS calls the limit infinite, and refuses that
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def child_environment(threads: int) -> dict[str, str]:
    """Environment for a child process with this process's import path and current folder."""
    here = str(Path.cwd())
    folders = [*(folder or here for folder in sys.path), here]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": str(threads)}


class Child:
    """A process that runs ``program``, connected by a pipe; it is killed when this process closes it or ends.

    Its arguments are the file descriptors of its end of the pipe and of ``fds``, which it inherits, then ``numbers``.
    ``quiet``: what it prints is not shown, except for the last line if it exits by itself.
    """

    def __init__(
        self,
        program: str,
        environment: Mapping[str, str],
        *,
        fds: Sequence[int] = (),
        numbers: Sequence[int] = (),
        quiet: bool = False,
    ) -> None:
        self.connection, theirs = Pipe()
        their_lifeline, self._lifeline = os.pipe()
        inherited = (their_lifeline, theirs.fileno(), *fds)
        self._printed = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - open as long as it lives
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PRELUDE + program, *map(str, (*inherited, *numbers))],
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=self._printed,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            self.connection.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(their_lifeline)

    def close(self) -> None:
        """Kill it, if it still runs."""
        if not self.connection.closed:
            self.connection.close()
            os.close(self._lifeline)
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self._printed is not None:
            self._printed.close()

    def death(self) -> str:
        """How a process that no longer answers ended."""
        code = self.process.wait()
        if code >= 0:
            return f"exited with code {code}{self._last_line()}"
        hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def _last_line(self) -> str:
        if self._printed is None or self._printed.closed:
            return ""
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").strip().splitlines()
        return f" ({printable(lines[-1][:300])})" if lines else ""


# Only the first process handles a stop signal sent to the whole job; it may finish its step.
_PRELUDE = """
import signal, sys
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, signal.SIG_IGN)
from forkrl.parallel.processes import die_with_parent
die_with_parent(int(sys.argv.pop(1)))  # before imports that take seconds
"""


def die_with_parent(lifeline_fd: int) -> None:
    """SIGKILL this process group when the parent's end of the lifeline closes, even inside C code.

    Not PR_SET_PDEATHSIG: that kills a healthy worker when the parent *thread* that started it ends. Linux only.
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
        try:
            closed = os.read(lifeline_fd, 1) == b""  # the parent may have died before the signal was armed
        except BlockingIOError:
            closed = False
        if closed:
            os.killpg(os.getpgrp(), signal.SIGKILL)
