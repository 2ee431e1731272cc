"""Code rewards: which program counts, what equals what, how tests travel, and what a missing sandbox means."""

from __future__ import annotations

import base64
import json
import platform
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from forkrl.config import SandboxConfig, TaskConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.rewards import VerifierPool
from forkrl.rewards.code import bubblewrap, code_verifier, last_program, program_of, sandbox, verify_code, with_sandbox
from forkrl.rewards.code import test_cases as code_tests
from forkrl.rewards.code.sandbox import SandboxUnavailableError, require_sandbox
from forkrl.rewards.code.sandboxed_process import SandboxedProcess
from forkrl.rewards.code.seccomp import build_filter
from forkrl.rewards.code.test_cases import pack_tests, repack_tests, unpack_tests
from forkrl.tasks.dataset import load_evaluation_task
from forkrl.types import Prompt, VerifierSpec
from tests.sandbox_here import needs_bubblewrap

QUICK: dict[str, Any] = {"seconds": 5.0, "total_seconds": 20.0, "memory_mb": 256}


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("a\n```python\nfirst\n```\nb\n```python\nlast\n```\nc", "last"),
        ("```python\ncode\n```\nwhich prints\n```\n3\n```", "code"),
        ("```\nplain\n```", "plain"),
        ("```py\nx\n```", "x"),
        ("```Python3\nx\n```", "x"),
        ("```cpp\nint x;\n```", None),
        ("```python\nx\n```\n```python\nnever closed", "x"),
        ("```python\nnever closed", None),
        ("print(1)", None),
        ("", None),
        ("```python\n```", ""),
        ("  ```python\n  x\n  ```", "x"),
        ("1. Like this:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("- ```python\n  x\n  ```\n", "x"),
        ("2) * ```py\n     x\n     y\n     ```\n", "x\ny"),
        ("\t```python\n\tx = 1\n\tif x:\n\t\ty\n\t```", "x = 1\nif x:\n        y"),
        ("```python\n    x\n    y\n```", "x\ny"),
        ("````python\nx\n````", "x"),
        ("```python\r\nx\r\n```\r", "x\r"),
    ],
)
def test_the_last_closed_block_of_python_counts(response: str, program: str | None) -> None:
    assert last_program(response) == program


@pytest.mark.parametrize("end", ["", "</think>", "</think>\nI give up."])
def test_a_program_inside_the_thinking_does_not_count(end: str) -> None:
    fenced = "```python\nprint(1)\n```"
    assert last_program(f"<think>\n{fenced}\n{end}") is None
    assert last_program(f"<think>\n{fenced}\n</think>\n{fenced.replace('1', '2')}") == "print(2)"


def test_no_program_scores_nothing_and_says_so() -> None:
    judged = verify_code(pack_tests([""], [""]), "I don't know.")
    assert judged.score == 0
    assert judged.answer == ""


OUTPUTS = [
    ("1\n2\n", "1\n2", True),
    ("1 2", "1 2 \n\n", True),
    ("1\n2", "1 2", False),
    ("1\n2", "2\n1", False),
    ("1\n\n2", "1\n2", False),
    ("0.50", "0.5", True),
    ("1000", "1e3", True),
    ("1.0 2", "1 2.00", True),
    ("50000000000000000", "50000000000000001", False),
    ("0.1", "0.1000000000000001", False),
    ("-0", "0", True),
    ("x 1.0", "x 1", False),
    ("YES", "yes", False),
    ("a b", "a  b", False),
    ("12", "١٢", False),
    ("1000", "1_000", False),
    ("nan", "NaN", False),
    ("1", "inf", False),
    ("1", "1 1", False),
    ("1", "1\r", True),
    ("1", "0\r1", False),
    ("1", "1\0", False),
    ("", "\n \n", True),
    ("", "x", False),
    ("1", "1e0", True),
    ("1", "1e9999999999", False),
    ("ä", "ä", True),
]


@needs_bubblewrap
@pytest.mark.parametrize(("expected", "printed", "same"), OUTPUTS)
def test_comparison_of_outputs(expected: str, printed: str, same: bool) -> None:
    response = f"```python\nimport sys\nsys.stdout.write({printed!r})\n```"
    assert verify_code(pack_tests([""], [expected]), response, **QUICK).score == same


VALUES = [
    ("true", "True", True),
    ("true", "1", False),
    ("1", "True", False),
    ("0", "False", False),
    ("2", "2.0", True),
    ("2.5", "2.5", True),
    ("2.5", "2.5000001", False),
    ('"3"', "3", False),
    ("3", "'3'", False),
    ("[1, 2]", "(1, 2)", True),
    ("[[1, 2]]", "[(1, 2)]", True),
    ("[1, 2]", "[2, 1]", False),
    ("[1, 2]", "{1, 2}", False),
    ("[]", "None", False),
    ("null", "None", True),
    ("[]", "()", True),
    ('{"a": 1}', "{'a': 1}", True),
    ('{"a": 1}', "{'a': 1, 'b': 2}", False),
    ("1", "float('nan')", False),
    ("NaN", "float('nan')", False),
    ("Infinity", "float('inf')", False),
    ('"ü\\n"', "'ü' + chr(10)", True),
    ("[1, true]", "[True, True]", False),
    ("100000000000000000000", "10**20", True),
]


@needs_bubblewrap
def test_comparison_of_values() -> None:
    program = "def f(text): return eval(text)"
    for expected, returned, same in VALUES:
        tests = pack_tests([json.dumps(returned)], [expected], "f")
        assert verify_code(tests, f"```python\n{program}\n```", **QUICK).score == same, (expected, returned)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("print(int(input()) + 1)", 1),
        ("x = int(input())\nprint(x + 1 if x < 2 else 0)", 0),
        ("print(int(input()) + 1)\nquit()", 1),
        ("def main():\n    print(int(input()) + 1)\n    exit(0)\nmain()", 1),
        ("print(int(input()) + 1)\nraise ValueError", 0),
        ("print(int(input()) + 1)\nimport sys\nsys.exit(3)", 0),
        ("print(int(input()) + 1)\nimport os\nos._exit(0)", 0),  # never flushed
        ("def", 0),
    ],
)
def test_every_test_must_pass(program: str, score: float) -> None:
    assert verify_code(pack_tests(["1", "2"], ["2", "3"]), f"```python\n{program}\n```", **QUICK).score == score


@needs_bubblewrap
def test_judging_ends_at_the_first_failure_and_at_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = SandboxedProcess

    def counted(*args: Any, **options: Any) -> Any:
        started.append(1)
        return start(*args, **options)

    monkeypatch.setattr(bubblewrap, "SandboxedProcess", counted)
    tests = pack_tests([""] * 50, ["1"] * 50)
    assert verify_code(tests, "```python\nprint(2)\n```", **QUICK).score == 0
    assert len(started) == 1
    slow = "```python\nimport time\ntime.sleep(0.4)\nprint(1)\n```"
    assert verify_code(tests, slow, **QUICK | {"total_seconds": 0.6}).score == 0
    assert len(started) <= 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "[]",
        "null",
        '{"inputs": []}',
        '{"inputs": [], "outputs": []}',
        '{"inputs": ["1"], "outputs": ["1", "2"]}',
        '{"inputs": "1", "outputs": "1"}',
        '{"inputs": [1], "outputs": ["1"]}',
        '{"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}',
        '{"inputs": ["1"], "outputs": ["x"], "fn_name": "f"}',
        '{"inputs": ["1"], "outputs": ["1"], "fn_name": 3}',
        "zlib+base64:",
        "zlib+base64:eJw=",
        "zlib+base64:///",
    ],
)
def test_tests_that_cannot_be_read_are_an_error_not_a_zero(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        unpack_tests(text)
    with pytest.raises(ValueError, match="."):
        verify_code(text, "```python\nprint(1)\n```")


def test_long_tests_travel_compressed() -> None:
    short, long = pack_tests(["1"], ["2"]), pack_tests(["1 ü" * 10_000], ["2"])
    assert json.loads(short) == {"inputs": ["1"], "outputs": ["2"]}
    assert len(long) < 1_000
    assert unpack_tests(long).programs[0].stdin == "1 ü" * 10_000
    assert repack_tests(long) == long
    assert unpack_tests(repack_tests(json.dumps({"inputs": ["x" * 9999], "outputs": ["y"]}))).programs[0].stdout == "y"


def lcb_row(private: str, kind: str = "stdin", **changes: Any) -> dict[str, Any]:
    public = [{"input": "1\n", "output": "2\n", "testtype": kind}]
    return {
        "question_id": "abc300_a",
        "public_test_cases": json.dumps(public),
        "private_test_cases": private,
        "metadata": json.dumps({"func_name": "f"} if kind == "functional" else {}),
    } | changes


def pickled_string(text: str) -> bytes:
    data = text.encode()
    return b"\x80\x04\x95" + struct.pack("<Q", len(data) + 7) + b"X" + struct.pack("<I", len(data)) + data + b"\x94."


def compressed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


PRIVATE = json.dumps([{"input": "5", "output": "6", "testtype": "stdin"}])


@pytest.mark.parametrize("private", [PRIVATE, compressed(pickled_string(PRIVATE))])
def test_rows_of_livecodebench(private: str) -> None:
    tests = unpack_tests(code_tests.tests_from_livecodebench(lcb_row(private)))
    assert [test.stdin for test in tests.programs] == ["1\n", "5"]
    assert [test.stdout for test in tests.programs] == ["2\n", "6"]


def test_functional_rows_of_livecodebench() -> None:
    tests = unpack_tests(code_tests.tests_from_livecodebench(lcb_row("[]", "functional")))
    assert tests.function == "f"
    assert tests.calls[0].arguments == ("1",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lcb_row("[]", private_test_cases=None), "no text in column private_test_cases"),
        (lcb_row("!!"), "neither JSON nor compressed"),
        (lcb_row(compressed(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")), "GLOBAL"),
        (lcb_row(compressed(b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93.")), "STACK_GLOBAL"),
        (lcb_row(compressed(b"\x80\x04\x8c\x01a\x8c\x01b.")), "2 strings"),
        (lcb_row(compressed(b"\x80")), "compressed JSON"),
        (lcb_row("{}"), "not a list of tests"),
        (lcb_row(PRIVATE, "functional"), "functional"),
        (lcb_row("[]", "functional", metadata="{}"), "func_name"),
        (lcb_row('[{"testtype": "stdin"}]'), "input"),
    ],
)
def test_other_rows_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        code_tests.tests_from_livecodebench(row)
    assert "abc300_a" in str(caught.value)


# ---------------------------------------------------------------- usage blocks, nodes, long integers, tolerance


def fenced(*blocks: str) -> str:
    return "\n".join(f"Text.\n```python\n{block}\n```" for block in blocks)


USAGE = "print(f(20))"


@pytest.mark.parametrize(
    ("tests", "blocks", "program"),
    [
        (pack_tests(["1"], ["2"], "f"), ("def f(x): return 1", "def f(x): return 2", USAGE), 1),
        (pack_tests(["1"], ["2"], "f"), ("class Solution:\n    def f(self, x): ...", USAGE), 0),
        (pack_tests(["1"], ["2"], "f"), ("f = lambda x: 2", USAGE), 0),
        (pack_tests(["1"], ["2"], "f"), ("def g(x): return 1", "f == 3"), 1),
        (pack_tests(["1"], ["2"]), ("print(int(input()) + 1)", USAGE), 0),
        (pack_tests(["1"], ["2"]), ("import sys\nprint(sys.stdin.read())", "x = open(0)", USAGE), 1),
        (pack_tests([""], ["2"]), ("print(input())", "print(2)"), 1),
        (json.dumps(["assert f(1) == 2"]), ("def f(x): return 2", USAGE), 0),
    ],
)
def test_a_usage_block_does_not_replace_the_program(tests: str, blocks: tuple[str, ...], program: int) -> None:
    assert last_program(fenced(*blocks), unpack_tests(tests)) == blocks[program]


LONG = "9" * 6_000


@needs_bubblewrap
@pytest.mark.parametrize(
    ("tests", "program", "score"),
    [
        (pack_tests([LONG], [LONG]), "print(int(input()))", 1),
        (pack_tests([LONG], [LONG], "f"), "def f(x): return x", 1),
        (pack_tests([LONG], [LONG], "f"), "def f(x): return x - 1", 0),
        (pack_tests([[10**5000 - 1]], [10**5000], "f"), "def f(x): return x + 1", 1),
        (json.dumps(["assert f(6000) == 10**6000 - 1"]), "def f(n): return int('9' * n)", 1),
    ],
)
def test_integers_of_more_than_4300_digits(tests: str, program: str, score: float) -> None:
    assert verify_code(tests, fenced(program), **QUICK).score == score


SORT = pack_tests(["[3, 1, 2]"], ["[1, 2, 3]"], "f")
LINKED = pack_tests(["[1, 2, 3]", "[]"], ["[3, 2, 1]", "[]"], "f")
REVERSE = """
class Solution:
    def f(self, head: Optional[ListNode]) -> Optional[ListNode]:
        last = None
        while head:
            head.next, last, head = last, head, head.next
        return last
"""
OWN_NODE = "class ListNode:\n    def __init__(self, x):\n        self.val, self.next = x, None\n"
MIRROR = """
class Solution:
    def f(self, root: "TreeNode") -> "TreeNode":
        if root:
            root.left, root.right = self.f(root.right), self.f(root.left)
        return root
"""
MERGE = """
def f(lists: List[ListNode]) -> ListNode:
    values = []
    for node in lists:
        while node:
            values.append(node.val)
            node = node.next
    first = last = ListNode()
    for value in sorted(values):
        last.next = last = ListNode(value)
    return first.next
"""


@needs_bubblewrap
@pytest.mark.parametrize(
    ("tests", "program", "score"),
    [
        (SORT, "def f(x): x.sort()", 1),
        (SORT, "def f(x): pass", 0),
        (SORT, "def f(x): x.sort(); return 0", 0),
        (pack_tests(["[3, 1, 2]"], ["null"], "f"), "def f(x): x.sort()", 1),
        (pack_tests(['"ba"'], ['"ab"'], "f"), "def f(x): x = sorted(x)", 0),
        (LINKED, REVERSE, 1),
        (LINKED, OWN_NODE + REVERSE, 1),
        (LINKED, REVERSE.replace("return last", "return head"), 0),
        (LINKED, REVERSE.replace("return last", "last.next = last; return last"), 0),
        (LINKED, REVERSE.replace(": Optional[ListNode]", ""), 0),
        (pack_tests(["[4, 2, 7, 1, 3, null, 9]"], ["[4, 7, 2, 9, null, 3, 1]"], "f"), MIRROR, 1),
        (pack_tests(["[[1, 4], [2], []]"], ["[1, 2, 4]"], "f"), MERGE, 1),
        (pack_tests(["[1, 2]", "[]"], ["[1, 3]", "[]"], "f"), "def f(x: ListNode):\n    if x: x.next.val = 3", 1),
    ],
)
def test_functions_in_place_and_nodes(tests: str, program: str, score: float) -> None:
    assert verify_code(tests, fenced(program), **QUICK).score == score


@needs_bubblewrap
@pytest.mark.parametrize(
    ("expected", "returned", "tolerance", "score"),
    [
        ("0.333333", "1 / 3", 1e-5, 1),
        ("0.333333", "1 / 3", 1e-9, 0),
        ("1000000.0", "1000000.5", 1e-6, 1),
        ("[1.5, [2.5]]", "(1.5000001, [2.4999999])", 1e-5, 1),
        ("1000000", "1000000.5", 1e-3, 0),
        ("2.0", "True", 0.9, 0),
        ("2.0", "10**400", 0.5, 0),
        ("2.0", "float('inf')", 0.5, 0),
    ],
)
def test_tolerance_of_floats(expected: str, returned: str, tolerance: float, score: float) -> None:
    options = QUICK | {"float_tolerance": tolerance}
    called = fenced(f"def f(x): return {returned}")
    assert verify_code(pack_tests(["0"], [expected], "f"), called, **options).score == score
    if expected[0] != "[":
        printed = fenced(f"print('x' if {returned} is True else {returned}, 7)")
        assert verify_code(pack_tests([""], [f"{expected} 7"]), printed, **options).score == score


def test_the_options_of_code() -> None:
    base = ["task.name=dataset", "task.data=x.jsonl", "task.verifier=code"]
    config = load_recipe(TrainConfig, None, [*base, "task.verifier_options.float_tolerance=1e-6"])
    spec = code_verifier(config.sandbox, config.task.verifier_options)
    assert spec.options["float_tolerance"] == 1e-6
    verifiers = {"": VerifierSpec("code", config.task.verifier_options)}
    assert with_sandbox(verifiers, SandboxConfig(**QUICK))[""].options["float_tolerance"] == 1e-6
    for wrong in ("seconds=3", "float_tolerance=-1", "float_tolerance=true", "float_tolerance=x"):
        with pytest.raises(UserError, match="task.verifier_options"):
            load_recipe(TrainConfig, None, [*base, f"task.verifier_options.{wrong}"])


# ---------------------------------------------------------------- tests written as assert statements

SQUARE = """METADATA = {"author": "x"}
def check(candidate):
    assert candidate(2) == 4, "message"
    assert abs(candidate(1.5) - 2.25) < 1e-6
    for i in range(50):
        assert candidate(i) == i * i
    try:
        candidate("a")
        assert False
    except TypeError:
        pass
"""
HUMANEVAL = json.dumps({"test": SQUARE, "entry_point": "square"})
LEETCODE = json.dumps(
    {"test": "def check(candidate):\n    assert candidate(x=3) == 9\n", "entry_point": "Solution().square"}
)
MBPP = {
    "test_list": ["assert f([1, 1]) == {1}", "assert math.isclose(g((2,))[0], 1.414, rel_tol=1e-3)"],
    "test_setup_code": "offset = 0",
    "test_imports": ["import math"],
}

RAISES = "try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass"


@needs_bubblewrap
@pytest.mark.parametrize(
    ("tests", "program", "score"),
    [
        (HUMANEVAL, "def square(x): return x * x", 1),
        (HUMANEVAL, "def square(x): return x + x", 0),
        (HUMANEVAL, "def square(x): return x ** 2 if x != 49 else 0", 0),
        (HUMANEVAL, "def square(x): return float(x) ** 2", 0),  # raises ValueError for text
        (HUMANEVAL, "def cube(x): return x * x", 0),
        (HUMANEVAL, "def square(x: return x * x", 0),
        (HUMANEVAL + " ", "import time\ndef square(x): time.sleep(30)", 0),
        (LEETCODE, "class Solution:\n    def square(self, x): return x * x", 1),
        (json.dumps(MBPP), "def f(x): return set(x)\ndef g(x): return (x[0] ** 0.5,)", 1),
        (json.dumps(MBPP), "def f(x): return list(set(x))\ndef g(x): return (x[0] ** 0.5,)", 0),
        (json.dumps(MBPP | {"test_imports": []}), "def f(x): return set(x)\ndef g(x): return (x[0] ** 0.5,)", 1),
        (json.dumps(["x = [2, 1]\nf(x)\nassert x == [1, 2]"]), "def f(x): x.sort()", 1),
        (json.dumps(["assert list(f(3)) == [0, 1, 2]"]), "def f(n): yield from range(n)", 1),
        (json.dumps(["assert all(map(lambda x: f(x) == x, [1, 2]))"]), "def f(x): raise StopIteration", 0),
        (json.dumps([RAISES]), "class Absent(KeyError): pass\ndef f(x): raise Absent", 1),
        (json.dumps([RAISES]), "def f(x): raise ValueError", 0),
        (json.dumps([RAISES]), "def f(x): return x", 0),
        (json.dumps(["assert f() == {(1, 2): b'x', None: {3.5}}"]), "def f(): return {(1, 2): b'x', None: {3.5}}", 1),
        (json.dumps({"test_list": ["assert sum(1, 2) == 3"], "entry_point": "sum"}), "def sum(a, b): return a + b", 1),
        (
            json.dumps(["node = f(ListNode(1, ListNode(2)))\nassert (node.val, node.next.val) == (2, 1)"]),
            "def f(x): x.next.next, x.next, x = x, None, x.next; return x",
            1,
        ),
    ],
)
def test_assert_statements(tests: str, program: str, score: float) -> None:
    options = QUICK | ({"seconds": 0.5} if "sleep" in program else {})
    assert verify_code(tests, fenced(program), **options).score == score


HELPERS = "import math\n\n\ndef halved(x):\n    return math.floor(x / 2)\n\n\n"
PROMPT = HELPERS + 'def f(x):\n    """Twice x."""\n'
COMPLETED = {
    "prompt": PROMPT,
    "entry_point": "f",
    "test": "def check(candidate):\n    assert halved(candidate(3)) == 3\n",
}
FULL = "def f(x):\n    return 2 * x"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (fenced(FULL), HELPERS + FULL),
        (fenced(FULL, "print(f(1))"), HELPERS + FULL),
        (fenced(f"{PROMPT}    return 2 * x"), f"{HELPERS}{PROMPT}    return 2 * x"),
        (
            fenced(f"from __future__ import annotations\nimport re\n{FULL}"),
            f"from __future__ import annotations\n{HELPERS}import re\n{FULL}",
        ),
        (
            fenced(f"from __future__ import (\n    annotations,  # later\n    generators,\n)\n{FULL}"),
            f"from __future__ import (\n    annotations,  # later\n    generators,\n)\n{HELPERS}{FULL}",
        ),
        (
            fenced(f"from __future__ import annotations, \\\n    generators\nimport re\n{FULL}"),
            f"from __future__ import annotations, \\\n    generators\n{HELPERS}import re\n{FULL}",
        ),
        (fenced("y = 2 * x\nreturn y"), f"{PROMPT}    y = 2 * x\n    return y"),
        (fenced("    y = 2 * x\n    return y"), f"{PROMPT}    y = 2 * x\n    return y"),
        ("\n    y = 2 * x\n\n    return y\n\nprint(f(1))", f"{PROMPT}\n    y = 2 * x\n\n    return y\n"),
        ("\treturn 2 * x\n```\nIt doubles x.", f"{PROMPT}    return 2 * x"),
        ("  if x:\n    return 2 * x\n  return 0\nDone.", f"{PROMPT}    if x:\n      return 2 * x\n    return 0"),
        (fenced("    y = 2 * x\n    return y\n\nprint(f(1))"), f"{PROMPT}    y = 2 * x\n    return y\n"),
        (f"import re\n{FULL}\n```", f"{HELPERS}import re\n{FULL}"),
        ("<think>\n" + fenced(FULL) + "\n</think>\n    return 3", f"{PROMPT}\n    return 3"),
        ("<think>\n" + fenced(FULL), None),
        (f"Here it is:\n{FULL}", None),
        ("import re\ndef g(x): ...", None),
        ("from what is asked, f doubles x", None),
        ("```python\ndef f(x):", None),
        ("    \nI don't know.", None),
        ("", None),
    ],
)
def test_the_prompt_completes_the_program(response: str, program: str | None) -> None:
    assert program_of(response, unpack_tests(json.dumps(COMPLETED))) == program


@pytest.mark.parametrize(
    ("start", "indentation"),
    [
        ("def f(x):", "    "),
        ('def f(x):\n\t"""Twice\nx."""\n', "\t"),
        ('def f(x):\n  # Twice x.\n  """x"""\n  ', "  "),
        ("@staticmethod\ndef f(\n    x,\n):\n\n", "    "),
    ],
)
@pytest.mark.parametrize("body", ["  return 2 * x", fenced("return 2 * x"), "\treturn 2 * x"])
def test_a_body_gets_the_indentation_of_the_prompt(start: str, indentation: str, body: str) -> None:
    prompt = HELPERS + start
    tests = unpack_tests(json.dumps(COMPLETED | {"prompt": prompt}))
    assert program_of(body, tests) == f"{prompt.rstrip()}\n{indentation}return 2 * x"
    assert program_of(fenced(FULL), tests) == HELPERS + FULL


@pytest.mark.parametrize(
    "prompt",
    [
        "Write a function f that doubles x.",
        'Complete this function:\n\ndef f(x):\n    """Twice x."""\n',
        "Complete this function:\n```python\ndef f(x):\n```\n",
        "def f(x):\n    return 2 * x\n\nprint(f(1))",
        "",
    ],
)
def test_a_prompt_in_words_is_no_part_of_the_program(prompt: str) -> None:
    tests = unpack_tests(json.dumps(COMPLETED | {"prompt": prompt, "test": "assert f(2) == 4"}))
    assert program_of(fenced(FULL), tests) == FULL
    assert program_of("    return 2 * x", tests) is None


@needs_bubblewrap
@pytest.mark.parametrize(
    ("response", "score"),
    [
        (fenced(FULL), 1),
        (fenced("return math.floor(2 * x)"), 1),
        ("    return halved(4 * x)", 1),
        (fenced("def f(x):\n    return 3 * x"), 0),
        (fenced("def halved(x):\n    return 3\n\ndef f(x):\n    return 0"), 0),  # the tests use the prompt's own
    ],
)
def test_programs_that_the_prompt_completes(response: str, score: float) -> None:
    assert verify_code(json.dumps(COMPLETED), response, **QUICK).score == score


@needs_bubblewrap
@pytest.mark.parametrize(
    ("test", "program", "reason"),
    [
        ("import numpy\nassert f() == 1", "def f(): return 1", "No module named 'numpy'"),
        ("assert f().x == 1", "class A: x = 1\ndef f(): return A()", "a value of type A cannot be passed"),
        ("assert f(lambda: 1) == 1", "def f(x): return x()", "a value of type function cannot be passed"),
        ("try:\n    assert f()\nexcept Exception: pass", "def f(): return object()", "type object cannot be passed"),
        ("def test_f():\n    assert f() == 1", "def f(): return 2", "none of their assert statements was reached"),
        ("if __name__ == '__main__':\n    assert f() == 1", "def f(): return 2", "none of their assert statements"),
    ],
)
def test_assert_statements_that_cannot_judge_are_no_wrong_answer(test: str, program: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        verify_code(json.dumps([test]), fenced(program), **QUICK)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (["print(f(1))"], "no assert statement"),
        (["assert f(1) =="], "not Python"),
        (["assert sum(1, 2) == 3"], "call no function of the program; name it in entry_point"),
        ([3], "text"),
        ([], "no assert statement"),
        ({"test": SQUARE}, "entry_point"),
        ({"test": SQUARE, "entry_point": 3}, "entry_point must be text"),
        ({"tests": []}, "not JSON of the form"),
    ],
)
def test_assert_statements_that_cannot_be_read(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_tests(json.dumps(tests))


def test_assert_statements_on_a_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens: a loopback address needs no proxy
    assert verify_code(HUMANEVAL, fenced("def square(x): return x * x"), **at(server)).score == 1
    assert verify_code(HUMANEVAL, fenced("def square(x): return x + x"), **at(server)).score == 0
    assert verify_code(HUMANEVAL, fenced("import os\ndef square(x): os._exit(0)"), **at(server)).score == 0
    assert not any("METADATA" in request["code"] for request in server.requests)


def test_credentials_of_a_server_stay_out_of_messages(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_KEY", "s3cret")
    server.reply = 403, b"no"
    address = at(server)["server"].replace("http://", "http://ann:${FUSION_KEY}@") + "?key=${FUSION_KEY}"
    with pytest.raises(UserError, match="answered 403") as caught:
        require_sandbox(SandboxConfig(server=address))
    assert "s3cret" not in str(caught.value)
    assert server.requests[0]["path"] == "/run_code?key=s3cret"


# ---------------------------------------------------------------- a SandboxFusion server


class Server(ThreadingHTTPServer):
    """Answers as SandboxFusion does, by running the program; or, once ``reply`` is set, with that."""

    reply: tuple[int, bytes] | None = None
    requests: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request | {"path": self.path})
        status, body = self.server.reply or (200, self.run_program(request))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def run_program(self, request: dict[str, Any]) -> bytes:
        command = [sys.executable, "-S", "-c", request["code"]]
        done = subprocess.run(command, input=request["stdin"], capture_output=True, text=True, check=False)
        return fusion_answer(done.stdout, return_code=done.returncode)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


def fusion_answer(stdout: str, status: str = "Finished", return_code: int = 0, outer: str = "Success") -> bytes:
    run = {"status": status, "execution_time": 0.1, "return_code": return_code, "stdout": stdout, "stderr": ""}
    return json.dumps({"status": outer, "message": "", "run_result": run, "files": {}}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def at(server: Server) -> dict[str, Any]:
    return QUICK | {"server": f"http://127.0.0.1:{server.server_port}/"}


def test_a_server_runs_programs_and_calls(server: Server) -> None:
    tests = pack_tests(["1", "2"], ["2", "3"])
    assert verify_code(tests, "```python\nprint(int(input()) + 1)\n```", **at(server)).score == 1
    assert verify_code(tests, "```python\nprint(2)\n```", **at(server)).score == 0
    assert server.requests[0]["path"] == "/run_code"
    assert server.requests[0]["language"] == "python"
    assert server.requests[0]["memory_limit_MB"] == 256
    assert 0 < server.requests[0]["run_timeout"] <= 5
    assert not any("outputs" in request["code"] for request in server.requests)
    calls = pack_tests(["1\n2", "3\n4"], ["3", "7"], "add")
    program = "```python\nclass Solution:\n    def add(self, a, b):\n        print('noise')\n        return {}\n```"
    assert verify_code(calls, program.format("a + b"), **at(server)).score == 1
    assert verify_code(calls, program.format("3"), **at(server)).score == 0
    require_sandbox(SandboxConfig.model_validate(at(server)))


@pytest.mark.parametrize(
    "answer",
    [
        fusion_answer("2", return_code=1, outer="Failed"),
        fusion_answer("2", status="TimeLimitExceeded", outer="Failed"),
        fusion_answer("2\n" * 10_000_000),
    ],
)
def test_a_program_that_fails_on_a_server_scores_nothing(server: Server, answer: bytes) -> None:
    server.reply = 200, answer
    assert verify_code(pack_tests([""], ["2"]), "```python\nprint(2)\n```", **at(server)).score == 0


@pytest.mark.parametrize(
    "reply",
    [
        (500, b"{}"),
        (404, fusion_answer("2")),
        (200, b"<html>"),
        (200, b"{}"),
        (200, b"[]"),
        (200, b'{"status": "Success", "run_result": null}'),
        (200, fusion_answer("2", outer="SandboxError")),
        (200, fusion_answer("2", status="Error")),
    ],
)
def test_a_server_that_fails_is_no_wrong_answer(server: Server, reply: tuple[int, bytes]) -> None:
    server.reply = reply
    with pytest.raises(SandboxUnavailableError):
        verify_code(pack_tests([""], ["2"]), "```python\nprint(2)\n```", **at(server))
    with pytest.raises(UserError, match="sandbox.server"):
        require_sandbox(SandboxConfig.model_validate(at(server)))


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "localhost:8080", "http://[", "ftp://x"])
def test_an_address_without_a_server_is_no_wrong_answer(address: str) -> None:
    with pytest.raises(SandboxUnavailableError):
        verify_code(pack_tests([""], ["2"]), "```python\nprint(2)\n```", server=address)
    with pytest.raises(UserError, match="sandbox.server"):
        require_sandbox(SandboxConfig(server=address))


# ---------------------------------------------------------------- no sandbox, no reward


def fake_bubblewrap(folder: Path, script: str) -> str:
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)
    return str(folder)


FORBIDDEN = 'case "$1" in --version) echo bubblewrap 0.9.0;; *) echo "bwrap: No permissions" >&2; exit 1;; esac'


def test_without_bubblewrap_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install bubblewrap"):
        require_sandbox(SandboxConfig())
    with pytest.raises(UserError, match="sandbox.server"):
        verify_code(pack_tests([""], ["1"]), "```python\nprint(1)\n```", seconds=3.25)


def test_an_old_bubblewrap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", fake_bubblewrap(tmp_path, "echo bubblewrap 0.6.1"))
    with pytest.raises(UserError, match="0.8 or newer.*0.6.1"):
        require_sandbox(SandboxConfig())


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="riscv64"):
        require_sandbox(SandboxConfig())


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is for Linux")
def test_a_forbidden_bubblewrap_is_a_failure_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{fake_bubblewrap(tmp_path, FORBIDDEN)}:/usr/bin:/bin")
    tmp_path.chmod(0o755)
    with pytest.raises(UserError, match="No permissions.*user namespaces"):
        require_sandbox(SandboxConfig())
    monkeypatch.setattr(sandbox, "_UBUNTU", tmp_path / "switch")
    (tmp_path / "switch").write_text("1\n")
    with pytest.raises(UserError, match="sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"):
        require_sandbox(SandboxConfig())
    with pytest.raises(UserError, match="sysctl"):
        with_sandbox({"": VerifierSpec("code")}, SandboxConfig())
    items = [(Prompt("p", "?", pack_tests([""], ["1"])), "```python\nprint(1)\n```")]
    with VerifierPool({"": code_verifier(SandboxConfig())}) as pool:
        (result,) = pool.verify(items)
    assert result.failure == "error"
    assert "No permissions" in pool.first_failures["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is for Linux")
@needs_bubblewrap
@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/true", "/bin/false"])
def test_another_interpreter_must_be_one(python: str) -> None:
    with pytest.raises(UserError, match="sandbox.python"):
        require_sandbox(SandboxConfig(python=python))


@needs_bubblewrap
def test_through_the_pool() -> None:
    tests = pack_tests(["2\n3"], ["5"])
    right, wrong = "```python\nprint(int(input()) + int(input()))\n```", "```python\nprint(4)\n```"
    unreadable = Prompt("bad", "?", "no tests", source="code")
    items = [(Prompt("p", "?", tests, source="code"), text) for text in (right, wrong, "none")]
    config = SandboxConfig.model_validate(QUICK)
    with VerifierPool(with_sandbox({"code": VerifierSpec("code")}, config)) as pool:
        results = pool.verify([*items, (unreadable, right)])
    assert [result.score for result in results] == [1, 0, 0, 0]
    assert [result.failure for result in results] == ["", "", "", "error"]
    assert [result.answer for result in results] == [None, None, "", None]


def test_other_verifiers_need_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    spec = VerifierSpec("forkrl.rewards.math:verify_math")
    assert with_sandbox({"": spec}, SandboxConfig()) == {"": spec}


def test_the_pool_waits_longer_than_a_program_may_take() -> None:
    spec = code_verifier(SandboxConfig(total_seconds=100.0))
    assert spec.timeout_s is not None
    assert spec.timeout_s > 100
    assert SandboxConfig(**spec.options) == SandboxConfig(total_seconds=100.0)
    json.dumps(spec.options)


def test_a_sandbox_must_fit_into_its_worker() -> None:
    overrides = ["task.name=dataset", "task.data=x.jsonl", "task.verifier=code", "sandbox.memory_mb=2000"]
    with pytest.raises(UserError, match="sandbox.memory_mb = 2000.*reward.memory_mb"):
        load_recipe(TrainConfig, None, overrides)
    load_recipe(TrainConfig, None, [*overrides, "reward.memory_mb=4096"])


def test_a_data_set_of_programs(tmp_path: Path) -> None:
    tests = {"inputs": ["1"], "outputs": ["2"]}
    path = tmp_path / "programs.jsonl"
    config = TaskConfig(name="dataset", data=str(path), verifier="code")
    rows = [{"prompt": "a", "answer": tests}, {"prompt": "b", "answer": json.dumps(tests)}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_evaluation_task(config, apply_chat_template=None)
    assert task.verifiers[""].path == "code"
    assert [unpack_tests(prompt.answer).programs[0].stdout for prompt in task.held_out] == ["2", "2"]
    for bad in ({"inputs": ["1"]}, "3", 3, ["1"]):
        path.write_text(json.dumps({"prompt": "a", "answer": bad}) + "\n")
        with pytest.raises(UserError, match="programs.jsonl line 1"):
            load_evaluation_task(config, apply_chat_template=None)


# ---------------------------------------------------------------- the filter of system calls


def decision(program: bytes, architecture: int, call: int, *arguments: int) -> int:
    """What a filter says of a call: the kernel's own rules for the few instructions that it uses."""
    data = struct.pack("=iIQ6Q", call, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    steps = [struct.unpack_from("=HBBI", program, 8 * index) for index in range(len(program) // 8)]
    index = value = 0
    while True:
        code, yes, no, operand = steps[index]
        index += 1
        if code == 0x06:
            return int(operand)
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
            continue
        holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
        index += yes if holds else no


ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


@pytest.mark.parametrize(
    ("machine", "call", "arguments", "expected"),
    [
        ("x86_64", 0, (), ALLOW),  # read
        ("x86_64", 101, (), EPERM),  # ptrace
        ("x86_64", 240, (), EPERM),  # mq_open, the last of the list
        ("x86_64", 425, (), EPERM),  # io_uring_setup
        ("x86_64", 435, (), ENOSYS),  # clone3
        ("x86_64", 56, (17,), ALLOW),  # clone, as fork does
        ("x86_64", 56, (0x3D0F00,), ALLOW),  # clone, as a thread does
        ("x86_64", 56, (0x10000000 | 17,), EPERM),  # clone into a new user namespace
        ("x86_64", 41, (1,), ALLOW),  # socket of the family unix
        ("x86_64", 41, (2,), EPERM),
        ("x86_64", 41, (40,), EPERM),
        ("x86_64", 53, (1,), ALLOW),  # socketpair
        ("x86_64", 16, (0, 0x5401), ALLOW),  # ioctl, what is a terminal
        ("x86_64", 16, (0, 0x5412), EPERM),  # ioctl, typing into one
        ("x86_64", 16, (0x5412, 0x5401), ALLOW),
        ("x86_64", 500, (), ENOSYS),
        ("x86_64", 0x40000000, (), ENOSYS),
        ("x86_64", -1, (), ENOSYS),
        ("aarch64", 63, (), ALLOW),  # read
        ("aarch64", 117, (), EPERM),
        ("aarch64", 101, (), ALLOW),  # nanosleep there
        ("aarch64", 220, (0x20000000 | 17,), EPERM),
        ("aarch64", 198, (10,), EPERM),
        ("aarch64", 180, (), EPERM),
        ("aarch64", 425, (), EPERM),
    ],
)
def test_what_the_filter_says(machine: str, call: int, arguments: tuple[int, ...], expected: int) -> None:
    assert decision(build_filter(machine), ARCHITECTURES[machine], call, *arguments) == expected


@pytest.mark.parametrize(("machine", "foreign"), [("x86_64", 0x40000003), ("aarch64", 0x40000028)])
def test_the_filter_kills_programs_of_another_architecture(machine: str, foreign: int) -> None:
    assert decision(build_filter(machine), foreign, 0) == KILL
