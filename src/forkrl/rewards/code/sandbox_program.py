"""Loads a program inside a sandbox. Part of the driver's text there; must run on Python 3.9."""

import builtins
import sys
from types import ModuleType
from typing import Set, Tuple  # noqa: UP035

from forkrl.rewards.code.sandbox_values import ListNode, TreeNode

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


def load_program(source: str) -> ModuleType:
    """The program as a module whose functions are to be called, with LeetCode's nodes unless it defines its own."""
    module = new_module("program", source)
    module.__dict__.update(ListNode=ListNode, TreeNode=TreeNode)
    exec(compile(source, "program.py", "exec"), module.__dict__)
    return module


def new_module(name: str, source: str) -> ModuleType:
    """An empty module for a program, with the names that LiveCodeBench provides if the program needs any."""
    if hasattr(sys, "set_int_max_str_digits"):  # else Python does not read or write integers over 4,300 digits
        sys.set_int_max_str_digits(0)
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
    used, undefined = used_names(source)
    return bool(undefined - {"ListNode", "TreeNode"} or used & _DYNAMIC)


def used_names(source: str) -> Tuple[Set[str], Set[str]]:  # noqa: UP006
    """The global names that a program uses, and those of them that neither it nor Python defines."""
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
