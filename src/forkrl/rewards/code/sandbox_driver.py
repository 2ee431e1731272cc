"""Runs inside the sandbox via ``python -c``: process 1, and the code that runs a program in its child.

For whole programs and called functions the driver is untrusted: it has no expected output, and results are compared
outside. Security relies only on two things done before the program starts: the limits are set, and process 1 is this
driver. This file, ``sandbox_calls`` and ``sandbox_asserts`` must run on Python 3.9 (``sandbox.python``).
"""

import builtins
import os
import sys
from types import ModuleType
from typing import Callable, Set, Tuple  # noqa: UP035

_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
)
# LiveCodeBench puts these imports above every program.
_PRELUDE = "".join(f"from {name} import *\n" for name in [*_MODULES.split(), "builtins", "typing"])
_PRELUDE += "".join(f"import {name}\n" for name in _MODULES.split())
_RECURSION_LIMIT = 50_000
_DYNAMIC = {"eval", "exec", "globals"}


def enter_sandbox(run: Callable[[str, int], None]) -> None:
    """Process 1: report that the sandbox is ready, run the program in a child, and exit with it."""
    answers_fd, lifeline_fd, program_fd, *limits = map(int, sys.argv[1:])
    os.write(answers_fd, b"ready\n")
    if not os.read(lifeline_fd, 1):
        os._exit(1)  # the process outside has died
    child = os.fork()
    if child:
        for fd in (0, 1, 2, answers_fd, program_fd):
            os.close(fd)
        end_with(child, lifeline_fd)
    os.close(lifeline_fd)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 2)  # until here stderr reports start failures
    os.close(null)
    with os.fdopen(program_fd, "rb") as file:
        source = file.read().decode()
    set_limits(*limits)
    run(source, answers_fd)


def end_with(child: int, lifeline_fd: int) -> None:
    """Exit, which ends the sandbox, when the program ends or the process outside closes its end of the lifeline."""
    import select

    child_fd = os.pidfd_open(child)
    waiting = select.poll()
    waiting.register(child_fd, select.POLLIN)
    waiting.register(lifeline_fd, select.POLLIN)
    if child_fd in [fd for fd, _ in waiting.poll()]:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    os._exit(1)


def set_limits(memory: int, cpu_seconds: int, file_size: int, processes: int) -> None:
    """Set hard limits, which no process in the sandbox can raise."""
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


def answer_on_stdout(run: Callable[[str, int], None], source: str) -> None:
    """Run without a private pipe: answers go to stdout, and the program's own output is discarded."""
    answers_fd = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    run(source, answers_fd)


def run_program(source: str, answers_fd: int = -1) -> None:
    """Run a whole program as ``__main__`` on stdin and stdout."""
    if answers_fd >= 0:
        os.close(answers_fd)
    exec(compile(source, "program.py", "exec"), new_module("__main__", source).__dict__)


def new_module(name: str, source: str) -> ModuleType:
    """An empty module for a program, with LiveCodeBench's names if it needs any."""
    if hasattr(sys, "set_int_max_str_digits"):  # lifts the limit of 4,300 digits
        sys.set_int_max_str_digits(0)
    sys.argv[:] = ["program.py"]
    sys.path[:] = [folder for folder in sys.path if folder]
    for leave in ("exit", "quit"):  # normally defined by the site module, which is skipped to save time
        setattr(builtins, leave, sys.exit)
    module = sys.modules[name] = ModuleType(name)
    used, undefined = used_names(source)
    if undefined - {"ListNode", "TreeNode"} or used & _DYNAMIC:  # these imports double the start-up time
        exec(_PRELUDE, module.__dict__)
    sys.setrecursionlimit(_RECURSION_LIMIT)
    return module


def used_names(source: str) -> Tuple[Set[str], Set[str]]:  # noqa: UP006
    """The global names a program uses, and those of them that neither it nor Python defines."""
    import symtable

    top = symtable.symtable(source, "program.py", "exec")
    known = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        if table is not top:  # "global x" in a function
            known |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_declared_global()}
    return used, used - known - set(dir(builtins)) - {"__name__", "__file__"}
