"""What it costs to run a program in the sandbox, and how many are judged in a second (docs/code-rewards.md).

    python -m benchmarks.sandbox [--runs 40]

CPU time is that of the judge and of everything that it starts; the machine may have other work to do.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from benchmarks._record import describe_setting, write_result
from forkrl.config import SandboxConfig
from forkrl.rewards import VerifierPool
from forkrl.rewards.code import code_verifier, pack_tests, verify_code
from forkrl.rewards.code.sandbox import require_sandbox
from forkrl.types import Prompt

TESTS = pack_tests(["1\n2"] * 10, ["3"] * 10)
CALLS = pack_tests([f"{number}\n{number}" for number in range(100)], [str(2 * number) for number in range(100)], "add")
RIGHT = "```python\nprint(int(input()) + int(input()))\n```"
WRONG = "```python\nprint(1)\n```"
FUNCTION = "```python\ndef add(a, b): return a + b\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    runs = parser.parse_args().runs
    sandbox = require_sandbox(SandboxConfig())

    def run(source: str) -> None:
        sandbox.run_program(source, "", max_output=1 << 10, deadline=time.monotonic() + 60)

    setting = describe_setting()
    cases = [
        cost("a program", runs, lambda: run("print(1)")),
        cost("a program with imports that it did not write", runs, lambda: run("print(sqrt(4))")),
        cost("100 calls of a function", runs, lambda: verify_code(CALLS, FUNCTION)),
        *(throughput(workers, name, text) for workers in (1, 2) for name, text in (("wrong", WRONG), ("right", RIGHT))),
    ]
    for case in cases:
        Console().print(case)
    write_result("sandbox", setting, cases)


def cost(name: str, runs: int, action: Callable[[], object]) -> dict[str, Any]:
    """Median wall-clock and mean CPU milliseconds of one run."""
    seconds, before = [], cpu_s()
    for _ in range(runs):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    cpu = (cpu_s() - before) / runs
    return {"case": name, "median_ms": round(1e3 * statistics.median(seconds), 1), "cpu_ms": round(1e3 * cpu, 1)}


def throughput(workers: int, name: str, response: str) -> dict[str, Any]:
    """Responses judged in a second; a wrong one fails the first of its ten tests, a right one passes all."""
    items = [(Prompt("p", "?", TESTS), response)] * (60 if name == "wrong" else 8)
    with VerifierPool({"": code_verifier(SandboxConfig())}, workers=workers) as pool:
        pool.verify(items[:workers])
        began = time.perf_counter()
        pool.verify(items)
        seconds = time.perf_counter() - began
    return {"case": f"{name} programs", "workers": workers, "per_second": round(len(items) / seconds, 1)}


def cpu_s() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
