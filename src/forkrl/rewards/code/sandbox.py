"""The interface of all sandboxes, and opening the configured one. None runs programs unprotected."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from forkrl.config import SandboxConfig
from forkrl.errors import UserError

_DRIVERS = {
    "program": ("run_program", ("sandbox_driver",)),
    "calls": ("call_function", ("sandbox_driver", "sandbox_calls")),
    "asserts": ("run_asserts", ("sandbox_driver", "sandbox_calls", "sandbox_asserts")),
}
"""By kind of run: the function that runs inside, and the modules it needs."""
_OWN_IMPORTS = re.compile(r"^from forkrl\.[\w.]+ import (\([^)]*\)|.*)\n", re.MULTILINE)
_UBUNTU = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
_QUESTION, _ANSWER = "print(6 * 7)", b"42\n"
USE_SERVER = "set sandbox.server to the address of a SandboxFusion server"
Kind = Literal["calls", "asserts"]
"""How tests run, other than as whole programs."""


class SandboxUnavailableError(Exception):
    """The sandbox itself failed, so there is no score."""


class Outcome(NamedTuple):
    """How a run ended. ``failure`` is "" on success, else "exit", "time", "memory", "output" or "files"."""

    output: bytes
    failure: str = ""


class Sandbox(Protocol):
    """Runs untrusted programs; all methods raise SandboxUnavailableError if the sandbox itself fails.

    ``max_output`` is in bytes; a program still running at ``deadline`` (monotonic) has failed.
    """

    def run_program(self, source: str, stdin: str, *, max_output: int, deadline: float) -> Outcome:
        """Run a program to completion."""
        ...

    def answers(
        self, kind: Kind, source: str, request: str, *, cpu_seconds: float, max_output: int, deadline: float
    ) -> AbstractContextManager[Iterator[bytes]]:
        """JSON lines that the program writes while it runs; leaving the ``with`` block ends it.

        "calls": ``request`` is JSON: the name of a function (or method of class Solution) and its inputs, each a list
        of arguments as JSON text. Each line is the claimed result of one call; a program may write fewer or more lines.
        "asserts": ``request`` is ``AssertTests.request``, hidden from the program. The last line is ["passed"],
        ["failed"] or ["broken", reason]; without it the tests did not finish. ``cpu_seconds`` is for all calls.
        """
        ...


@cache
def driver(kind: str) -> tuple[str, str]:
    """The driver's modules as one source (ForkRL cannot be imported inside), and its function for this kind of run."""
    function, modules = _DRIVERS[kind]
    texts = (Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in modules)
    return "\n\n".join(_OWN_IMPORTS.sub("", text) for text in texts), function


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """The configured sandbox, untested; raises UserError if it is not available."""
    if config.server:
        from forkrl.rewards.code.sandbox_fusion import SandboxFusion  # imported here: it needs an HTTP client

        return SandboxFusion(config)
    from forkrl.rewards.code.bubblewrap import Bubblewrap

    return Bubblewrap(config)


def require_sandbox(config: SandboxConfig) -> Sandbox:
    """The configured sandbox, after it has run a test program; raises UserError with the remedy if that fails."""
    sandbox = open_sandbox(config)
    try:
        outcome = sandbox.run_program(_QUESTION, "", max_output=1 << 10, deadline=time.monotonic() + 60)
    except SandboxUnavailableError as error:
        raise UserError(f"code rewards need a sandbox, and it does not work: {error}; {_remedy(config)}") from None
    if outcome.output != _ANSWER or outcome.failure:
        ended = f"failed ({outcome.failure})" if outcome.failure else "succeeded"
        raise UserError(
            f"code rewards need a sandbox, and {_QUESTION} printed {outcome.output[:50]!r} and {ended} there; "
            f"{_remedy(config)}"
        )
    return sandbox


def _remedy(config: SandboxConfig) -> str:
    if config.server:
        return f"is sandbox.server = {config.server!r} the address of a SandboxFusion server?"
    if _UBUNTU.exists() and _UBUNTU.read_text(encoding="ascii").strip() == "1":
        return (
            "Ubuntu forbids programs to make user namespaces: sudo sysctl -w "
            f"kernel.apparmor_restrict_unprivileged_userns=0 (and in /etc/sysctl.d/, to keep it), or {USE_SERVER}"
        )
    return (
        "bubblewrap must be able to make user namespaces (in a container: --privileged, or --security-opt "
        f"seccomp=unconfined), or {USE_SERVER}"
    )
