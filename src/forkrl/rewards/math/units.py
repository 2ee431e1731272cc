r"""Units behind (or, for money, before) an answer: taken off, and told apart where both answers name one."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """What is measured ("" without a unit, "?" in one that we do not know), and in multiples of what."""

    measures: str = ""
    factor: Fraction = Fraction(1)


NO_UNIT = Unit()
_UNKNOWN = Unit("?")

_SCALES: dict[str, dict[str, str]] = {
    "length": {
        "1/1000": "mm millimeter millimetre", "1/100": "cm centimeter centimetre", "1": "m meter metre",
        "1000": "km kilometer kilometre", "127/5000": "in inch inche", "381/1250": "ft foot feet",
        "1143/1250": "yd yard", "201168/125": "mi mile",
    },
    "mass": {"1/1000000": "mg milligram", "1/1000": "g gram", "1": "kg kilogram"},
    "time": {"1": "s sec second", "60": "min minute", "3600": "h hr hour", "86400": "day", "604800": "week"},
    "money": {"1/100": "cent ¢", "1": "dollar usd"},
    "volume": {"1/1000": "ml milliliter millilitre", "1": "l liter litre"},
    "angle": {"1": "degree deg", "0": "radian rad"},
    "morning": {"1": "am"},
    "afternoon": {"1": "pm"},
}  # fmt: skip
_UNITS = {
    name: Unit(measures, Fraction(factor))
    for measures, scale in _SCALES.items()
    for factor, names in scale.items()
    for name in names.split()
}
_BEHIND_IN_TEXT = re.compile(
    r"^(.*[\d\w)}!|])\s*\\text\{\s*([^{}\d]*?)\s*\}\s*(?:\^\s*(?:\{\s*(-?\d)\s*\}|(\d)))?$", re.DOTALL
)
_BEHIND_A_NUMBER = re.compile(
    r"^(-?(?:\d[\d,.]*(?:\s*/\s*\d+|:\d\d)?|-?\\frac\{\d+\}\{\d+\}))\s*"
    r"([a-zA-Z]{2,}[a-zA-Z.]*(?: [a-zA-Z.]+)*|[ap]\.\s?m|°)\s*(?:\^\s*(?:\{\s*(-?\d)\s*\}|(\d)))?$"
)
_WORD_APART = re.compile(r"[\d}] [a-zA-Z .]*[a-zA-Z]{4}")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREE = re.compile(r"\s*\^\\circ$")
_MONEY = re.compile(r"^(-?)\s*(?:\\\$|[$€£¥₹])\s*(?=[-\d.\\(])")
_SQUARED = re.compile(r"^(square|cubic|sq|cu) ")
_NO_UNIT_WORDS = re.compile(r"\b(?:or|and|nor|not|but)\b", re.IGNORECASE)
"""In no unit, but in ``5 or six``: a second answer, not a measure of the first."""


def split_unit(text: str) -> tuple[str, Unit]:
    """The answer without its unit, and the unit."""
    if text.isdecimal():
        return text, NO_UNIT
    if match := _MONEY.match(text):
        rest, unit = split_unit(match[1] + text[match.end() :])
        return rest, unit if unit.measures else _UNITS["dollar"]
    if _DEGREE.search(text) and not TRIGONOMETRY.search(text):
        return _DEGREE.sub("", text), _UNITS["degree"]
    match = _BEHIND_IN_TEXT.match(text)
    if match and not _NO_UNIT_WORDS.search(match[2]):
        return match[1].strip(), _unit(match[2], match[3] or match[4])
    match = _BEHIND_A_NUMBER.match(text)
    if (
        match
        and not _NO_UNIT_WORDS.search(match[2])
        and (_unit(match[2], None) is not _UNKNOWN or _WORD_APART.search(text))
    ):  # 2xy is no number of things
        return match[1].strip(), _unit(match[2], match[3] or match[4])
    return text, NO_UNIT


def scale_between(gold: Unit, found: Unit) -> Fraction | None:
    """What the found number is to be multiplied with before it is compared; None where no factor makes them agree."""
    if not {"", "?"}.isdisjoint((gold.measures, found.measures)):
        return Fraction(1)
    if gold.measures != found.measures or not gold.factor or not found.factor:
        return Fraction(1) if gold == found else None
    return found.factor / gold.factor


def _unit(words: str, power: str | None) -> Unit:
    name = words.casefold().replace(".", "").strip()
    if name in ("a m", "p m"):
        name = name.replace(" ", "")
    if match := _SQUARED.match(name):
        power = "2" if match[1].startswith("sq") else "3"
        name = name[match.end() :]
    unit = _UNITS.get(name) or _UNITS.get(name.removesuffix("s")) or _UNKNOWN
    if unit is _UNKNOWN or power in (None, "1"):
        return unit
    return Unit(f"{unit.measures}^{power}", unit.factor ** int(power or 1))
