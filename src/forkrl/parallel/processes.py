"""Child processes that import what this one can and do not outlive it; memory of this process."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def return_freed_memory() -> None:
    """Give freed memory back to the system, which glibc does by itself only at the end of its heap."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def child_environment(threads: int) -> dict[str, str]:
    """Environment for a child process with this process's import path and current folder."""
    here = str(Path.cwd())
    folders = [*(folder or here for folder in sys.path), here]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": str(threads)}


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
