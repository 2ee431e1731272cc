"""No trick earns a reward, and honest programs of many styles do.

The tricks lie in tests/data/reward_cheats.txt, those of whole programs apart from those of called functions; every one
is tried on two problems, those of called functions on tests written as ``assert`` statements too. A right answer in the
wrong form is a matter of the comparison: test_rewards_code.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from forkrl.rewards.code import pack_tests, verify_code
from forkrl.rewards.code.test_cases import repack_tests
from tests.sandbox_here import needs_bubblewrap

pytestmark = needs_bubblewrap

DATA = Path(__file__).parents[1] / "data"
LIMITS = {"seconds": 0.5, "total_seconds": 10.0, "memory_mb": 128, "files_mb": 8, "output_kb": 64}
PROBLEMS = {
    "program": {
        "sum": pack_tests(["1\n2\n", "10 20\n-5"], ["3\n", "25\n"]),
        "parity": pack_tests(["3", "4", "0"], ["YES\n", "NO\n", "NO\n"]),
    },
    "call": {
        "palindrome": pack_tests(['"abba"', '"ab"'], ["true", "false"], "solve"),
        "two sum": pack_tests(["[2, 7, 11]\n9", "[3, 2, 4]\n6"], ["[0, 1]", "[1, 2]"], "solve"),
    },
    "assert": {
        "palindrome": repack_tests(json.dumps(["assert solve('abba') == True", "assert not solve('ab')"])),
        "two sum": repack_tests(
            json.dumps(
                {
                    "test": "def check(candidate):\n    assert candidate([2, 7, 11], 9) == [0, 1]\n"
                    "    assert abs(candidate([3, 2, 4], 6)[0] - 1) < 1e-9 and len(candidate([3, 2, 4], 6)) == 2\n",
                    "entry_point": "solve",
                }
            )
        ),
    },
}


def sections(name: str) -> dict[str, str]:
    return dict(re.findall(r"^### (.+)\n((?:(?!### ).*\n)*)", (DATA / name).read_text("utf-8"), re.MULTILINE))


CHEATS = sections("reward_cheats.txt")
HONEST = sections("honest_solutions.txt")
KINDS = {"program": ("program",), "call": ("call", "assert"), "assert": ("assert",)}
ATTEMPTS = [
    (title, kind, problem) for title in CHEATS for kind in KINDS[title.partition(":")[0]] for problem in PROBLEMS[kind]
]


@pytest.mark.parametrize(("title", "kind", "problem"), ATTEMPTS)
def test_earns_nothing(title: str, kind: str, problem: str) -> None:
    response = f"My solution:\n```python\n{CHEATS[title]}```\n"
    try:
        score = verify_code(PROBLEMS[kind][problem], response, **LIMITS).score
    except ValueError as error:  # counted as a failure, which scores 0
        assert "cannot be passed between the program and its tests" in str(error)  # noqa: PT017
    else:
        assert score == 0


@pytest.mark.parametrize("title", HONEST)
def test_honest_program_passes(title: str) -> None:
    code, _, tests = HONEST[title].partition(">>> ")
    json.loads(tests)
    assert (
        verify_code(tests.strip(), f"```python\n{code}```", **LIMITS | {"seconds": 10.0, "memory_mb": 512}).score == 1
    )


def test_there_are_enough_of_both() -> None:
    assert len(ATTEMPTS) >= 200
    assert len(set(CHEATS.values())) == len(CHEATS) >= 35
    assert len(HONEST) >= 20


@pytest.mark.parametrize(("kind", "problem"), [(kind, name) for kind, names in PROBLEMS.items() for name in names])
def test_each_problem_can_be_solved(kind: str, problem: str) -> None:
    """Else failing it would prove nothing."""
    solutions = {
        "sum": "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "parity": "print('YES' if int(input()) % 2 else 'NO')",
        "palindrome": "def solve(s): return s == s[::-1]",
        "two sum": "def solve(a, t): return [[i, j] for j in range(len(a)) for i in range(j) if a[i] + a[j] == t][0]",
    }
    assert verify_code(PROBLEMS[kind][problem], f"```python\n{solutions[problem]}\n```").score == 1
