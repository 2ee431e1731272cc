"""Runs ``assert`` tests against a program in another process; part of the driver's source in the sandbox.

The program's process is forked before the tests are read, has no descriptor to the tests or the result, and starts only
after the kernel denies it access to the tests' memory. It only answers calls, with replies decoded to plain values, so
it cannot patch the tests. If it exits, the tests fail.
"""

import ast
import builtins
import json
import os
import signal
from types import ModuleType
from typing import Any, Callable  # noqa: UP035

from forkrl.rewards.code.sandbox_calls import (
    ListNode,
    NotTransferableError,
    TreeNode,
    decode,
    encode,
    find_function,
    is_node,
    load_program,
    write_line,
)
from forkrl.rewards.code.sandbox_driver import new_module

_PR_SET_DUMPABLE = 4
_REACHED = "_forkrl_reached"


class ProgramEndedError(BaseException):
    """The program's process has ended. A BaseException, so that tests do not catch it by accident."""


def run_asserts(source: str, answers_fd: int) -> None:
    """Run the ``assert`` statements on stdin; the result is the last line written to ``answers_fd``."""
    requests, replies = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        for fd in (answers_fd, requests[1], replies[0]):
            os.close(fd)
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        with os.fdopen(requests[0], "r", encoding="ascii") as incoming:
            if incoming.readline():
                serve_calls(source, incoming, replies[1])
        os._exit(0)
    os.close(requests[0])
    os.close(replies[1])
    result = ["broken", "the kernel does not hide the tests from the program"]
    if _hide_memory():
        program = _Program(requests[1], replies[0], answers_fd)
        program.send("begin")
        with os.fdopen(0, "rb", closefd=False) as file:
            result = _result(program, json.loads(file.read()))
    os.kill(child, signal.SIGKILL)
    write_line(answers_fd, result)
    os._exit(0)


def _hide_memory() -> bool:
    """Make /proc/PID of this process root-only, so that no other process here can read or write its memory."""
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def _result(program: "_Program", tests: dict[str, Any]) -> list[str]:
    """["passed"], ["failed"], or ["broken", reason] if the tests themselves cannot run."""
    module = new_module("tests", "")
    module.__dict__.update(ListNode=ListNode, TreeNode=TreeNode)
    program.module = module
    reached: list[int] = []
    module.__dict__[_REACHED] = reached
    try:
        for name in tests["modules"]:
            module.__dict__[name] = __import__(name)
        for name in tests["names"]:
            module.__dict__[name] = program.function(name)
        exec(compile(_noting_asserts(tests["code"]), "tests.py", "exec"), module.__dict__)
        if tests["check"]:
            module.__dict__["check"](module.__dict__[tests["check"]])
    except NotTransferableError as error:
        return ["broken", f"a value of type {error} cannot be passed between the program and its tests"]
    except (ImportError, NameError, SyntaxError) as error:
        return ["failed"] if error is program.raised else ["broken", f"{type(error).__name__}: {error}"[:300]]
    except BaseException:  # a failed assertion, or an error caused by a wrong value
        return ["failed"]
    if program.ended:
        return ["failed"]
    # Tests of an exception may contain an unreachable ``assert False``.
    return ["passed"] if reached or program.raised else ["broken", "none of their assert statements was reached"]


def _noting_asserts(code: str) -> ast.Module:
    """The tests, with each ``assert x`` replaced by ``assert REACHED.append(0) or x``."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            note = ast.parse(f"{_REACHED}.append(0)", mode="eval").body
            node.test = ast.BoolOp(ast.Or(), [note, node.test])
    return ast.fix_missing_locations(tree)


class _Program:
    """Client for the program in the other process."""

    def __init__(self, requests_fd: int, replies_fd: int, answers_fd: int) -> None:
        self._requests_fd, self._answers_fd = requests_fd, answers_fd
        self._replies = os.fdopen(replies_fd, "r", encoding="ascii")
        self.module: ModuleType | None = None
        self.ended = False
        self.raised: BaseException | None = None

    def function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return self._call(name, arguments, named)

        call.__name__ = name
        return call

    def send(self, request: Any) -> None:
        try:
            write_line(self._requests_fd, request)
        except BrokenPipeError:
            self.ended = True
            raise ProgramEndedError from None

    def _call(self, name: str, arguments: Any, named: dict[str, Any]) -> Any:
        self.send([name, list(map(encode, arguments)), {key: encode(value) for key, value in named.items()}])
        reply = self._replies.readline()
        if not reply.endswith("\n"):
            self.ended = True
            raise ProgramEndedError
        os.write(self._answers_fd, b"call\n")  # restarts the time limit: one test's time per call
        kind, *values = json.loads(reply)
        if kind == "untransferable":
            raise NotTransferableError(str(values[0])[:80])
        if kind == "raised":
            self.raised = _exception(str(values[0]), str(values[1]))
            raise self.raised
        value, changed = (decode(self.module, each) for each in values)
        for argument, now in zip(arguments, changed):  # noqa: B905 - Python 3.9
            _change(argument, now)
        return value


def _exception(name: str, message: str) -> Exception:
    """A builtin exception by name, else Exception. StopIteration, which could end tests early, becomes RuntimeError."""
    kind = getattr(builtins, name, None)
    if kind in (StopIteration, StopAsyncIteration):
        kind = RuntimeError
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:
            pass
    return Exception(message)


def _change(argument: Any, now: Any) -> None:
    """Copy the function's changes to its argument back."""
    if isinstance(argument, list) and isinstance(now, list):
        argument[:] = now
    elif isinstance(argument, (dict, set)) and type(now) is type(argument):
        argument.clear()
        argument.update(now)
    elif type(argument).__name__ in ("ListNode", "TreeNode") and type(now) is type(argument):
        argument.__dict__.update(now.__dict__)


def serve_calls(source: str, incoming: Any, replies_fd: int) -> None:
    """The program's process: load the program and answer calls until the tests end."""
    loads = json.loads
    module = load_program(source)
    for line in incoming:
        name, given, named = loads(line)
        try:
            arguments = [decode(module, each) for each in given]
            value = find_function(module, name)(*arguments, **{key: decode(module, named[key]) for key in named})
            changed = [each if isinstance(each, (list, dict, set)) or is_node(each) else None for each in arguments]
            reply = ["value", encode(value), encode(changed)]
        except NotTransferableError as error:
            reply = ["untransferable", str(error)]
        except Exception as error:
            own = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            reply = ["raised", own, str(error)[:1000]]
        write_line(replies_fd, reply)
