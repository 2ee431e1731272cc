"""Lines of source by package: all lines, and lines of code without docstrings, comments and blank lines.

python tools/loc.py [FOLDER ...]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Lines that hold at least a token of code; a statement of one string literal is a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def main(folders: list[str]) -> None:
    for folder in map(Path, folders):
        totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for path in sorted(folder.rglob("*.py")):
            source, inside = path.read_text(), path.relative_to(folder).parts
            counts = (1, len(source.splitlines()), code_lines(source))
            for name in (inside[0] if len(inside) > 1 else "(root)", "total"):
                totals[name] = [sum(pair) for pair in zip(totals[name], counts, strict=True)]
        print(f"{folder!s:20}{'files':>8}{'lines':>8}{'code':>8}")
        for name, row in sorted(totals.items(), key=lambda item: item[0] == "total"):
            print(f"  {name:18}{row[0]:8,}{row[1]:8,}{row[2]:8,}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["src/forkrl", "tests"])
