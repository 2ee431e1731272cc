r"""Converts words in ``plain_notation`` to symbols: 3 million, 2 hours 15 minutes, 1011 in base 2, x \ne 3."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from forkrl.rewards.math.numbers import number_word, read_number
from forkrl.rewards.math.units import find_unit, flat_text

_CANDIDATE = re.compile(r"\\(?:text|in|ne|ge|mathbb|setminus|forall)(?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z]{2}|'|[万亿]")
_NUMBER = r"\d[\d,]*(?:\.\d+)?"

_MAGNITUDES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "万": 10**4, "亿": 10**8,
}  # fmt: skip
_MAGNITUDE = re.compile(rf"^(-?\s*(?:\\\$\s*)?)({_NUMBER})\s*(\\text\{{\s*)?({'|'.join(_MAGNITUDES)})(?![a-zA-Z])")

_FEET_AND_INCHES = re.compile(r"(\d+)\s*'\s*(\d+)\s*(?:''|\")")
_MEASURE = re.compile(rf"\s*(?:and\s+)?({_NUMBER})\s*([a-zA-Z]+)\.?\s*")

_IN_BASE = re.compile(
    r"\(?\s*([0-9A-F]+)\s*\)?\s*(?:_\s*[{(\s]*(?:base[\s-]*)?|[({\s]*(?:in\s+)?base[\s-]*)(\d+|[a-z]+)\s*[)}\s]*"
)
_RATIO = re.compile(r"(\d+)\s+to\s+(\d+)")

_REALS = r"\\mathbb\s*(?:\{\s*R\s*\}|R)"
_SET = r"\\mathbb\s*(?:\{\s*[RZNQC]\s*\}|[RZNQC])(?:\s*[\^_]\s*(?:\{[^{}]*\}|\\?[\w+*]+))?"
_KIND = (
    r"(?:all|any|every|each|some|an?|arbitrary|positive|non-?negative|non-?zero|reals?|integers?|naturals?|constants?"
    r"|complex|rationals?|numbers?|values?|of)"
)
_DOMAINS = [
    re.compile(rf"(?P<main>.*?\S)[\s,({{]*{domain}[\s)}}.]*")
    for domain in (
        rf"(?:,|\(|\\forall|\b(?:for|where|with)(?:\s+(?:all|any|every|each|some))?)\s*(?P<name>[a-zA-Z])\s*\\in\s*{_SET}",
        rf"(?:(?<=[\s,])(?:for|where|with)|\\forall)\s+(?:{_KIND}\s+)*(?P<name>[a-zA-Z])(?:\s*\\in\s*{_SET})?",
        r"(?:,|\(|\b(?:for|where|with))\s*(?P<name>[jkmn])\s*\\ge\s*[01]",
        rf"(?:(?<=[\s,])(?:for|where|with)|,|\()\s*(?P<name>[a-zA-Z])\s+(?:is|are)(?:\s+{_KIND})+",
    )
]

SET_OF_ALL = re.compile(rf"\\\{{\s*[a-zA-Z]\s*(?:\\in\s*{_REALS}\s*)?(?::|\||\\mid(?![a-zA-Z]))(.*)\\\}}")
_WITHOUT = re.compile(
    rf"(?:[a-zA-Z]\s*\\in\s*)?(?:{_REALS}|\(\s*-\\infty\s*,\s*\+?\\infty\s*\))\s*(?:\\setminus|\\backslash|-|\\)\s*\\\{{(.*)\\\}}"
    r"|(?:[a-zA-Z]\s+is\s+)?(?:the\s+set\s+of\s+)?(?:all|any)\s+reals?(?:\s+numbers?)?(?:\s+[a-zA-Z])?"
    r"\s+(?:except|other than|excluding)(?:\s+for)?\s+(.*)"
    r"|(?=[a-zA-Z]\s*\\ne(?![a-zA-Z]))(.*)"
)
_NOT_EQUAL = re.compile(r"^[a-zA-Z]\s*(?:\\ne(?![a-zA-Z])|=)\s*")
_BETWEEN_POINTS = re.compile(r"\s*[,;]\s*(?:and(?![a-zA-Z]))?\s*|\s*(?<![a-zA-Z])and(?![a-zA-Z])\s*")

_NO_SOLUTION = re.compile(
    r"(?:there\s+(?:is|are|exists?)\s+)?no\s+(?:real\s+|integer\s+|valid\s+)?solutions?(?:\s+exists?)?\.?",
    re.IGNORECASE,
)


def with_phrases_read(text: str) -> str:
    if not _CANDIDATE.search(text):
        return text
    text = _FEET_AND_INCHES.sub(r"\1 feet \2 inches", text)
    text = _MAGNITUDE.sub(_multiplied, text)
    flat = flat_text(text)
    for rule in (_measures_added, _base, _without_points):
        if (read := rule(flat)) is not None:
            return read
    if ratio := _RATIO.fullmatch(flat):
        return f"{ratio[1]}:{ratio[2]}"
    return r"\emptyset" if _NO_SOLUTION.fullmatch(flat) else _without_domain(text, flat)


def _multiplied(match: re.Match[str]) -> str:
    before, number, opening, word = match.groups()
    product = Fraction(number.replace(",", "")) * _MAGNITUDES[word]
    digits = str(product) if product.denominator == 1 else rf"\frac{{{product.numerator}}}{{{product.denominator}}}"
    return before + digits + (r" \text{" if opening else " ")


def _measures_added(flat: str) -> str | None:
    """``2 hours and 15 minutes`` in its first unit; each later unit must be smaller and less than one earlier unit."""
    measures: list[tuple[Fraction, Fraction, dict[str, int], str]] = []
    place = 0
    while place < len(flat):
        match = _MEASURE.match(flat, place)
        unit = find_unit(match[2]) if match else None
        if not match or not unit:
            return None
        measures.append((Fraction(match[1].replace(",", "")) * unit[0], *unit, match[2]))
        place = match.end()
    for (_, size, bases, _), (amount, smaller_size, same_bases, _) in pairwise(measures):
        if bases != same_bases or amount >= size or smaller_size >= size:
            return None
    if len(measures) < 2:
        return None
    total = sum((amount for amount, *_ in measures), Fraction(0)) / measures[0][1]
    return rf"\frac{{{total.numerator}}}{{{total.denominator}}} \text{{{measures[0][3]}}}"


def _base(flat: str) -> str | None:
    match = _IN_BASE.fullmatch(flat)
    if not match:
        return None
    number = number_word(match[2])
    base = str(number.value) if number else match[2]
    return f"{match[1]}_{{{base}}}" if base.isdecimal() else None


def _without_points(flat: str) -> str | None:
    r"""``\mathbb{R}\setminus\{3\}`` and ``x \ne 3`` as ``(-\infty,3)\cup(3,\infty)``."""
    if described := SET_OF_ALL.fullmatch(flat):
        flat = described[1].strip()
    match = _WITHOUT.fullmatch(flat)
    if not match:
        return None
    points = [_NOT_EQUAL.sub("", point.strip()) for point in _BETWEEN_POINTS.split(match[match.lastindex or 0])]
    values = {number.value: point for point in points if (number := read_number(point))}
    if not values or len(values) < len(points):
        return None
    ends = [r"-\infty", *(values[value] for value in sorted(values)), r"\infty"]
    return r"\cup ".join(f"({left},{right})" for left, right in pairwise(ends))


def _without_domain(text: str, flat: str) -> str:
    r"""Remove the domain of a variable: ``3k`` for ``3k, k \in \mathbb{Z}``."""
    for domain in _DOMAINS:
        match = domain.fullmatch(flat)
        if match and re.search(rf"(?<![\\a-zA-Z]){match['name']}(?![a-zA-Z])", match["main"]):
            return match["main"]
    return text
