"""One verifier process: reads responses, answers with scores, and can be killed at any moment.

``VerifierPool`` starts it as ``python -m forkrl.rewards.worker`` and writes first which verifiers to load. Requests and
answers are JSON lines on two private pipes; standard output is /dev/null, so nothing that a verifier prints can be
taken for a verdict.
"""

from __future__ import annotations

import importlib
import json
import math
import numbers
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from forkrl.processes import die_with_parent

_MAX_MESSAGE = 300
_MAX_ANSWER = 1_000
"""Characters of an answer that are kept; more is no final answer."""


def main() -> None:
    """Load the verifiers named on the first line, and serve them until the request pipe closes."""
    memory_mb, *fds = sys.argv[1:]
    requests_fd, answers_fd, lifeline_fd = map(int, fds)
    for fd in (requests_fd, answers_fd, lifeline_fd):
        os.set_inheritable(fd, False)  # a process the verifier starts must not hold the pipes open
    die_with_parent(lifeline_fd)
    with os.fdopen(requests_fd, "rb") as requests:
        path = ""
        try:
            _limit_resources(int(memory_mb) << 20)
            verifiers = {}
            for source, (path, options) in json.loads(requests.readline()).items():
                verifiers[source] = partial(_load(path), **options)
        except BaseException as error:
            _send(answers_fd, {"failed": _describe(error), "path": path})
            sys.exit(1)
        _send(answers_fd, {"ready": True})
        os.dup2(1, 2)  # stderr explained a failed start; from here it could only grow
        for line in requests:
            token, source, answer, response = json.loads(line)
            _send(answers_fd, [token, *_judge(verifiers[source], answer, response)])


def _limit_resources(memory: int) -> None:
    if sys.platform != "darwin":  # there a process maps more than any sensible limit from the start
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a segfault is an answer here, not something to debug


def _load(path: str) -> Callable[[str, str], object]:
    module, _, name = path.partition(":")
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, not a function of (answer, response)")
    return function  # type: ignore[no-any-return]


def _judge(verifier: Callable[[str, str], object], answer: str, response: str) -> tuple[float, str, str, str | None]:
    """Score, failure, message and the answer read; whatever the verifier raises is a verdict, SystemExit too."""
    try:
        returned = verifier(answer, response)
        score, read = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        value = float(score) if isinstance(score, numbers.Real) else math.nan
    except MemoryError:
        return 0.0, "memory", "out of memory", None
    except BaseException as error:
        return 0.0, "error", _describe(error), None
    if not 0 <= value <= 1:  # NaN is not either
        return 0.0, "error", f"returned {value} ({type(score).__name__}), not a score in [0, 1]", None
    if read is not None and not isinstance(read, str):
        return 0.0, "error", f"returned the answer as {type(read).__name__}, not text", None
    return value, "", "", read if read is None else read[:_MAX_ANSWER]


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # an exception class of the verifier's own may fail at this as well
        text = "(its message cannot be shown)"
    return _clip(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + "…"


def _send(fd: int, message: object) -> None:
    line = json.dumps(message).encode("ascii") + b"\n"
    while line:
        line = line[os.write(fd, line) :]


if __name__ == "__main__":
    main()
