"""Whole responses to read, for pages of responses whose tokens were not measured.

All text is raw, as the model wrote it: it is made visible and escaped where it is rendered, and only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

READ_CHARACTERS = 8000


@dataclass(frozen=True, slots=True)
class ReadResponse:
    """One response: ``outcome`` is "right", "wrong" or "failed", ``facts`` a few words each; both stand above it."""

    outcome: str
    facts: Sequence[str]
    text: str


@dataclass(frozen=True, slots=True)
class ReadQuestion:
    """A question by its id, how it went in a word or two, its text and its true answer (either may be empty)."""

    name: str
    outcome: str
    prompt: str
    answer: str
    responses: Sequence[ReadResponse]


@dataclass(frozen=True, slots=True)
class Shelf:
    """The questions of one benchmark, and a sentence on which these are."""

    title: str
    note: str
    questions: Sequence[ReadQuestion]


def shortened(text: str, limit: int = READ_CHARACTERS) -> str:
    """The text, or its beginning and its longer end, where the answer is, with a line that says how much is missing."""
    if len(text) <= limit:
        return text
    head = limit // 4
    tail = limit - head
    return f"{text[:head]}\n\n[… {len(text) - limit:,} characters are left out here …]\n\n{text[-tail:]}"
