"""One verifier process: reads responses, answers with scores, and can be killed at any moment.

``warden.py`` forks it. Requests and answers are JSON lines on two private pipes; standard output is /dev/null, so
nothing a verifier prints can pass for a result.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import numbers
import os
import resource
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

_MAX_MESSAGE = 300
_MAX_ANSWER = 1_000
"""Characters of an answer that are kept."""
_MAX_FILE_BYTES = 64 << 20
"""Largest file that a verifier can write."""
_CPU_PER_TIMEOUT = 10
"""CPU time for one response, in deadlines: more than its threads can use before the deadline."""


class _Judge(NamedTuple):
    function: Callable[[str, str], object]
    timeout_s: float


def serve(requests_fd: int, answers_fd: int, verifiers: Mapping[str, tuple[str, dict[str, Any], float]]) -> None:
    """Load the verifiers and judge with them until the request pipe closes.

    Args:
        requests_fd: lines ``[token, source, answer, response]``, and ``token`` for a request that is withdrawn.
        answers_fd: first ``{"ready": process id}`` or ``{"failed": message, "path": verifier}``; then, in the order of
            the requests, ``[token, score, failure, message, answer, seconds]``, or ``token`` for a withdrawn one.
        verifiers: import path, options and deadline by source.
    """
    path = ""
    try:
        _limit_files()
        judges = {}
        for source, (path, options, timeout_s) in verifiers.items():
            judges[source] = _Judge(bind_options(load_verifier(path), path, options), timeout_s)
    except BaseException as error:
        send(answers_fd, {"failed": describe(error), "path": path})
        os._exit(1)
    me = os.getpid()
    send(answers_fd, {"ready": me})
    os.dup2(1, 2)  # stderr is only for failed starts
    requests = _Requests(requests_fd)
    while (request := requests.next()) is not None:
        if isinstance(request, str):
            send(answers_fd, request)
            continue
        token, source, answer, response = request
        _limit_cpu(judges[source].timeout_s)
        began = time.monotonic()
        result = _judge(judges[source].function, answer, response)
        if os.getpid() != me:  # a fork made by the verifier returned here
            os._exit(0)
        send(answers_fd, [token, *result, time.monotonic() - began])


class _Requests:
    """The requests on a pipe in order; a withdrawn one appears as its bare token."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._parts: list[bytes] = []
        self._waiting: deque[list[str]] = deque()
        self._withdrawn: set[str] = set()

    def next(self) -> list[str] | str | None:
        """The next request, after reading all that has arrived, which may withdraw it; None at the end."""
        while not self._waiting or self._poll.poll(0):
            data = os.read(self._fd, 1 << 16)
            if not data:
                return None
            self._take(data)
        request = self._waiting.popleft()
        if request[0] in self._withdrawn:
            self._withdrawn.remove(request[0])
            return request[0]
        return request

    def _take(self, data: bytes) -> None:
        *whole, rest = data.split(b"\n")
        for line in whole:
            request = json.loads(b"".join([*self._parts, line]))
            self._parts.clear()
            if isinstance(request, list):
                self._waiting.append(request)
            elif any(request == waiting[0] for waiting in self._waiting):  # else it is already answered
                self._withdrawn.add(request)
        self._parts.append(rest)


def limit_memory(memory: int) -> None:
    """Limit the address space (bytes) of this process and its forks; disable core files."""
    if sys.platform != "darwin":  # where every process maps more than any sensible limit
        _set_soft_limit(resource.RLIMIT_AS, memory)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_files() -> None:
    _set_soft_limit(resource.RLIMIT_FSIZE, _MAX_FILE_BYTES)


def _limit_cpu(timeout_s: float) -> None:
    """From now on, for this process and for each that it starts."""
    _set_soft_limit(resource.RLIMIT_CPU, int(time.process_time() + _CPU_PER_TIMEOUT * timeout_s) + 1)


def _set_soft_limit(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def load_verifier(path: str) -> Callable[..., object]:
    """The function at ``"module:function"``. Raises whatever its import raises."""
    module, _, name = path.partition(":")
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, not a function of (answer, response)")
    return function  # type: ignore[no-any-return]


def bind_options(function: Callable[..., object], path: str, options: Mapping[str, Any]) -> Callable[..., object]:
    """The function with its options bound; TypeError, naming the signature, if they do not fit."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some C functions have no signature
        return partial(function, **options)
    try:
        signature.bind("", "", **options)
    except TypeError as error:
        raise TypeError(f"(answer, response) and task.verifier_options do not fit {path}{signature}: {error}") from None
    return partial(function, **options)


def _judge(verifier: Callable[..., object], answer: str, response: str) -> tuple[float, str, str, str | None]:
    """Score, failure, message and the answer read; anything the verifier raises is a result, including SystemExit."""
    try:
        returned = verifier(answer, response)
        score, read = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        value = float(score) if isinstance(score, numbers.Real) else math.nan
    except MemoryError:
        return 0.0, "memory", "out of memory", None
    except BaseException as error:
        return 0.0, "error", describe(error), None
    if not 0 <= value <= 1:  # NaN is not either
        return 0.0, "error", f"returned {_show(score)} ({type(score).__name__}), not a score in [0, 1]", None
    if read is not None and not isinstance(read, str):
        return 0.0, "error", f"returned the answer as {type(read).__name__}, not text", None
    return value, "", "", read if read is None else _shorten(read)


def _shorten(answer: str) -> str:
    """Long answers become their beginning and a hash, so that different ones stay different."""
    if len(answer) <= _MAX_ANSWER:
        return str(answer)
    digest = hashlib.sha256(answer.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{answer[:_MAX_ANSWER]}… {digest}"


def _show(value: object) -> str:
    return repr(value)[:40] if type(value) in (int, float, str, bytes, bool, type(None)) else "something"


def describe(error: BaseException) -> str:
    """The error as one line of bounded length."""
    try:
        text = str(error)
    except Exception:  # the verifier's own exception class may fail here too
        text = "(its message cannot be shown)"
    return _clip(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + "…"


def send(fd: int, message: object) -> None:
    """Write a JSON line."""
    line = json.dumps(message).encode("ascii") + b"\n"
    while line:
        line = line[os.write(fd, line) :]
