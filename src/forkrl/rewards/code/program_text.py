"""Which of a response's code blocks is the program."""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

from forkrl.rewards.code.test_cases import CodeTests
from forkrl.rewards.reply import reply_of

_FENCE = re.compile(r"(\s*(?:(?:[-*+]|\d{1,9}[.)])\s+)*)```+\s*(\S*)")
"""The fence of a block, which may follow the marks of list items on its line."""
_PYTHON = {"python", "python3", "py"}
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|\bfileinput\b|\bos\.read\b")


class _Block(NamedTuple):
    language: str
    code: str


def last_program(response: str, tests: CodeTests | None = None) -> str | None:
    """The program in a reply: its last closed block fenced as Python, else its last one without a language.

    With tests, a block that cannot be the program does not take the place of one before it that can: where a function
    is called, the last block that defines it counts; where standard input is given, the last one that reads it.
    """
    blocks = _closed_blocks(reply_of(response))
    candidates = [block.code for block in blocks if block.language in _PYTHON]
    candidates = candidates or [block.code for block in blocks if not block.language]
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


def _closed_blocks(response: str) -> list[_Block]:
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
        blocks.append(_Block(language, _without_indent(lines[start + 1 : number], indent)))
    return blocks


def _without_indent(lines: list[str], indent: int) -> str:
    """The code of a block whose fence is indented, as in a list: as much is taken off every line, if it has as much."""
    code = "\n".join(_cut(line, indent) for line in lines) if indent else "\n".join(lines)
    first = next((line for line in code.split("\n") if line.strip()), "")
    return textwrap.dedent(code) if first[:1].isspace() else code


def _cut(line: str, indent: int) -> str:
    spaces = len(line) - len(line.lstrip(" \t"))
    blank = line[:spaces].expandtabs()
    return blank[min(indent, len(blank)) :] + line[spaces:]
