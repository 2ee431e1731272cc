"""What every sandbox offers, and opening the one that a recipe asks for. None runs programs unprotected."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from forkrl.config import SandboxConfig
from forkrl.errors import UserError

_PARTS = {
    "program": ("sandbox_program", "sandbox_driver"),
    "calls": ("sandbox_values", "sandbox_program", "sandbox_driver"),
    "tests": ("sandbox_values", "sandbox_program", "sandbox_tests", "sandbox_driver"),
}
_OWN_IMPORTS = re.compile(r"^from forkrl\.[\w.]+ import (\([^)]*\)|.*)\n", re.MULTILINE)
_UBUNTU = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
_QUESTION, _ANSWER = "print(6 * 7)", b"42\n"


class SandboxUnavailableError(Exception):
    """The sandbox failed, which says nothing about the program: no score may come of it."""


class LimitReachedError(Exception):
    """The program exceeded a limit: "time", "memory", "output" or "files"."""


class Outcome(NamedTuple):
    """How a run ended. ``failure`` is "" after a success, else "exit", "time", "memory", "output" or "files"."""

    output: bytes
    failure: str = ""


class Sandbox(Protocol):
    """Runs programs that may do anything; all methods raise SandboxUnavailableError if the sandbox itself fails.

    ``max_output`` is in bytes, and ``deadline`` the monotonic time after which a program has failed.
    """

    def run_program(self, source: str, stdin: str, *, max_output: int, deadline: float) -> Outcome:
        """Run a program to its end."""
        ...

    def call_function(
        self, source: str, function: str, inputs: Sequence[Sequence[str]], *, max_output: int, deadline: float
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Call a function, or a method of class Solution, with several inputs (arguments as JSON), one after the other.

        The iterator yields what the program claims as results, one line of JSON each, while it runs. It ends early if
        the program fails and yields more if the program says more; leave the ``with`` block to end the program.
        """
        ...

    def run_tests(self, source: str, tests: str, *, max_output: int, deadline: float) -> bytes:
        """Run ``assert`` statements (``AssertTests.request``) that the program cannot see.

        The result is JSON: ["passed"], ["failed"] or ["broken", reason]; b"" if the tests did not finish.
        """
        ...


@cache
def driver(mode: str) -> str:
    """The text that runs between a sandbox's first process and a program, in the mode "program", "calls" or "tests".

    ForkRL cannot be imported inside, so the parts are joined into one text.
    """
    texts = (Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in _PARTS[mode])
    return "\n\n".join(_OWN_IMPORTS.sub("", text) for text in texts)


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """The sandbox of a recipe, untested; raises UserError if there is none here."""
    if config.server:
        from forkrl.rewards.code.sandbox_fusion import SandboxFusion  # imported here: it needs an HTTP client

        return SandboxFusion(config)
    from forkrl.rewards.code.bubblewrap import Bubblewrap

    return Bubblewrap(config)


def require_sandbox(config: SandboxConfig) -> Sandbox:
    """The sandbox of a recipe, after it has run a program; raises a UserError with the remedy if that fails."""
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
            "kernel.apparmor_restrict_unprivileged_userns=0 (and in /etc/sysctl.d/, to keep it), or set sandbox.server "
            "to the address of a SandboxFusion server"
        )
    return (
        "bubblewrap must be able to make user namespaces (in a container: --privileged, or --security-opt "
        "seccomp=unconfined), or set sandbox.server to the address of a SandboxFusion server"
    )
