"""What every sandbox offers: to run a program on an input, and to call a function of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

_PARTS = {
    "program": ("sandbox_program", "sandbox_driver"),
    "calls": ("sandbox_values", "sandbox_program", "sandbox_driver"),
    "tests": ("sandbox_values", "sandbox_program", "sandbox_tests", "sandbox_driver"),
}
_OWN_IMPORTS = re.compile(r"^from forkrl\.[\w.]+ import (\([^)]*\)|.*)\n", re.MULTILINE)


@cache
def driver(mode: str) -> str:
    """The text of what runs between a sandbox's first process and a program, in the mode "program", "calls" or "tests".

    Inside there is no ForkRL to import: the parts are one text.
    """
    texts = (Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in _PARTS[mode])
    return "\n\n".join(_OWN_IMPORTS.sub("", text) for text in texts)


class SandboxUnavailableError(Exception):
    """The sandbox could not do its work. That says nothing about the program, so no score may come of it."""


class LimitReachedError(Exception):
    """The program went past a limit: "time", "memory", "output" or "files"."""


class Outcome(NamedTuple):
    """How a run ended. ``failure`` is "" where the program ended by itself and reports success, else why it has failed:
    "exit", "time", "memory", "output" or "files"."""

    output: bytes
    failure: str = ""


class Sandbox(Protocol):
    """Runs programs that may do anything. All methods raise SandboxUnavailableError where the sandbox fails."""

    def run_program(self, source: str, stdin: str, *, max_output: int, deadline: float) -> Outcome:
        """Run a program to its end.

        Args:
            source: Python source text.
            stdin: its standard input.
            max_output: bytes that it may print.
            deadline: monotonic time at which it has failed, whatever its own limit.
        """
        ...

    def call_function(
        self, source: str, function: str, inputs: Sequence[Sequence[str]], *, max_output: int, deadline: float
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Call one function with several inputs, one after the other.

        Args:
            source: Python source text; where it has a class Solution, the function is a method of that.
            function: its name.
            inputs: the arguments of each call, each as JSON.
            max_output: bytes that all results may have as JSON.
            deadline: as above.

        Returns:
            What the program says the results are, a line of JSON each, while it runs. They end early where it fails,
            and go on where it says more than it was asked; leave the ``with`` block to end it.
        """
        ...

    def run_tests(self, source: str, tests: str, *, max_output: int, deadline: float) -> bytes:
        """Run tests written as ``assert`` statements against a program that they cannot be seen by.

        Args:
            source: Python source text.
            tests: what ``AssertTests.request`` gives.
            max_output: bytes that the tests may report.
            deadline: as above.

        Returns:
            The verdict as JSON: ["passed"], ["failed"] or ["broken", reason]; b"" where they did not come to their end.
        """
        ...
