"""Runs inside the sandbox, as the text of ``python -c``: what stands between its first process and a program.

Of whole programs and of called functions nothing here is believed: there is no expected output in here, and what is
reported is a value that the program could have returned as well. The outside compares. Two things are relied on, and
both are over before the program's first line: the limits are set, and process 1 of the sandbox is this file.

Tests written as ``assert`` statements run in here too, but in a process of their own (``run_tests``). The program
answers calls in another process, which never sees the tests and cannot look into theirs. Only plain values pass.
"""

import os
import sys
from types import ModuleType
from typing import Any, Callable  # noqa: UP035 - sandbox.python may be Python 3.9

from forkrl.rewards.code.sandbox_program import load_program, new_module
from forkrl.rewards.code.sandbox_tests import run_tests
from forkrl.rewards.code.sandbox_values import find_function, make_nodes, node_values


def enter_sandbox() -> None:
    """Process 1: says that the sandbox stands, lets a child run the program, and ends with it."""
    answers_fd, lifeline_fd, program_fd, *limits = map(int, sys.argv[1:-2])
    mode, function = sys.argv[-2:]
    os.write(answers_fd, b"ready\n")
    if not os.read(lifeline_fd, 1):
        os._exit(1)  # the judge has died meanwhile
    child = os.fork()
    if child:
        for fd in (0, 1, 2, answers_fd, program_fd):
            os.close(fd)
        end_with(child, lifeline_fd)
    os.close(lifeline_fd)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 2)  # until here stderr explained what went wrong
    os.close(null)
    with os.fdopen(program_fd, "rb") as file:
        source = file.read().decode()
    if mode == "tests":
        set_limits(*limits)
        run_tests(source, answers_fd)
    elif mode == "program":
        os.close(answers_fd)
        set_limits(*limits)
        run_program(source)
    else:
        with os.fdopen(0, "rb", closefd=False) as file:
            inputs = file.read().decode()
        os.dup2(2, 0)
        set_limits(*limits)
        call_function(source, function, inputs, answers_fd)


def end_with(child: int, lifeline_fd: int) -> None:
    """End this process, and with it every other one in here, when the program ends or the judge outside has died.

    The judge holds the other end of the lifeline, a socket: nobody in here could keep it open in its place.
    """
    import select

    child_fd = os.pidfd_open(child)
    waiting = select.poll()
    waiting.register(child_fd, select.POLLIN)
    waiting.register(lifeline_fd, select.POLLIN)
    if child_fd in [fd for fd, _ in waiting.poll()]:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    os._exit(1)


def set_limits(memory: int, cpu_seconds: int, file_size: int, processes: int) -> None:
    """Hard limits, which no process in here can raise again."""
    import resource

    for name, wanted in (
        ("AS", memory),
        ("CPU", cpu_seconds),
        ("FSIZE", file_size),
        ("NPROC", processes),
        ("NOFILE", 256),
        ("CORE", 0),
        ("MSGQUEUE", 0),
        ("MEMLOCK", 1 << 16),
        ("STACK", 120 << 20),
    ):
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))


def run_program(source: str) -> None:
    """A whole program, as ``__main__``, on standard input and output."""
    exec(compile(source, "program.py", "exec"), new_module("__main__", source).__dict__)


def call_function(source: str, function: str, inputs: str, answers_fd: int) -> None:
    """Call a function with each input; a line of JSON for each: a list of the value, and where that is None of what
    stands for it: the first argument, which a function may change instead of returning a value.

    Arguments that the function's annotations call ListNode or TreeNode are made from lists, and such values are lists.
    """
    import json

    dumps, loads, write, leave = json.dumps, json.loads, os.write, os._exit
    module = load_program(source)
    target = find_function(module, function)
    annotations = _annotations(target)
    makers = [_node_maker(module, annotation) for name, annotation in annotations.items() if name != "return"]
    returns_nodes = "Node" in annotations.get("return", "")
    takes_nodes = "Node" in next(iter(annotations.values()), "")
    for texts in loads(inputs):
        arguments = list(map(loads, texts))
        for index, maker in enumerate(makers[: len(arguments)]):
            arguments[index] = maker(arguments[index])
        value = target(*arguments)
        reply = [value]
        if value is None and returns_nodes:
            reply.append([])
        elif value is None and arguments:
            reply.append([] if takes_nodes and arguments[0] is None else arguments[0])
        line = (dumps(reply, allow_nan=False, default=node_values) + "\n").encode("ascii")
        while line:
            line = line[write(answers_fd, line) :]
    leave(0)


def _annotations(target: Any) -> dict[str, str]:
    """The annotation of every parameter in order, and of the result ("return"), as text."""
    import inspect

    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return {}
    annotations = {name: str(parameter.annotation) for name, parameter in signature.parameters.items()}
    return {**annotations, "return": str(signature.return_annotation)}


def _node_maker(module: ModuleType, annotation: str) -> Callable[[Any], Any]:
    name = next((name for name in ("ListNode", "TreeNode") if name in annotation), "")
    if not name:
        return lambda value: value
    if "List[" in annotation or "list[" in annotation:  # a list of them
        return lambda value: [make_nodes(module, name, each) for each in value]
    return lambda value: make_nodes(module, name, value)


def answer_on_stdout(mode: str, source: str, function: str) -> None:
    """The same where there is no private pipe: answers take standard output, and what is printed goes nowhere."""
    answers_fd = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if mode == "tests":
        run_tests(source, answers_fd)
    else:
        inputs = sys.stdin.read()
        os.dup2(null, 0)
        call_function(source, function, inputs, answers_fd)
