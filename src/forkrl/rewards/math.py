r"""Judges answers to mathematics questions with math-verify.

Which answer counts: the last complete ``\boxed{...}``, and nothing else where there is one, so that a model cannot
hedge by boxing several answers. Without a box, what math-verify finds in the closing text ("the answer is ...", then
the last formula or number). An answer in words ("east", "\text{Evelyn}") is compared as words and needs the box:
math-verify would read a word as a product of its letters, and so call every anagram equal.

Call it in a worker (``VerifierPool``): math-verify's own time-outs are off, since its SIGALRM fails off the main thread
and then scores every answer 0; deadlines and memory limits are the pool's.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_BOX_TAIL = 20_000
"""Characters from the end that are searched for a box. The conclusion stands there; the search is linear."""
_PLAIN_TAIL = 4_000
"""Characters searched without a box: math-verify's patterns take quadratic time on hostile text (20,000: seconds)."""
_MAX_ANSWER = 1_000
"""A longer box is no final answer, and a formula of that length can keep sympy busy up to any deadline."""

_BOX_OR_BRACE = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")

_IN_BOX = [LatexExtractionConfig(boxed_match_priority=0)]
_IN_TEXT = [LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig()]

# Its only warning is that time-outs are off, which is meant.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify_math(answer: str, response: str) -> float:
    r"""1.0 where the response's final answer equals the gold answer, else 0.0.

    Args:
        answer: the gold answer, LaTeX or plain, with or without ``$...$`` or ``\boxed{...}`` around it.
        response: what the model wrote.

    Raises:
        ValueError: the gold answer cannot be read as mathematics; no response could ever be right.
    """
    gold_text = _bare(answer)
    gold_words = _as_words(gold_text)
    box = _last_box(response[-_BOX_TAIL:])
    if box is not None and len(box) > _MAX_ANSWER:
        return 0.0
    if gold_words:
        return float(box is not None and _as_words(box) == gold_words)
    gold = _parse_gold(gold_text)
    if box is None:
        found = parse(response[-_PLAIN_TAIL:], _IN_TEXT, fallback_mode="no_fallback", parsing_timeout=None)
    else:
        found = _parse_box(box)
    return float(_any_equal(gold, found))


def _any_equal(gold: list[Any], found: list[Any]) -> bool:
    """Whether any reading of the gold answer equals any reading of the response.

    math-verify would hide what sympy raises, an exhausted memory among it, and answer False. Here it is raised, unless
    another reading settles the question.
    """
    raised: Exception | None = None
    for gold_reading in gold:
        for reading in found:
            try:
                if verify(gold_reading, reading, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception as error:
                raised = raised or error
    if raised:
        raise raised
    return False


@lru_cache(maxsize=256)
def _parse_gold(text: str) -> list[Any]:
    gold = _parse_box(text)
    if not gold:
        raise ValueError(f"the gold answer {text!r} cannot be read as mathematics")
    return gold


def _parse_box(text: str) -> list[Any]:
    boxed = rf"\boxed{{{text}}}"
    return list(parse(boxed, _IN_BOX, fallback_mode="no_fallback", parsing_timeout=None))


def _last_box(text: str) -> str | None:
    r"""Content of the ``\boxed{...}`` that closes last, braces matched; None without a complete one."""
    box: str | None = None
    opened: list[tuple[bool, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match[0]
        if token == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                box = text[start : match.start()]
        elif token.endswith("{") and token != "\\{":
            opened.append((token != "{", match.end()))
    return box


def _bare(answer: str) -> str:
    """The gold answer without the dollars or the box around it."""
    text = answer.strip().strip("$").strip()
    box = _last_box(text)
    return text if box is None else box.strip()


def _as_words(text: str) -> str:
    """The answer in lower case where it is words (one of them of four letters or more), else ""."""
    plain = " ".join(_TEXT_COMMAND.sub(r" \1 ", text).split()).rstrip(".")
    is_words = _WORDS.fullmatch(plain) and max(map(len, re.split(r"[ '-]", plain))) >= 4
    return plain.casefold() if is_words else ""
