"""Errors and hostile text in one line."""

from __future__ import annotations

import pytest

from forkrl.errors import first_line, printable


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb"), "a"),
        (ValueError("\n  a\n"), "a"),
        (ValueError(""), "ValueError"),
        (OSError(28, "No space"), "[Errno 28] No space"),
        (ValueError("x" * 500), "x" * 300),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_printable_escapes_what_acts_and_nothing_else() -> None:
    text = "a é\x1b[2J\u202e\ue000\U000e0041\n\t"
    assert printable(text) == r"a é\x1b[2J\u202e\ue000\U000e0041\x0a\x09"
