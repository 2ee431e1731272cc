"""Scores programs by their tests: 1.0 if all pass, else 0.0; stops at the first failure.

Expected outputs never enter the sandbox: it receives inputs, and its text output is compared outside, so a program
cannot forge a pass. Tests written as ``assert`` statements run inside, in a process separate from the program's.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from forkrl.config import SandboxConfig
from forkrl.rewards.code.sandbox import Sandbox, open_sandbox, require_sandbox
from forkrl.rewards.code.test_cases import (
    CODE_VERIFIER,
    CallTest,
    CodeTests,
    any_number_of_digits,
    last_program,
    pack_tests,
    program_of,
    repack_tests,
    tests_from_livecodebench,
    unpack_tests,
)
from forkrl.types import Judgement, VerifierSpec

__all__ = [
    "code_verifier",
    "last_program",
    "pack_tests",
    "program_of",
    "repack_tests",
    "tests_from_livecodebench",
    "unpack_tests",
    "verify_code",
    "with_sandbox",
]

_MARGIN_S = 30.0
"""Between a program's own time limit and the pool's timeout, which would count as a verifier failure."""
_LONG_INTEGER = 4_300
"""Digits."""
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,9})?", re.ASCII)


def code_verifier(config: SandboxConfig, options: Mapping[str, Any] | None = None) -> VerifierSpec:
    """The verifier for the limits of ``[sandbox]`` and the ``verifier_options``."""
    options = config.model_dump(mode="json") | dict(options or {})
    return VerifierSpec("forkrl.rewards.code:verify_code", options, timeout_s=config.total_seconds + _MARGIN_S)


def with_sandbox(verifiers: Mapping[str, VerifierSpec], config: SandboxConfig) -> dict[str, VerifierSpec]:
    """Bind "code" to a sandbox after testing it; raises UserError if there is none."""
    if any(spec.path == CODE_VERIFIER for spec in verifiers.values()):
        require_sandbox(config)
    bound = dict(verifiers)
    for source, spec in verifiers.items():
        if spec.path == CODE_VERIFIER:
            bound[source] = replace(
                code_verifier(config, spec.options), answer_format=spec.answer_format, prefill=spec.prefill
            )
    return bound


def verify_code(answer: str, response: str, *, float_tolerance: float = 0.0, **options: Any) -> Judgement:
    """1.0 if the response's program (``program_of``) passes every test, else 0.0; answer "" without a program.

    ``answer`` is written by ``pack_tests``; ``options`` are those of ``SandboxConfig``. ``float_tolerance`` is relative
    or absolute, whichever is larger, for expected numbers with a decimal point.
    """
    tests = unpack_tests(answer)
    source = program_of(response, tests)
    if source is None:
        return Judgement(0.0, "")
    config = SandboxConfig(**options)
    run = _Run(source, config, _sandbox(config), time.monotonic() + config.total_seconds, float_tolerance)
    passes = _passes_asserts if tests.asserts else _passes_calls if tests.calls else _passes_programs
    return Judgement(float(passes(tests, run)))


class _Run(NamedTuple):
    """A program with its test settings; ``deadline`` is monotonic."""

    source: str
    limits: SandboxConfig
    sandbox: Sandbox
    deadline: float
    tolerance: float


@lru_cache(maxsize=4)
def _sandbox(config: SandboxConfig) -> Sandbox:
    return open_sandbox(config)


def _passes_programs(tests: CodeTests, run: _Run) -> bool:
    for test in tests.programs:
        max_output = max(run.limits.output_kb << 10, 2 * len(test.stdout.encode()) + 1024)
        outcome = run.sandbox.run_program(run.source, test.stdin, max_output=max_output, deadline=run.deadline)
        if outcome.failure or not _same_text(test.stdout, outcome.output.decode("utf-8", "replace"), run.tolerance):
            return False
    return True


def _passes_calls(tests: CodeTests, run: _Run) -> bool:
    with any_number_of_digits():
        expected = sum(len(json.dumps(test.accepted)) for test in tests.calls)
    with run.sandbox.answers(
        "calls",
        run.source,
        json.dumps([tests.function, [test.arguments for test in tests.calls]]),
        cpu_seconds=min(run.limits.seconds * len(tests.calls), run.limits.total_seconds),
        max_output=max(run.limits.output_kb << 10, 2 * expected + 1024),
        deadline=run.deadline,
    ) as lines:
        passed = all(_right_value(test, next(lines, b""), run.tolerance) for test in tests.calls)
        return passed and next(lines, None) is None


def _passes_asserts(tests: CodeTests, run: _Run) -> bool:
    assert tests.asserts
    with run.sandbox.answers(
        "asserts",
        run.source,
        tests.asserts.request,
        cpu_seconds=run.limits.total_seconds,
        max_output=run.limits.output_kb << 10,
        deadline=run.deadline,
    ) as lines:
        last = deque(lines, maxlen=1)
    try:
        kind, *reason = json.loads(last[0]) if last else ["failed"]
    except (ValueError, TypeError):  # the last line is a call
        return False
    if kind == "broken":
        raise ValueError(f"the tests cannot judge this program: {' '.join(map(str, reason))}")
    return bool(kind == "passed")


def _same_text(expected: str, printed: str, tolerance: float) -> bool:
    """LiveCodeBench's comparison: equal lines after stripping, or lines of equal decimal numbers."""
    due, found = expected.strip().split("\n"), printed.strip().split("\n")
    return len(due) == len(found) and all(_same_line(*lines, tolerance) for lines in zip(due, found, strict=True))


def _same_line(due: str, found: str, tolerance: float) -> bool:
    due, found = due.strip(), found.strip()
    if due == found:
        return True
    pairs = due.split(), found.split()
    if len(pairs[0]) != len(pairs[1]) or not all(map(_NUMBER.fullmatch, [*pairs[0], *pairs[1]])):
        return False
    return all(
        Decimal(one) == Decimal(other)
        or (not one.lstrip("+-").isdecimal() and _close(float(one), float(other), tolerance))
        for one, other in zip(*pairs, strict=True)
    )


def _close(due: float, found: float, tolerance: float) -> bool:
    try:
        return tolerance > 0 and abs(due - float(found)) <= tolerance * max(1.0, abs(due)) < math.inf
    except OverflowError:  # an integer too large for a float
        return False


def _right_value(test: CallTest, line: bytes, tolerance: float) -> bool:
    """Whether the driver's reply, [value] or [None, substitute], is accepted."""
    try:
        match json.loads(line, parse_constant=_reject_constant, parse_int=_read_integer):
            case [None, other]:
                found = [None, other]
            case [value]:
                found = [value]
            case _:
                return False
        return any(_same_value(due, each, tolerance) for due in test.accepted for each in found)
    except (ValueError, RecursionError):
        return False


def _same_value(due: Any, found: Any, tolerance: float) -> bool:
    """Equality of JSON values; unlike in Python, True is not 1."""
    if isinstance(due, bool) or isinstance(found, bool):
        return due is found
    if isinstance(due, list) and isinstance(found, list):
        return len(due) == len(found) and all(_same_value(*pair, tolerance) for pair in zip(due, found, strict=True))
    if isinstance(due, dict) and isinstance(found, dict):
        return due.keys() == found.keys() and all(
            _same_value(value, found[key], tolerance) for key, value in due.items()
        )
    if isinstance(due, float) and isinstance(found, int | float):
        return due == found or _close(due, found, tolerance)
    return bool(due == found)


def _read_integer(digits: str) -> int | Decimal:
    """Long integers become Decimals, which are parsed in linear time and compare equal."""
    return int(digits) if len(digits) <= _LONG_INTEGER else Decimal(digits)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
