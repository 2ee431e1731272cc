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
_DIGITS = (
    r"(?:[0-9]{1,3}(?:(?:,(?:\\!)?|\{,\}|\\,|[\u00a0\u2009\u202f])[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    # Groups after plain spaces, one of which begins with 0: no list of numbers.
    r"|[0-9]{1,3}(?: [0-9]{3}){0,3} 0[0-9]{2}(?: [0-9]{3}){0,3}(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
)
_FRACTION = r"\\[dt]?frac\s*\{{\s*(?P<{0}>{2})\s*\}}\s*\{{\s*(?P<{1}>{2})\s*\}}".format
_START = r"(?<![A-Za-z0-9_^])(?<![0-9]\.)"
"""Not within a name (x2) or another number."""
_NUMBER = re.compile(
    # Exponents and subscripts are passed over.
    r"\^\s*+[-−+]?[0-9.]++|[\^_]\s*+\{(?:[^{}]++|\{[^{}]*+\})*+\}"
    rf"|{_START}(?P<whole>[0-9]{{1,9}})(?:(?: |\\[, ])?{_FRACTION('part', 'of', '[0-9]{1,9}')}"
    r"| (?P<above>[1-9][0-9]{0,8})/(?P<below>[0-9]{1,9})(?![0-9/]|[.,][0-9]))"
    rf"|{_FRACTION('over', 'under', f'[-−+]?{_DIGITS}')}"
    rf"|{_START}(?P<digits>{_DIGITS})"
    r"(?:[eE](?P<e>[-+]?[0-9]+)|\s*(?:×|\*|\\times|\\cdot|x)\s*10\s*\^\s*\{?(?P<ten>[-−+]?[0-9]+)\}?"
    r"|\s*/\s*(?P<divisor>[0-9]+))?"
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

    Commas group thousands only: ``3,14`` is two numbers. A minus counts directly before the number or its currency. A
    mixed number is one fraction: "5/2" for ``2\frac{1}{2}`` and ``2 1/2``. Exponents and subscripts are no numbers.
    """
    found = _last(match for match in _NUMBER.finditer(text) if match["whole"] or match["over"] or match["digits"])
    if found is None:
        return None
    sign = "-" if _MINUS_BEFORE.search(text[max(0, found.start() - 4) : found.start()]) else ""
    if found["whole"]:
        above, below = int(found["part"] or found["above"]), int(found["of"] or found["below"])
        # Not a mixed number if the fraction is 1 or more.
        return f"{sign}{int(found['whole']) * below + above}/{below}" if above < below else f"{above}/{below}"
    if found["over"]:
        negative = sum(part.startswith(("-", "−")) for part in (sign, found["over"], found["under"])) % 2
        return f"{'-' * negative}{_plain(found['over'])}/{_plain(found['under'])}"
    number = _plain(found["digits"])
    exponent = found["e"] or found["ten"]
    number += f"e{exponent.replace('−', '-').lstrip('+')}" if exponent else ""
    return f"{sign}{number}" + (f"/{found['divisor']}" if found["divisor"] else "")


def _plain(digits: str) -> str:
    number = re.sub(r"[^0-9.]", "", digits)
    return f"0{number}" if number.startswith(".") else number


def _last(items: Iterable[T]) -> T | None:
    return next(iter(deque(items, maxlen=1)), None)


def last_tagged(reply: str) -> str | None:
    """The text in the last complete ``<answer>...</answer>``; None without one."""
    start = reply.rfind(_TAG, 0, max(reply.rfind(_END_TAG), 0))
    return None if start < 0 else reply[start + len(_TAG) : reply.index(_END_TAG, start)]


_FINDERS: dict[str, Callable[[str], str | None]] = {"answer_tag": last_tagged, "last_number": last_number}
