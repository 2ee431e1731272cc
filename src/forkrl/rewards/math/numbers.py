"""Exact plain numbers (integers, decimals, fractions, percentages, powers of ten): a fast path for most answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_POWER = r"10\s*\^\s*(?:\{\s*(?P<braced>[+-]?\d{1,3})\s*\}|(?P<bare>\d))"
_DECIMAL = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>{_DIGITS})?(?P<point>\.(?P<places>\d*)(?:\\overline\{{(?P<repeating>\d{{1,20}})\}})?)?)"
    rf"(?:[eE](?P<exponent>[+-]?\d{{1,3}})|\s*(?:\\times|\\cdot)\s*{_POWER})?"
)
_POWER_OF_TEN = re.compile(rf"(?P<sign>-?)\s*{_POWER}")
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>{_DIGITS})\s*)?"
    rf"\\frac\s*\{{\s*(?P<top>-?\s*{_DIGITS})\s*\}}\s*\{{\s*(?P<bottom>-?\s*{_DIGITS})\s*\}}"
)
_SLASH = re.compile(r"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+) +)?(?P<top>\d+)\.?\s*/\s*(?P<bottom>\d+)\.?")
_PERCENT = re.compile(r"\s*\\%$")
_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip
_TOLERANCE = Fraction(1, 2_000_000)


class Number(NamedTuple):
    """A number as written: its value without the percent sign, and whether it is a decimal fraction or a percentage."""

    value: Fraction
    is_decimal: bool = False
    is_percent: bool = False

    @property
    def amount(self) -> Fraction:
        """The value of a percentage: 25% is 1/4."""
        return self.value / 100 if self.is_percent else self.value

    def __str__(self) -> str:
        return f"{self.value}%" if self.is_percent else str(self.value)


def read_number(text: str) -> Number | None:
    """Parse a whole text in ``plain_notation`` as a number, or return None."""
    if text.isdecimal() and len(text) < 1000:
        return Number(Fraction(int(text)))
    unsigned = _PERCENT.sub("", text)
    for pattern, read in _NOTATIONS:
        if match := pattern.fullmatch(unsigned):
            value = read(match)
            if value is None:
                return None
            is_decimal = pattern is _DECIMAL and bool(match["point"]) and not match["repeating"]
            return Number(-value if match["sign"] == "-" else value, is_decimal, unsigned != text)
    return None


def number_word(word: str) -> Number | None:
    """English words from zero to twenty."""
    return Number(Fraction(_WORDS.index(word))) if word in _WORDS else None


def same_number(gold: Number, found: Number) -> bool:
    """Whether the numbers agree.

    Percentages match by amount (25% is 0.25), or by the number before the sign, which many golds omit (25% is 25). A
    gold below 1 without a sign is not read as a percentage: 0.5% is not 0.5.
    """
    is_decimal = gold.is_decimal or found.is_decimal
    if is_close(gold.amount, found.amount, is_decimal):
        return True
    sign_left_away = gold.is_percent != found.is_percent and (gold.is_percent or abs(gold.value) >= 1)
    return sign_left_away and is_close(gold.value, found.value, is_decimal)


def is_close(gold: Fraction, found: Fraction, is_decimal: bool) -> bool:
    """Equal; or, if one is a decimal fraction, equal to the sixth decimal (below 1: sixth significant digit)."""
    if gold == found or not is_decimal:
        return gold == found
    scale = max(abs(gold), abs(found))
    unit = Fraction(1, 10 ** (len(str(scale.denominator // scale.numerator)) - 1)) if scale < 1 else 1
    return abs(gold - found) <= _TOLERANCE * unit


def _decimal(match: re.Match[str]) -> Fraction | None:
    whole, places, repeating = match["whole"] or "", match["places"] or "", match["repeating"] or ""
    if not (whole or places or repeating):
        return None
    value = Fraction(int(_bare(whole) + places or "0"), 10 ** len(places))
    if repeating:
        value += Fraction(int(repeating), (10 ** len(repeating) - 1) * 10 ** len(places))
    return value * Fraction(10) ** int(match["exponent"] or match["braced"] or match["bare"] or 0)


def _fraction(match: re.Match[str]) -> Fraction | None:
    top, bottom = int(_bare(match["top"])), int(_bare(match["bottom"]))
    if bottom == 0:
        return None
    value = Fraction(top, bottom)
    if not match["whole"]:
        return value
    return value + int(_bare(match["whole"])) if 0 < value < 1 else None  # 2\frac{3}{2} is not a mixed number


def _power_of_ten(match: re.Match[str]) -> Fraction:
    return Fraction(10) ** int(match["braced"] or match["bare"])


def _bare(digits: str) -> str:
    return digits.replace(",", "").replace(" ", "")


_NOTATIONS: list[tuple[re.Pattern[str], Callable[[re.Match[str]], Fraction | None]]] = [
    (_DECIMAL, _decimal),
    (_FRACTION, _fraction),
    (_SLASH, _fraction),
    (_POWER_OF_TEN, _power_of_ten),
]
