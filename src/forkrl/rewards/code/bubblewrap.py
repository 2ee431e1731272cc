"""Runs programs in bubblewrap on this machine.

A program sees only Python's standard library and the C libraries (read-only), a size-limited empty /tmp and its own
processes: no network, other files, environment or privileges, and an unused user id.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from forkrl.config import SandboxConfig
from forkrl.errors import UserError
from forkrl.rewards.code.sandbox import USE_SERVER, Kind, Outcome, driver
from forkrl.rewards.code.sandboxed_process import SandboxedProcess
from forkrl.rewards.code.seccomp import build_filter, supports

_USER = 65533
"""User id of programs, also outside the sandbox if ForkRL runs as root; no system assigns it."""
_ADDRESS_SPACE_BEYOND = 256 << 20
"""Address space on top of the memory limit."""
_OLDEST = (0, 8)
_INSTALL = "apt-get install bubblewrap"


class Bubblewrap:
    """A local sandbox; raises UserError if bubblewrap is missing, too old or unsupported here."""

    def __init__(self, config: SandboxConfig) -> None:
        self._limits = config
        bwrap = _find_bubblewrap()
        self._seccomp = build_filter(platform.machine())
        self._python, mounts = _find_python(config.python)
        user = _USER if os.geteuid() == 0 else None
        # The programs' user cannot read root's own folders.
        behind_doors = user is not None and not all(map(_open_to_all, mounts))
        self._user = None if behind_doors else user
        self._command = _command(bwrap, mounts, config.files_mb << 20, behind_doors=behind_doors)

    def run_program(self, source: str, stdin: str, *, max_output: int, deadline: float) -> Outcome:
        text, seconds = stdin.encode("utf-8", "replace"), self._limits.seconds
        with self._start("program", source, text, cpu_seconds=seconds, max_output=max_output) as process:
            process.allow(seconds, deadline)
            printed = b"".join(process.output())
            return Outcome(printed, process.failure or ("exit" if process.exit_code() else ""))

    @contextmanager
    def answers(
        self, kind: Kind, source: str, request: str, *, cpu_seconds: float, max_output: int, deadline: float
    ) -> Iterator[Iterator[bytes]]:
        """See ``Sandbox``; every call has the time limit of one test."""
        text = request.encode("ascii")
        with self._start(kind, source, text, cpu_seconds=cpu_seconds, max_output=max_output) as process:
            yield self._lines(process, deadline)

    def _lines(self, process: SandboxedProcess, deadline: float) -> Iterator[bytes]:
        rest = b""
        process.allow(self._limits.seconds, deadline)
        for data in process.output():
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
            if lines:
                process.allow(self._limits.seconds, deadline)

    def _start(self, kind: str, source: str, stdin: bytes, *, cpu_seconds: float, max_output: int) -> SandboxedProcess:
        limits = self._limits
        memory = limits.memory_mb << 20
        ours = 2 if kind == "asserts" else 1
        text, run = driver(kind)
        return SandboxedProcess(
            self._command,
            [self._python, "-s", "-S", "-B", "-X", "utf8", "-c", f"{text}\n\nenter_sandbox({run})\n"],
            limits=(
                memory + _ADDRESS_SPACE_BEYOND,
                int(cpu_seconds) + 1,
                limits.files_mb << 20,
                limits.processes + ours,
            ),
            program=source.encode("utf-8", "replace"),
            stdin=stdin,
            seccomp=self._seccomp,
            user=self._user,
            memory=memory,
            max_output=max_output,
            answers=kind != "program",
        )


def _command(bwrap: str, mounts: Sequence[str], file_bytes: int, *, behind_doors: bool) -> list[str]:
    """The command line up to the descriptors and the program inside."""
    outer: list[str] = []
    shown = {path: path for path in mounts}
    if behind_doors:
        # As root: bind the interpreter where the programs' user can reach it, then switch to that user.
        shown = {path: f"/tmp/{number}" for number, path in enumerate(mounts)}
        outer = [bwrap, "--die-with-parent", "--dev-bind", "/", "/", "--tmpfs", "/tmp"]
        outer += [word for path, place in shown.items() for word in ("--ro-bind", path, place)]
        outer += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--", "setpriv"]
        outer += ["--reuid", str(_USER), "--regid", str(_USER), "--clear-groups", "--"]
    return [
        *outer, bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--as-pid-1", "--cap-drop", "ALL", "--uid", str(_USER), "--gid", str(_USER), "--hostname", "sandbox",
        "--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8",
        "--setenv", "PYTHONHASHSEED", "0",
        *_system(),
        # By default these folders are writable and unbounded.
        "--proc", "/proc", "--remount-ro", "/proc",
        "--dev", "/dev", "--size", str(1 << 20), "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
        "--size", str(file_bytes), "--tmpfs", "/tmp",
        *(word for path, place in shown.items() for word in ("--ro-bind", place, path)),  # after /tmp: may be inside
        "--remount-ro", "/", "--chdir", "/tmp",
    ]  # fmt: skip


def _system() -> list[str]:
    """Arguments that mount only the system's libraries."""
    words = ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in _libraries():
        if folder.is_symlink():
            words += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():
            words += ["--ro-bind", str(folder), str(folder)]
    return words


def _libraries() -> list[Path]:
    return [Path(parent) / name for parent in ("/usr", "/") for name in ("lib", "lib32", "lib64", "libx32")]


def _find_bubblewrap() -> str:
    if sys.platform != "linux" or not supports(platform.machine()):
        raise UserError(
            f"code rewards need a sandbox, and bubblewrap needs Linux on x86_64 or aarch64 "
            f"(here: {sys.platform}, {platform.machine()}); {USE_SERVER}"
        )
    found = shutil.which("bwrap")
    if found is None:
        raise UserError(f"code rewards need a sandbox, and bubblewrap is not installed: {_INSTALL}, or {USE_SERVER}")
    words = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(map(int, re.findall(r"\d+", words)[:2]))
    if version < _OLDEST:
        raise UserError(
            f"code rewards need bubblewrap 0.8 or newer (Debian 12, Ubuntu 24.04), and {found} is {words.strip()}; "
            f"update it, or {USE_SERVER}"
        )
    return found


def _find_python(wanted: str) -> tuple[str, list[str]]:
    """The interpreter, and the folders of its standard library that the system mounts do not cover."""
    executable, prefix = getattr(sys, "_base_executable", sys.executable), sys.base_prefix
    if wanted:
        question = "import sys; print(sys.executable); print(sys.base_prefix); assert sys.version_info >= (3, 9)"
        try:
            asked = subprocess.run([wanted, "-S", "-c", question], capture_output=True, text=True, check=True)
            executable, prefix = asked.stdout.splitlines()
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise UserError(f"sandbox.python = {wanted!r} is not a working Python 3.9 or newer ({error})") from None
    executable = os.path.realpath(executable)
    system = {str(folder) for folder in _libraries()}
    folders = (f"{prefix}/lib", f"{prefix}/lib64")
    return executable, [executable, *(path for path in folders if path not in system and Path(path).is_dir())]


def _open_to_all(path: str) -> bool:
    parents = Path(path).resolve().parents
    return all(folder.stat().st_mode & 0o001 for folder in parents) and bool(Path(path).stat().st_mode & 0o004)
