"""Values as they pass in and out of a sandboxed program, and LeetCode's nodes. Part of the driver's text in a sandbox.

Must run on Python 3.9, as ``sandbox.python`` may be that.
"""

from collections import deque
from types import ModuleType
from typing import Any


class ListNode:
    """A linked list, as LeetCode defines it."""

    def __init__(self, val: Any = 0, next: Any = None) -> None:
        self.val, self.next = val, next


class TreeNode:
    """A binary tree, as LeetCode defines it."""

    def __init__(self, val: Any = 0, left: Any = None, right: Any = None) -> None:
        self.val, self.left, self.right = val, left, right


class NotTransferableError(BaseException):
    """A value of a kind that cannot be passed between the program and its tests; these do not catch it by accident."""


def find_function(module: ModuleType, name: str) -> Any:
    """The method of a class Solution, else the function."""
    solution = getattr(module, "Solution", None)
    return getattr(solution() if hasattr(solution, name) else module, name)  # type: ignore[misc]


def make_nodes(module: ModuleType, name: str, values: Any) -> Any:
    """A linked list of values, or a tree of values level by level with None for a missing child; None of none."""
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
    """The values of a linked list or a tree, as ``make_nodes`` takes them."""
    kind = type(node).__name__
    if kind not in ("ListNode", "TreeNode"):
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
    return type(value).__name__ in ("ListNode", "TreeNode")


def encode(value: Any) -> Any:
    """A plain value as JSON can hold it, its type kept: what is no list, number or text is {type: parts}."""
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
    if isinstance(value, (list, range, deque, type({}.keys()), type({}.values()), type({}.items()))):
        return list(map(encode, value))
    if hasattr(value, "__next__"):  # a generator; tests make a list of it
        return list(map(encode, value))
    raise NotTransferableError(type(value).__name__)


def decode(module: Any, value: Any) -> Any:
    """What ``encode`` was given; nodes are of the module's classes."""
    if isinstance(value, list):
        return [decode(module, each) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, parts),) = value.items()
    if kind == "bytes":
        return bytes(parts)
    parts = [decode(module, each) for each in parts]
    if kind in ("ListNode", "TreeNode"):
        return make_nodes(module, kind, parts)
    if kind == "complex":
        return complex(*parts)
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[kind](parts)
