"""A pool's child processes: a worker, which runs verifiers and can be killed at any time, and its supervisor.

The supervisor has one thread and runs no verifier, so it can fork safely and cannot hang. On Linux it adopts and kills
all processes that verifiers started. Results use a private socket, so nothing a verifier prints passes for a result.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import inspect
import json
import math
import numbers
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from forkrl.rewards.answer_format import VERIFIERS_OF_ANSWERS, answer_extractor

START, KILL = b"s", b"k"
"""Commands on the control socket; START carries the worker's end of its channel."""
Verifiers = Mapping[str, tuple[str, Mapping[str, Any], float, str]]
"""By source: import path, options, timeout in seconds and answer format."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MAX_MESSAGE = 300
_MAX_ANSWER = 1_000
"""Characters kept of an answer."""
_MAX_FILE_BYTES = 64 << 20
"""Largest file that a verifier may write."""
_CPU_PER_TIMEOUT = 10
"""CPU time limit per response, in timeouts: more than its threads can use before the timeout."""


def main() -> None:
    """Supervise one worker until the control socket (descriptor in argv) closes. Settings come on standard input."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    settings = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if sys.platform != "darwin":  # there every process maps more than any sensible limit
        _set_soft_limit(resource.RLIMIT_AS, settings["memory_mb"] << 20)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(Exception):  # the worker will report the error
        for path, _, _, answer_format in settings["verifiers"].values():
            # Our verifiers start no threads, so they can be loaded before the fork. Other verifiers might.
            if path.startswith("forkrl."):
                load_verifier(path)
            if answer_format:
                answer_extractor(answer_format)
    _supervise(control, settings["verifiers"])


def _supervise(control: socket.socket, verifiers: Verifiers) -> None:
    """Fork and kill workers on command, reap orphans, and report how each worker ended."""
    exits_fd, told_fd = os.pipe()
    os.set_blocking(exits_fd, False)
    os.set_blocking(told_fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler, SIGCHLD would not wake poll
    signal.set_wakeup_fd(told_fd, warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(exits_fd, select.POLLIN)
    with suppress(ConnectionError):  # the pool's process has ended
        while True:
            command, fds, *_ = socket.recv_fds(control, 1, 1)
            if not command:
                return
            if command == KILL:  # the worker has already ended
                continue
            worker = _fork_worker(fds[0], verifiers, (control.fileno(), exits_fd, told_fd))
            status = None
            # Until the worker ends, or the control socket has a command or EOF.
            while status is None and exits_fd in [fd for fd, _ in poll.poll()]:
                os.read(exits_fd, 1 << 12)
                status = _reap(worker)
            status = _end_all(worker, status)
            send(control.fileno(), describe_exit(os.waitstatus_to_exitcode(status)))


def _fork_worker(channel_fd: int, verifiers: Verifiers, supervisor_fds: tuple[int, ...]) -> int:
    supervisor = os.getpid()
    worker = os.fork()
    if worker:
        os.close(channel_fd)
        return worker
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in supervisor_fds:
            os.close(fd)
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == supervisor:  # it may have died before prctl
            _serve(channel_fd, verifiers)
            code = 0
    finally:
        os._exit(code)  # skip the supervisor's own cleanup code


def _reap(worker: int) -> int | None:
    """Reap ended processes, including adopted orphans, up to the worker; its status if it has ended."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                return ended[1]
    return None


def _end_all(worker: int, status: int | None = None) -> int:
    """Kill the worker (unless ``status`` is given) and its adopted descendants; return its status."""
    if status is None:
        os.kill(worker, signal.SIGKILL)  # not reaped yet, so the id is still its own
    with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, group of dead processes
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
        with suppress(OSError):  # the process has ended
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[1]) == me:
                found.append(int(folder.name))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _serve(channel_fd: int, verifiers: Verifiers) -> None:
    """Load the verifiers and score requests until the socket closes.

    Reads lines ``[token, source, answer, response, prompt]``, or a number N to withdraw the last N requests. Writes
    ``{"ready": pid}`` or ``{"failed": message, "path": verifier}``; then for each request in order
    ``[token, score, failure, message, answer, seconds]``, or only ``token`` if it was withdrawn.
    """
    path = ""
    try:
        _set_soft_limit(resource.RLIMIT_FSIZE, _MAX_FILE_BYTES)
        functions = {}
        for source, (path, options, timeout_s, answer_format) in verifiers.items():
            extract = answer_extractor(answer_format) if answer_format else None
            function = load_verifier(VERIFIERS_OF_ANSWERS.get(path, path) if answer_format else path)
            functions[source] = _bind_options(function, path, options), extract, timeout_s
    except BaseException as error:
        send(channel_fd, {"failed": _describe(error), "path": path})
        os._exit(1)
    me = os.getpid()
    send(channel_fd, {"ready": me})
    os.dup2(1, 2)  # stderr is only for failed starts
    for request in _requests(channel_fd):
        if isinstance(request, str):
            send(channel_fd, request)
            continue
        token, source, answer, response, prompt = request
        function, extract, timeout_s = functions[source]
        # Applies to this process and every process it starts.
        _set_soft_limit(resource.RLIMIT_CPU, int(time.process_time() + _CPU_PER_TIMEOUT * timeout_s) + 1)
        began = time.monotonic()
        result = _score(partial(function, prompt), extract, answer, response)
        if os.getpid() != me:  # a process forked by the verifier returned here
            os._exit(0)
        send(channel_fd, [token, *result, time.monotonic() - began])


def _requests(channel_fd: int) -> Iterator[list[str] | str]:
    """The requests in order; for a withdrawn one only its token."""
    poll = select.poll()
    poll.register(channel_fd, select.POLLIN)
    parts: list[bytes] = []
    waiting: deque[list[str] | str] = deque()
    while True:
        while not waiting or poll.poll(0):  # read everything first: it may withdraw the next request
            data = os.read(channel_fd, 1 << 16)
            if not data:
                return
            *lines, rest = data.split(b"\n")
            for line in lines:
                request = json.loads(b"".join([*parts, line]))
                parts.clear()
                if isinstance(request, list):
                    waiting.append(request)
                else:
                    for index in range(max(len(waiting) - request, 0), len(waiting)):
                        waiting[index] = waiting[index][0]
            parts.append(rest)
        yield waiting.popleft()


def _set_soft_limit(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def load_verifier(path: str) -> Callable[..., object]:
    """The function at ``"module:function"``; raises whatever its import raises."""
    module, _, name = path.partition(":")
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, not a function of (answer, response)")
    return function  # type: ignore[no-any-return]


def _bind_options(
    function: Callable[..., object], path: str, options: Mapping[str, Any]
) -> Callable[[str, str, str], object]:
    """A function of (prompt, answer, response); raises TypeError, naming the signature, if the options do not fit."""
    takes_prompt = False
    with suppress(ValueError):  # some C functions have no signature
        signature = inspect.signature(function)
        # One with a default has its own meaning of the name.
        wanted = signature.parameters.get("prompt")
        takes_prompt = wanted is not None and wanted.default is wanted.empty and "prompt" not in options
        try:
            signature.bind("", "", **options, **({"prompt": ""} if takes_prompt else {}))
        except TypeError as error:
            message = f"(answer, response) and the verifier's options do not fit {path}{signature}: {error}"
            raise TypeError(message) from None

    def score(prompt: str, answer: str, response: str) -> object:
        more = {"prompt": prompt} if takes_prompt else {}
        return function(answer, response, **options, **more)

    return score


def _score(
    verifier: Callable[..., object], extract: Callable[[str], str | None] | None, answer: str, response: str
) -> tuple[float, str, str, str | None]:
    """Score, failure, message and answer; any exception becomes a result, including SystemExit."""
    found = None
    try:
        if extract is not None:
            found = extract(response)
            if found is None:
                return 0.0, "", "", ""
        returned = verifier(answer, response if found is None else found)
        score, read = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        value = float(score) if isinstance(score, numbers.Real) else math.nan
    except MemoryError:
        return 0.0, "memory", "out of memory", None
    except BaseException as error:
        return 0.0, "error", _describe(error), None
    if not 0 <= value <= 1:  # also false for NaN
        shown = repr(score)[:40] if type(score) in (int, float, str, bytes, bool, type(None)) else "something"
        return 0.0, "error", f"returned {shown} ({type(score).__name__}), not a score in [0, 1]", None
    if read is not None and not isinstance(read, str):
        return 0.0, "error", f"returned the answer as {type(read).__name__}, not text", None
    read = found if read is None else read
    return value, "", "", read if read is None else _shorten(read)


def _shorten(answer: str) -> str:
    """Truncate a long answer and add a hash, so that different answers stay different."""
    if len(answer) <= _MAX_ANSWER:
        return str(answer)
    digest = hashlib.sha256(answer.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{answer[:_MAX_ANSWER]}… {digest}"


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # the verifier's own exception class may fail here
        text = "(its message cannot be shown)"
    line = " ".join((f"{type(error).__name__}: {text}" if text else type(error).__name__).split())
    return line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + "…"


def describe_exit(code: int) -> str:
    """How a process ended; a negative code is a signal."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def send(fd: int, message: object) -> None:
    line = json.dumps(message).encode("ascii") + b"\n"
    while line:
        line = line[os.write(fd, line) :]


if __name__ == "__main__":
    main()
