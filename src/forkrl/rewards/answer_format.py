"""Finds the answer in a response by ``task.answer_format``. Runs in the verifier workers, which can be killed."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from forkrl.rewards.reply import reply_of

VERIFIERS_OF_ANSWERS = {
    "forkrl.rewards.math:verify_math": "forkrl.rewards.math:verify_math_answer",
    "forkrl.rewards.gym:verify_gym": "forkrl.rewards.gym:verify_gym_answer",
}
"""For verifiers that look for the answer themselves: their counterparts for an answer that was found."""

T = TypeVar("T")
_TAG, _END_TAG = "<answer>", "</answer>"
_NUMBER = re.compile(
    # Not within a name (x2), an exponent (10^5) or another number.
    r"(?<![A-Za-z0-9_^])(?<![0-9]\.)"
    r"(?:\\[dt]?frac\s*\{\s*(?P<over>[0-9]+)\s*\}\s*\{\s*(?P<under>[0-9]+)\s*\}"
    r"|(?P<digits>[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    r"(?:[eE](?P<e>[-+]?[0-9]+)|\s*(?:×|\*|\\times|\\cdot|x)\s*10\s*\^\s*\{?(?P<ten>[-−+]?[0-9]+)\}?"
    r"|\s*/\s*(?P<divisor>[0-9]+))?)"
)
_MINUS_BEFORE = re.compile(r"(?<![A-Za-z0-9_)\]}-])(?:[-−–](?:\\?[$€£¥])?|\\?[$€£¥][-−–])\Z")
"""A sign directly before a number and not behind an operand, so not the minus of ``10-5``."""


def answer_extractor(answer_format: str) -> Callable[[str], str | None]:
    r"""The function that finds the answer in a response, after its thinking; None if there is none or it is empty.

    "boxed": the last complete ``\boxed{...}``; boxes joined by "and", "or" or a comma are one answer. "answer_tag": the
    last complete ``<answer>...</answer>``. "last_number": ``last_number``. Anything else is a regular expression with
    one group; its last match that is not empty counts, and it may take any time.
    """
    if answer_format == "boxed":
        from forkrl.rewards.math.response import boxed_answer  # imported here: only this format needs the package

        find: Callable[[str], str | None] = boxed_answer
    elif answer_format in _FINDERS:
        find = _FINDERS[answer_format]
    else:
        pattern = re.compile(answer_format)

        def find(reply: str) -> str | None:
            return _last(match[1] for match in pattern.finditer(reply) if match[1])

    def extract(response: str) -> str | None:
        return (find(reply_of(response)) or "").strip() or None

    return extract


def last_number(text: str) -> str | None:
    r"""The last number in plain ASCII: "1234.50" for ``$1,234.50``, "-3/4" for ``−3 / 4``, "2e-5" for ``2 × 10^{-5}``.

    Commas group thousands only: ``3,14`` is two numbers. A minus counts directly before the number or its currency.
    """
    found = _last(_NUMBER.finditer(text))
    if found is None:
        return None
    if found["over"]:
        number = f"{found['over']}/{found['under']}"
    else:
        number = re.sub(r"[{},]", "", found["digits"])
        number = f"0{number}" if number.startswith(".") else number
        exponent = found["e"] or found["ten"]
        number += f"e{exponent.replace('−', '-').lstrip('+')}" if exponent else ""
        number += f"/{found['divisor']}" if found["divisor"] else ""
    before = text[max(0, found.start() - 4) : found.start()]
    return f"-{number}" if _MINUS_BEFORE.search(before) else number


def _last(items: Iterable[T]) -> T | None:
    return next(iter(deque(items, maxlen=1)), None)


def _last_tagged(reply: str) -> str | None:
    start = reply.rfind(_TAG, 0, max(reply.rfind(_END_TAG), 0))
    return None if start < 0 else reply[start + len(_TAG) : reply.index(_END_TAG, start)]


_FINDERS: dict[str, Callable[[str], str | None]] = {"answer_tag": _last_tagged, "last_number": last_number}
