"""What a save leaves behind when it is killed at any system call that changes a file, or halfway through a write.

The saving process is traced as a debugger would (ptrace), so that writes made in Rust inside safetensors and tokenizers
count like any other, and nothing is patched. ``python -m tests.kill_points FOLDER COUNT`` copies the files whenever it
stands before such a call: SIGKILL closes files but changes none, so the copy is what a kill there leaves. Then it
really kills COUNT saves, each at a random call. It prints what it found as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.errors import UserError
from forkrl.store.checkpoint import latest_checkpoint, verify_checkpoint
from tests.tiny_state import TinyState, tiny_state

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _EXITKILL = 1, 0x100000
_ENTRY = 1  # of a stop: the call has not happened yet
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WRITES = ("write", "pwrite64", "writev", "pwritev")

# Which argument names the file: its number, and whether it is a descriptor or a path.
_ARGUMENT = {
    **dict.fromkeys((*_WRITES, "fsync", "fdatasync", "ftruncate", "fallocate", "fchmod", "sendfile"), (0, "fd")),
    **dict.fromkeys(("open", "creat", "truncate", "rename", "mkdir", "rmdir", "unlink", "chmod"), (0, "path")),
    **dict.fromkeys(("openat", "mkdirat", "unlinkat", "renameat", "renameat2", "fchmodat"), (1, "path")),
    **dict.fromkeys(("link", "symlink", "symlinkat"), (0, "path")),
    "linkat": (1, "path"),
    "copy_file_range": (2, "fd"),
    "mmap": (4, "fd"),
}
_TARGET_ARGUMENT = {"rename": 1, "renameat": 3, "renameat2": 3}
_NUMBERS = {
    "x86_64": {
        "write": 1, "open": 2, "mmap": 9, "pwrite64": 18, "writev": 20, "sendfile": 40, "fsync": 74, "fdatasync": 75,
        "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
        "symlink": 88, "chmod": 90, "fchmod": 91, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
        "linkat": 265, "symlinkat": 266, "fchmodat": 268, "fallocate": 285, "pwritev": 296, "renameat2": 316,
        "copy_file_range": 326,
    },
    "aarch64": {
        "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "truncate": 45, "ftruncate": 46,
        "fallocate": 47, "fchmod": 52, "fchmodat": 53, "openat": 56, "write": 64, "writev": 66, "pwrite64": 68,
        "pwritev": 70, "sendfile": 71, "fsync": 82, "fdatasync": 83, "mmap": 222, "renameat2": 276,
        "copy_file_range": 285,
    },
}  # fmt: skip

SUPPORTED = sys.platform == "linux" and platform.machine() in _NUMBERS


class _SyscallInfo(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("arch", ctypes.c_uint32), ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64), ("number", ctypes.c_uint64), ("arguments", ctypes.c_uint64 * 6),
        ("rest", ctypes.c_uint64 * 4),
    )  # fmt: skip


class Operation(NamedTuple):
    """A system call that changes a file."""

    call: str
    path: str
    size: int = 0  # of a write
    target: str = ""  # of a rename


class Trace(NamedTuple):
    """What a traced process did before it ended or was killed."""

    operations: list[Operation]
    finished: bool


def run_traced(
    action: Callable[[], object], at_stop: Callable[[list[Operation]], None] | None = None, kill_at: int | None = None
) -> Trace:
    """Run ``action`` in a child process and stop it before every change of a file.

    Args:
        at_stop: Called there, with the changes made so far; and once more after the last.
        kill_at: The number of changes after which the child is killed.
    """
    child = os.fork()
    if child == 0:
        _run_child(action)
    _, status = os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, _SYSGOOD | _EXITKILL)
    operations: list[Operation] = []
    signal_to_pass = 0
    while True:
        _ptrace(_SYSCALL, child, signal_to_pass)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            break
        stopped_by = os.WSTOPSIG(status)
        signal_to_pass = 0 if stopped_by in (_SYSCALL_STOP, signal.SIGTRAP) else stopped_by
        operation = _change_of_file(child) if stopped_by == _SYSCALL_STOP else None
        if operation is None:
            continue
        if at_stop is not None:
            at_stop(operations)
        if len(operations) == kill_at:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Trace(operations, finished=False)
        operations.append(operation)
    if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the traced process failed with status {status} after {operations[-3:]}")
    if at_stop is not None:
        at_stop(operations)
    return Trace(operations, finished=True)


def _run_child(action: Callable[[], object]) -> None:
    status = 1
    try:
        _ptrace(_TRACEME, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        action()
        status = 0
    finally:
        os._exit(status)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, process: int, data: Any, size: int = 0) -> None:
    if _libc.ptrace(request, process, size, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace: {os.strerror(code)}")


_CALLS = {number: call for call, number in _NUMBERS.get(platform.machine(), {}).items()}


def _change_of_file(child: int) -> Operation | None:
    """What the stopped process is about to do, if it is entering a system call that changes a file."""
    info = _SyscallInfo()
    _ptrace(_GET_SYSCALL_INFO, child, ctypes.addressof(info), ctypes.sizeof(info))
    call = _CALLS.get(info.number)
    if info.op != _ENTRY or call is None:
        return None
    arguments = list(info.arguments)
    if call in ("open", "openat"):
        if not arguments[1 if call == "open" else 2] & (os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR):
            return None
    elif call == "mmap" and not (arguments[2] & 2 and arguments[3] & 1):  # writable and shared
        return None
    position, kind = _ARGUMENT[call]
    if kind == "fd":
        if arguments[position] <= 2:
            return None
        path = str(Path(f"/proc/{child}/fd/{arguments[position]}").readlink())
    else:
        path = _string(child, arguments[position])
    target = _TARGET_ARGUMENT.get(call)
    return Operation(
        call,
        path,
        size=arguments[2] if call in _WRITES else 0,
        target="" if target is None else _string(child, arguments[target]),
    )


def _string(child: int, address: int) -> str:
    with Path(f"/proc/{child}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).partition(b"\0")[0].decode()


class Scenario(NamedTuple):
    """A save into checkpoints that already stand in some state."""

    start: Path
    step: int
    state: TinyState

    def save(self, checkpoints: Path) -> None:
        self.state.save(checkpoints, self.step)


def stop_everywhere(scenario: Scenario, root: Path) -> dict[str, Any]:
    """Trace one save; at each stop, say what a kill there leaves, and what a save that is tried again makes of it."""
    work, copy = root / "work", root / "copy"
    shutil.copytree(scenario.start, work)
    points: list[dict[str, Any]] = []

    def inspect(operations: list[Operation], torn: bool = False) -> None:
        shutil.copytree(work, copy)
        last = operations[-1] if operations else Operation("start", "")
        if torn:
            half_written = copy / Path(last.path).relative_to(work)
            os.truncate(half_written, half_written.stat().st_size - (last.size + 1) // 2)
        points.append({"after": f"{last.call} {last.path}" + " (half)" * torn, **_what_is_left(scenario, copy)})
        shutil.rmtree(copy)
        if last.call == "write" and not torn:
            inspect(operations, torn=True)

    trace = run_traced(lambda: scenario.save(work), inspect)
    shutil.rmtree(work)
    return {"points": points, "operations": [operation._asdict() for operation in trace.operations]}


def _what_is_left(scenario: Scenario, copy: Path) -> dict[str, Any]:
    """The manifest of the checkpoint that a resume would take, and the folders once the save is tried again."""
    found = latest_checkpoint(copy)
    manifest = (found / "manifest.json").read_text() if found else None
    halves = [path.name for path in copy.glob("step-*") if not _is_whole(path)]
    scenario.save(copy)
    return {"manifest": manifest, "halves": halves, "after_retry": sorted(path.name for path in copy.iterdir())}


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except UserError:
        return False
    return True


def everywhere(root: Path) -> dict[str, Any]:
    """Every kill point of four saves, and the manifests of the old and the new checkpoint of each."""
    old, new = tiny_state(seed=0), tiny_state(seed=1)
    old.train(1)
    new.train(2)
    empty, one, littered = root / "empty", root / "one", root / "littered"
    empty.mkdir(parents=True)
    old.save(one, 5)
    # What three killed saves can leave: one unfinished, one between its two renames, one while it removed.
    shutil.copytree(one / "step-5", littered / ".replaced-step-5")
    shutil.copytree(one / "step-5" / "trainer", littered / ".saving-step-5" / "trainer")
    shutil.copytree(one / "step-5" / "trainer", littered / ".removing-step-5" / "trainer")
    scenarios = {
        "first": Scenario(empty, 5, new),
        "next": Scenario(one, 10, new),
        "again": Scenario(one, 5, new),
        "littered": Scenario(littered, 5, new),
    }
    report: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        report[name] = stop_everywhere(scenario, root)
        report[name]["old"] = None if name == "first" else (one / "step-5" / "manifest.json").read_text()
        report[name]["new"] = (new.save(root / f"{name}-new", scenario.step) / "manifest.json").read_text()
    return report


def at_random(root: Path, count: int) -> list[dict[str, Any]]:
    """Kill ``count`` saves, one after another into the same folder; the step of the newest checkpoint after each."""
    draw = random.Random(0)
    state = tiny_state()
    state.train(1)
    left: list[dict[str, Any]] = []
    for number in range(count):
        step = 1 + number // 3  # three saves of every step: a new one, and two that replace it
        trace = run_traced(
            lambda step=step, number=number: state.save(root, step, keep=2, number=number),  # type: ignore[misc]
            kill_at=draw.randrange(110),
        )
        found = latest_checkpoint(root)
        progress = json.loads((found / "trainer" / "progress.json").read_text()) if found else None
        left.append({"number": number, "finished": trace.finished, "found": progress and progress["number"]})
    return left


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(
        json.dumps({"everywhere": everywhere(folder / "all"), "random": at_random(folder / "some", int(sys.argv[2]))})
    )
