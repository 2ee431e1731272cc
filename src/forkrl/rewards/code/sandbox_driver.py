"""Runs inside the sandbox, as the text of ``python -c``: what stands between its first process and a program.

Nothing here is secret and nothing here is believed: it holds no expected output, and what it reports is a value that
the program could have returned as well. The outside compares. Two things are relied on, and both are over before the
program's first line: the limits are set, and process 1 of the sandbox is this file, not the program.
"""

import builtins
import os
import sys
from types import ModuleType

# What LiveCodeBench puts above every program, so that solutions written for it find their names.
_PRELUDE = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string
import re
import datetime
import collections
import heapq
import bisect
import copy
import math
import random
import statistics
import itertools
import functools
import operator
import io
import sys
import json
"""
_RECURSION_LIMIT = 50_000
_DYNAMIC = {"eval", "exec", "globals"}


def enter_sandbox() -> None:
    """Process 1: says that the sandbox stands, lets a child run the program, and ends with it."""
    answers_fd, lifeline_fd, program_fd, *limits = map(int, sys.argv[1:-1])
    function = sys.argv[-1]
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
    if not function:
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
    exec(compile(source, "program.py", "exec"), _new_module("__main__", source).__dict__)


def call_function(source: str, function: str, inputs: str, answers_fd: int) -> None:
    """Call a function, or the method of a class Solution, with each input; a line of JSON for each value."""
    import json

    dumps, loads, write, leave = json.dumps, json.loads, os.write, os._exit
    module = _new_module("program", source)
    exec(compile(source, "program.py", "exec"), module.__dict__)
    target = getattr(module.Solution() if "class Solution" in source else module, function)
    for arguments in loads(inputs):
        line = (dumps(target(*map(loads, arguments)), allow_nan=False) + "\n").encode("ascii")
        while line:
            line = line[write(answers_fd, line) :]
    leave(0)


def answer_on_stdout(source: str, function: str) -> None:
    """The same where there is no private pipe: answers take standard output, and what is printed goes nowhere."""
    inputs = sys.stdin.read()
    answers_fd = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    call_function(source, function, inputs, answers_fd)


def _new_module(name: str, source: str) -> ModuleType:
    sys.argv[:] = ["program.py"]
    sys.path[:] = [folder for folder in sys.path if folder]
    for leave in ("exit", "quit"):  # from Python's site module, which is left out because it costs time
        setattr(builtins, leave, sys.exit)
    module = sys.modules[name] = ModuleType(name)
    if _needs_prelude(source):
        exec(_PRELUDE, module.__dict__)
    sys.setrecursionlimit(_RECURSION_LIMIT)
    return module


def _needs_prelude(source: str) -> bool:
    """Whether the program uses names that it does not define. The imports take as long as starting Python does."""
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
    return bool(used - known - set(dir(builtins)) - {"__name__", "__file__"} or used & _DYNAMIC)
