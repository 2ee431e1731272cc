"""The tests in ``Prompt.answer``, and extraction of the program from a response.

Tests are a JSON object with ``inputs``, ``outputs`` and, for a function, ``fn_name``; or with ``assert`` statements
under HumanEval's (``prompt``, ``test``, ``entry_point``) or MBPP's (``test_list``) keys. Long ones are compressed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import itertools
import json
import pickletools
import re
import sys
import textwrap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from forkrl.errors import UserError
from forkrl.rewards.code.sandbox_driver import used_names
from forkrl.rewards.reply import reply_of

CODE_VERIFIER = "code"
"""The value of task.verifier for programs; ``with_sandbox`` turns it into a verifier that a pool can run."""

_COMPRESSED = "zlib+base64:"
_NOT_TESTS = (
    'the tests are not JSON of the form {"inputs": [...], "outputs": [...]}, {"test": ..., "entry_point": ...} or '
    '{"test_list": [...]}'
)
_LONG = 4_000
"""Characters; shorter tests stay uncompressed, so that rollouts and data are readable."""
_STRING_OPCODES = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_BORING_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
_FENCE = re.compile(r"(\s*(?:(?:[-*+]|\d{1,9}[.)])\s+)*)```+\s*(\S*)")
"""The fence of a block, possibly after list markers on the same line."""
_PYTHON = {"python", "python3", "py"}
_STARTS_CODE = re.compile(r"\s*^(from|import|def|async|class|@)", re.MULTILINE)
_STARTS_BODY = re.compile(r"\s*^(\t|  )[ \t]*\S", re.MULTILINE)
_FUTURE_IMPORT = re.compile(r"^from __future__ import[ \t]*(?:\([^()]*\)|(?:[^\\\n]|\\\n)*).*\n?", re.MULTILINE)
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|\bfileinput\b|\bos\.read\b")


class ProgramTest(NamedTuple):
    """Standard input and expected standard output."""

    stdin: str
    stdout: str


class CallTest(NamedTuple):
    """JSON arguments of a call, and the accepted values."""

    arguments: tuple[str, ...]
    accepted: tuple[Any, ...]


class AssertTests(NamedTuple):
    code: str
    """The set-up and the asserts."""
    functions: tuple[str, ...]
    """Names that the program must define; all calls of them go to the program."""
    check: str = ""
    """The function passed to the tests' own ``check``, if that must be called."""
    modules: tuple[str, ...] = ()
    """Standard library modules used but not imported by the code."""
    prompt: str = ""
    """The start of the program, up to the docstring of the function to complete; "": none."""
    helpers: str = ""
    """The prompt before that function: imports and complete functions."""
    indentation: str = ""
    """Of the body of that function."""

    @property
    def request(self) -> str:
        """ASCII JSON for ``Sandbox.answers``."""
        return json.dumps({"code": self.code, "names": self.functions, "check": self.check, "modules": self.modules})


class CodeTests(NamedTuple):
    """The tests of one problem, all of one kind: programs, calls of ``function``, or ``asserts``."""

    function: str
    programs: tuple[ProgramTest, ...] = ()
    calls: tuple[CallTest, ...] = ()
    asserts: AssertTests | None = None


@contextmanager
def any_number_of_digits() -> Iterator[None]:
    """Lift Python's limit of 4,300 digits for reading and writing integers."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def pack_tests(inputs: Sequence[Any], outputs: Sequence[Any], function: str = "") -> str:
    """Serialise a problem's tests.

    For a ``function`` (or method of class Solution), each input is a list of arguments, or text with one JSON value per
    line, and each output is the value, as JSON text unless it is not text. Otherwise both are stdin and stdout.
    """
    tests = {"inputs": list(inputs), "outputs": list(outputs)} | ({"fn_name": function} if function else {})
    with any_number_of_digits():
        text = json.dumps(tests)
    return repack_tests(text)


def repack_tests(text: str) -> str:
    """Compress the tests if they are long; raises ValueError if they are invalid."""
    unpack_tests(text)
    if len(text) <= _LONG or text.startswith(_COMPRESSED):
        return text
    return _COMPRESSED + base64.b64encode(zlib.compress(text.encode("utf-8", "surrogatepass"), 9)).decode("ascii")


def unpack_tests(text: str) -> CodeTests:
    """Read the output of ``pack_tests`` or the ecosystem's JSON; raises ValueError for anything else.

    An output that is a list may also be a list containing the value: data sets use both.
    """
    with any_number_of_digits():
        try:
            if text.startswith(_COMPRESSED):
                data = zlib.decompress(base64.b64decode(text.removeprefix(_COMPRESSED)))
                text = data.decode("utf-8", "surrogatepass")
            tests = json.loads(text)
        except (ValueError, zlib.error):
            raise ValueError(_NOT_TESTS) from None
        if isinstance(tests, list):
            tests = {"test_list": tests}
        if not isinstance(tests, dict) or not tests.keys() & {"inputs", "test", "test_list"}:
            raise ValueError(_NOT_TESTS)
        return _unpack_pairs(tests) if "inputs" in tests else _unpack_asserts(tests)


def _unpack_pairs(tests: Mapping[str, Any]) -> CodeTests:
    inputs, outputs, function = tests["inputs"], tests.get("outputs"), tests.get("fn_name") or ""
    if not (isinstance(inputs, list) and isinstance(outputs, list) and isinstance(function, str)):
        raise ValueError("the tests' inputs and outputs must be lists, and fn_name text")  # noqa: TRY004
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"the tests have {len(inputs)} inputs and {len(outputs)} outputs")
    pairs = list(zip(inputs, outputs, strict=True))
    if function:
        return CodeTests(function, calls=tuple(CallTest(_arguments(given), _accepted(due)) for given, due in pairs))
    return CodeTests("", programs=tuple(ProgramTest(_lines(given), _lines(due)) for given, due in pairs))


def _unpack_asserts(tests: Mapping[str, Any]) -> CodeTests:
    function = tests.get("entry_point") or ""
    setup, imports = tests.get("test_setup_code") or "", tests.get("test_imports") or []
    own = tests.get("test", tests.get("test_list"))
    parts = [*imports, setup, *([own] if isinstance(own, str) else own or [])] if isinstance(imports, list) else [None]
    if not isinstance(function, str) or not all(isinstance(part, str) for part in parts):
        raise ValueError("the tests' test, test_setup_code and entry_point must be text, and test_list a list of text")
    function = function.removeprefix("Solution().")
    opening = _opening(tests.get("prompt"), function)
    code = "\n".join(map(str, [opening.helpers, *parts]))
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the tests are not Python: {error}") from None
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise ValueError("the tests hold no assert statement")
    _, undefined = used_names(code)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    modules = undefined & set(sys.stdlib_module_names) - called - {function}
    needed = undefined - modules - {"ListNode", "TreeNode"} | ({function} if function else set())
    if not needed:
        raise ValueError("the tests call no function of the program; name it in entry_point")
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls_check = any(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "check"
        for node in tree.body
    )
    if "check" in defined and not calls_check and not function:
        raise ValueError("the tests define check(candidate); name the function of the program in entry_point")
    check = function if "check" in defined and not calls_check else ""
    asserts = AssertTests(code, tuple(sorted(needed)), check, tuple(sorted(modules)), *opening)
    return CodeTests(function, asserts=asserts)


class _Opening(NamedTuple):
    """The last fields of ``AssertTests``."""

    prompt: str = ""
    helpers: str = ""
    indentation: str = ""


def _opening(prompt: Any, function: str) -> _Opening:
    """Empty unless the prompt is code that ends with the start of the function: some rows have a prompt in words."""
    if not isinstance(prompt, str) or not function:
        return _Opening()
    prompt = prompt.rstrip() + "\n"
    for body in ("", "    pass\n"):  # with a docstring, and without
        try:
            last = ast.parse(prompt + body).body[-1]
        except (SyntaxError, ValueError, IndexError):
            continue
        if isinstance(last, ast.FunctionDef) and last.name == function:
            lines = f"{prompt}{body}".split("\n")
            start = min([last.lineno, *(node.lineno for node in last.decorator_list)])
            helpers = "".join(f"{line}\n" for line in lines[: start - 1])
            return _Opening(prompt, helpers, lines[last.body[0].lineno - 1][: last.body[0].col_offset])
    return _Opening()


def tests_from_livecodebench(row: Mapping[str, Any]) -> str:
    """The tests of a ``livecodebench/code_generation_lite`` row; raises UserError if it has another form."""
    place = f"question {row.get('question_id', '?')!r}"
    cases = _cases(row, "public_test_cases", place) + _cases(row, "private_test_cases", place)
    kinds = {case.get("testtype") for case in cases}
    if kinds not in ({"stdin"}, {"functional"}):
        raise UserError(f"{place}: its tests are of the kinds {sorted(map(str, kinds))}, not all stdin or functional")
    function = ""
    if kinds == {"functional"}:
        try:
            function = json.loads(row["metadata"])["func_name"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{place}: metadata is not JSON with the func_name that functional tests need") from None
    try:
        return pack_tests([case["input"] for case in cases], [case["output"] for case in cases], function)
    except (ValueError, KeyError) as error:
        raise UserError(f"{place}: {error}") from None


def _cases(row: Mapping[str, Any], column: str, place: str) -> list[dict[str, Any]]:
    text = row.get(column)
    if not isinstance(text, str):
        raise UserError(f"{place} has no text in column {column}; is this livecodebench/code_generation_lite?")
    try:
        try:
            cases = json.loads(text)
        except ValueError:
            cases = json.loads(_only_string(zlib.decompress(base64.b64decode(text, validate=True))))
    except (ValueError, binascii.Error, zlib.error) as error:
        raise UserError(f"{place}: {column} is neither JSON nor compressed JSON ({error})") from None
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise UserError(f"{place}: {column} is not a list of tests")
    return cases


def _only_string(data: bytes) -> str:
    """The string in a pickle of one string; reads the opcodes without unpickling."""
    strings = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _STRING_OPCODES:
            strings.append(argument)
        elif opcode.name not in _BORING_OPCODES:
            raise ValueError(f"a pickle with more than a string in it: {opcode.name}")
    if len(strings) != 1:
        raise ValueError(f"a pickle with {len(strings)} strings in it")
    return str(strings[0])


def _lines(text: Any) -> str:
    """Standard input or output; some data sets store a list of lines."""
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        return "\n".join(text)
    if not isinstance(text, str):
        raise ValueError(f"a test without fn_name has a {type(text).__name__} where text is due")  # noqa: TRY004
    return text


def _arguments(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        lines = [line for line in given.split("\n") if line.strip()]
        for line in lines:
            json.loads(line)
        return tuple(lines)
    if not isinstance(given, list):
        raise ValueError(f"a test of a function has a {type(given).__name__} where its arguments are due")  # noqa: TRY004
    return tuple(json.dumps(value) for value in given)


def _accepted(due: Any) -> tuple[Any, ...]:
    if isinstance(due, str):
        return (json.loads(due),)
    return (due, due[0]) if isinstance(due, list) and len(due) == 1 else (due,)


def program_of(response: str, tests: CodeTests) -> str | None:
    """The program to test: ``last_program``, completed by the tests' prompt if they have one.

    With a prompt, a block without the function is its body, and a reply without a block may continue the prompt or be
    the whole function.
    """
    code = last_program(response, tests)
    if tests.asserts is None or not tests.asserts.prompt:
        return code
    continues = False
    if code is None:
        code = _before_fence(reply_of(response))
        continues = bool(_STARTS_BODY.match(code))
        if not continues and not (_STARTS_CODE.match(code) and _may_be_the_program(code, tests)):
            return None
    if not continues and _may_be_the_program(code, tests):
        return "".join(_FUTURE_IMPORT.findall(code)) + tests.asserts.helpers + _FUTURE_IMPORT.sub("", code)
    body = textwrap.dedent(_indented_part(code)) if _STARTS_BODY.match(code) else code
    return tests.asserts.prompt + textwrap.indent(body, tests.asserts.indentation)


def _before_fence(reply: str) -> str:
    return "\n".join(itertools.takewhile(lambda line: not _FENCE.match(line), reply.split("\n")))


def _indented_part(code: str) -> str:
    """The body of a function: everything before the first line without indentation."""
    lines = code.split("\n")
    return "\n".join(itertools.takewhile(lambda line: not line.strip() or line[0].isspace(), lines))


def last_program(response: str, tests: CodeTests | None = None) -> str | None:
    """The program in a reply: the last closed Python block, else the last block without a language.

    With tests, blocks that define the called function or read the given standard input come first.
    """
    blocks = _closed_blocks(reply_of(response))
    candidates = [code for language, code in blocks if language in _PYTHON]
    candidates = candidates or [code for language, code in blocks if not language]
    suitable = [code for code in candidates if tests is not None and _may_be_the_program(code, tests)]
    return (suitable or candidates)[-1] if candidates else None


def _may_be_the_program(code: str, tests: CodeTests) -> bool:
    if tests.programs:
        return any(test.stdin.strip() for test in tests.programs) and bool(_READS_INPUT.search(code))
    names = (tests.function,) if tests.function or tests.asserts is None else tests.asserts.functions
    return any(
        re.search(rf"^[ \t]*(async[ \t]+)?(def|class)[ \t]+{name}\b|^{name}[ \t]*(:[^=\n]*)?=[^=]", code, re.MULTILINE)
        for name in map(re.escape, names)
    )


def _closed_blocks(response: str) -> list[tuple[str, str]]:
    blocks = []
    opened: tuple[str, int, int] | None = None
    lines = response.split("\n")
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if not fence:
            continue
        if opened is None:
            opened = fence[2].lower(), number, len(fence[1].expandtabs())
            continue
        (language, start, indent), opened = opened, None
        blocks.append((language, _without_indent(lines[start + 1 : number], indent)))
    return blocks


def _without_indent(lines: list[str], indent: int) -> str:
    code = "\n".join(_cut(line, indent) for line in lines) if indent else "\n".join(lines)
    first = next((line for line in code.split("\n") if line.strip()), "")
    return textwrap.dedent(code) if first[:1].isspace() else code


def _cut(line: str, indent: int) -> str:
    spaces = len(line) - len(line.lstrip(" \t"))
    blank = line[:spaces].expandtabs()
    return blank[min(indent, len(blank)) :] + line[spaces:]
