"""Calls functions of a sandboxed program, encodes values, and defines LeetCode's nodes; part of the driver's source."""

import json
import os
from collections import deque
from types import ModuleType
from typing import Any, Callable  # noqa: UP035

from forkrl.rewards.code.sandbox_driver import new_module

_NODES = ("ListNode", "TreeNode")


class ListNode:
    """LeetCode's linked list."""

    def __init__(self, val: Any = 0, next: Any = None) -> None:
        self.val, self.next = val, next


class TreeNode:
    """LeetCode's binary tree."""

    def __init__(self, val: Any = 0, left: Any = None, right: Any = None) -> None:
        self.val, self.left, self.right = val, left, right


class NotTransferableError(BaseException):
    """A value cannot pass between program and tests. A BaseException, so that tests do not catch it by accident."""


def call_function(source: str, answers_fd: int) -> None:
    """Call the function named on stdin with each input given there.

    Writes one JSON line per call: a list of the value and, if it is None, of the first argument, which a function may
    modify instead. Arguments annotated as ListNode or TreeNode are built from lists; such results become lists.
    """
    loads, leave = json.loads, os._exit
    with os.fdopen(0, "rb", closefd=False) as file:
        function, inputs = loads(file.read())
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    module = load_program(source)
    target = find_function(module, function)
    annotations = _annotations(target)
    makers = [_node_maker(module, annotation) for name, annotation in annotations.items() if name != "return"]
    returns_nodes = "Node" in annotations.get("return", "")
    takes_nodes = "Node" in next(iter(annotations.values()), "")
    for texts in inputs:
        arguments = list(map(loads, texts))
        for index, maker in enumerate(makers[: len(arguments)]):
            arguments[index] = maker(arguments[index])
        value = target(*arguments)
        reply = [value]
        if value is None and returns_nodes:
            reply.append([])
        elif value is None and arguments:
            reply.append([] if takes_nodes and arguments[0] is None else arguments[0])
        write_line(answers_fd, reply, allow_nan=False, default=node_values)
    leave(0)


def write_line(
    fd: int, message: Any, dumps: Any = json.dumps, write: Callable[[int, bytes], int] = os.write, **options: Any
) -> None:
    """Write a line of JSON. Defaults bind functions before the program can replace them."""
    line = (dumps(message, **options) + "\n").encode("ascii")
    while line:
        line = line[write(fd, line) :]


def _annotations(target: Any) -> dict[str, str]:
    """The annotations as text: of each parameter in order, and of the result ("return")."""
    import inspect

    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return {}
    annotations = {name: str(parameter.annotation) for name, parameter in signature.parameters.items()}
    return {**annotations, "return": str(signature.return_annotation)}


def _node_maker(module: ModuleType, annotation: str) -> Callable[[Any], Any]:
    name = next((name for name in _NODES if name in annotation), "")
    if not name:
        return lambda value: value
    if "List[" in annotation or "list[" in annotation:  # a list of them
        return lambda value: [make_nodes(module, name, each) for each in value]
    return lambda value: make_nodes(module, name, value)


def load_program(source: str) -> ModuleType:
    """The program as a module, with LeetCode's nodes unless it defines its own."""
    module = new_module("program", source)
    module.__dict__.update(ListNode=ListNode, TreeNode=TreeNode)
    exec(compile(source, "program.py", "exec"), module.__dict__)
    return module


def find_function(module: ModuleType, name: str) -> Any:
    """A method of class Solution, else a function."""
    solution = getattr(module, "Solution", None)
    return getattr(solution() if hasattr(solution, name) else module, name)  # type: ignore[misc]


def make_nodes(module: ModuleType, name: str, values: Any) -> Any:
    """A linked list, or a tree given level by level with None for missing children; None for no values."""
    node = getattr(module, name)
    if not values:
        return None
    first = node(values[0])
    if name == "ListNode":
        last = first
        for value in values[1:]:
            last.next = node(value)
            last = last.next
        return first
    parents, rest = deque([first]), deque(values[1:])
    while rest:
        parent = parents.popleft()
        for side in ("left", "right"):
            value = rest.popleft() if rest else None
            if value is not None:
                setattr(parent, side, node(value))
                parents.append(getattr(parent, side))
    return first


def node_values(node: Any) -> list[Any]:
    """The inverse of ``make_nodes``."""
    kind = type(node).__name__
    if kind not in _NODES:
        raise NotTransferableError(kind)
    values: list[Any] = []
    seen: set[int] = set()
    waiting = deque([node])
    while waiting:
        node = waiting.popleft()
        if node is None:
            values.append(None)
            continue
        if id(node) in seen:
            raise ValueError("a node that is its own successor")
        seen.add(id(node))
        values.append(node.val)
        if kind == "TreeNode":
            waiting += (node.left, node.right)
        elif node.next is not None:
            waiting.append(node.next)
    while kind == "TreeNode" and values and values[-1] is None:
        values.pop()
    return values


def is_node(value: Any) -> bool:
    return type(value).__name__ in _NODES


def encode(value: Any) -> Any:
    """Encode a plain value as JSON; types other than list, number and text become {type: parts}."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: list(map(encode, value))}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": list(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if is_node(value):
        return {type(value).__name__: list(map(encode, node_values(value)))}
    sequences: tuple[type, ...] = (list, range, deque, type({}.keys()), type({}.values()), type({}.items()))
    if isinstance(value, sequences) or hasattr(value, "__next__"):  # a generator, which tests consume as a list
        return list(map(encode, value))
    raise NotTransferableError(type(value).__name__)


def decode(module: Any, value: Any) -> Any:
    """The inverse of ``encode``; nodes use the module's classes."""
    if isinstance(value, list):
        return [decode(module, each) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, parts),) = value.items()
    if kind == "bytes":
        return bytes(parts)
    parts = [decode(module, each) for each in parts]
    if kind in _NODES:
        return make_nodes(module, kind, parts)
    if kind == "complex":
        return complex(*parts)
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[kind](parts)
