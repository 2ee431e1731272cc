"""Judges programs by their tests. The program runs in a sandbox; the verdict is formed here, outside of it.

Only inputs go in. What comes out is text: of a whole program its standard output, of a function the JSON of its value.
No exit code, no report and no object of the program's making can stand for a passed test, because nothing in there
knows what would pass. A response is worth 1.0 where every test passes, else 0.0; judging ends at the first that fails.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from forkrl.config import SandboxConfig
from forkrl.rewards.code.programs import Sandbox
from forkrl.rewards.code.sandbox import open_sandbox, require_sandbox
from forkrl.rewards.code.test_cases import (
    CODE_VERIFIER,
    CallTest,
    CodeTests,
    pack_tests,
    tests_from_livecodebench,
    unpack_tests,
)
from forkrl.rewards.reply import reply_of
from forkrl.types import Judgement, VerifierSpec

__all__ = [
    "code_verifier",
    "last_program",
    "pack_tests",
    "tests_from_livecodebench",
    "unpack_tests",
    "verify_code",
    "with_sandbox",
]

_MARGIN_S = 30.0
"""From the end of a program's own time to the pool's deadline, which would make a failure of it."""
_FENCE = re.compile(r"\s*```+\s*(\S*)")
_PYTHON = {"python", "python3", "py"}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,9})?", re.ASCII)


def code_verifier(config: SandboxConfig) -> VerifierSpec:
    """The verifier that judges programs within the limits of a recipe's ``[sandbox]``."""
    options = config.model_dump(mode="json")
    return VerifierSpec("forkrl.rewards.code:verify_code", options, deadline_s=config.total_seconds + _MARGIN_S)


def with_sandbox(verifiers: Mapping[str, VerifierSpec], config: SandboxConfig) -> dict[str, VerifierSpec]:
    """The verifiers of a task, with the one called "code" bound to a sandbox that has just proved to work.

    Raises:
        UserError: there is a "code" among them, and no sandbox; says how to get one.
    """
    if any(spec.path == CODE_VERIFIER for spec in verifiers.values()):
        require_sandbox(config)
    return {source: code_verifier(config) if spec.path == CODE_VERIFIER else spec for source, spec in verifiers.items()}


def verify_code(answer: str, response: str, **options: Any) -> Judgement:
    """1.0 where the response's program passes every test, else 0.0.

    Args:
        answer: the tests, as ``pack_tests`` writes them.
        response: what the model wrote; its last fenced block of Python is the program.
        options: the settings of ``SandboxConfig``.

    Returns:
        The score, and "" as the answer where there is no program. Programs are not compared with each other.

    Raises:
        ValueError: the tests cannot be read.
        UserError: there is no sandbox here.
        SandboxUnavailableError: it has failed.
    """
    tests = unpack_tests(answer)
    source = last_program(response)
    if source is None:
        return Judgement(0.0, "")
    config = SandboxConfig(**options)
    passed = (_calls_pass if tests.function else _programs_pass)(tests, source, config, _sandbox(config))
    return Judgement(float(passed))


def last_program(response: str) -> str | None:
    """The last closed block fenced as Python after the thinking, else the last one without a language, else None."""
    python: str | None = None
    plain: str | None = None
    opened: tuple[str, int] | None = None
    lines = reply_of(response).split("\n")
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if not fence:
            continue
        if opened is None:
            opened = fence[1].lower(), number
            continue
        (language, start), opened = opened, None
        block = "\n".join(lines[start + 1 : number])
        if language in _PYTHON:
            python = block
        elif not language:
            plain = block
    return plain if python is None else python


@lru_cache(maxsize=4)
def _sandbox(config: SandboxConfig) -> Sandbox:
    return open_sandbox(config)


def _programs_pass(tests: CodeTests, source: str, config: SandboxConfig, sandbox: Sandbox) -> bool:
    deadline = time.monotonic() + config.total_seconds
    for test in tests.programs:
        max_output = max(config.output_kb << 10, 2 * len(test.stdout.encode()) + 1024)
        outcome = sandbox.run_program(source, test.stdin, max_output=max_output, deadline=deadline)
        if outcome.failure or not _same_text(test.stdout, outcome.output.decode("utf-8", "replace")):
            return False
    return True


def _calls_pass(tests: CodeTests, source: str, config: SandboxConfig, sandbox: Sandbox) -> bool:
    deadline = time.monotonic() + config.total_seconds
    max_output = max(config.output_kb << 10, 2 * sum(len(json.dumps(test.accepted)) for test in tests.calls) + 1024)
    inputs = [test.arguments for test in tests.calls]
    with sandbox.call_function(source, tests.function, inputs, max_output=max_output, deadline=deadline) as answers:
        return all(_right_value(test, next(answers, b"")) for test in tests.calls) and next(answers, None) is None


def _same_text(expected: str, printed: str) -> bool:
    """LiveCodeBench's comparison: the same lines but for spaces at their ends, or lines of equal decimal numbers."""
    due, found = expected.strip().split("\n"), printed.strip().split("\n")
    return len(due) == len(found) and all(map(_same_line, due, found))


def _same_line(due: str, found: str) -> bool:
    due, found = due.strip(), found.strip()
    if due == found:
        return True
    pairs = due.split(), found.split()
    if len(pairs[0]) != len(pairs[1]) or not all(map(_NUMBER.fullmatch, [*pairs[0], *pairs[1]])):
        return False
    return all(Decimal(one) == Decimal(other) for one, other in zip(*pairs, strict=True))


def _right_value(test: CallTest, line: bytes) -> bool:
    try:
        found = json.loads(line, parse_constant=_refuse_constant)
        return any(_same_value(due, found) for due in test.accepted)
    except (ValueError, RecursionError):
        return False


def _same_value(due: Any, found: Any) -> bool:
    """Equality of JSON values; unlike Python's, True is not 1."""
    if isinstance(due, bool) or isinstance(found, bool):
        return due is found
    if isinstance(due, list) and isinstance(found, list):
        return len(due) == len(found) and all(map(_same_value, due, found))
    if isinstance(due, dict) and isinstance(found, dict):
        return due.keys() == found.keys() and all(_same_value(value, found[key]) for key, value in due.items())
    return bool(due == found)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
