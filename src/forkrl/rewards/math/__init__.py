"""Scores answers to mathematics questions (docs/math-verifier.md); a ``VerifierPool`` must limit time and memory."""

from __future__ import annotations

import re
from functools import lru_cache

from forkrl.rewards.math.answer import Answer, read_answer
from forkrl.rewards.math.equality import is_same
from forkrl.rewards.math.formula import TooLarge
from forkrl.rewards.math.response import MAX_ANSWER, boxed_or_bare, final_answer
from forkrl.types import Judgement

_GROUPED = re.compile(r"\d,\d{3}(?!\d)")
_LOG = re.compile(r"\\log(?![a-zA-Z]|\s*_)")


def verify_math(answer: str, response: str) -> Judgement:
    r"""1.0 if the response's final answer equals the gold answer, else 0.0; and the final answer found.

    ``answer`` is LaTeX or plain text, optionally in ``$...$``, ``\boxed{...}`` or after ``####``. Equal final answers
    mostly have equal text ("1/2" for ``0.5``), independent of the gold answer; "" if none is readable.
    """
    return _judge(answer, final_answer(response))


def verify_math_answer(answer: str, found: str) -> Judgement:
    """``verify_math`` for a final answer that ``task.answer_format`` found."""
    return _judge(answer, found if len(found) <= MAX_ANSWER else "")


def _judge(answer: str, text: str) -> Judgement:
    gold = _read_gold(answer)
    try:
        found = read_answer(text)
    except TooLarge:
        return Judgement(float(_same_text(answer, text)), text)
    if found.kind == "unreadable":
        return Judgement(float(_same_text(answer, text)), "")
    return Judgement(float(gold is not None and _is_right(answer, gold, text, found)), str(found))


def _is_right(answer: str, gold: Answer, text: str, found: Answer) -> bool:
    """Whether any valid reading of the found answer equals the gold one."""
    if is_same(gold, found):
        return True
    if gold.kind in ("list", "set") and _GROUPED.search(text):
        return is_same(gold, read_answer(text.replace(",", ", "), thousands=False))
    if _LOG.search(answer) or _LOG.search(text):  # log may be base 10 or e
        golds, founds = (_LOG.sub(r"\\ln", side) for side in (boxed_or_bare(answer), text))
        return is_same(read_answer(golds), read_answer(founds))
    return False


@lru_cache(maxsize=256)
def _read_gold(answer: str) -> Answer | None:
    """The gold answer; None if it is too large, so that only equal text counts."""
    try:
        gold = read_answer(boxed_or_bare(answer))
    except TooLarge:
        return None
    if gold.kind == "unreadable":
        raise ValueError(f"the gold answer {answer!r} cannot be read as mathematics")
    return gold


def _same_text(answer: str, text: str) -> bool:
    return bool(text) and "".join(boxed_or_bare(answer).strip("$").split()) == "".join(text.split())
