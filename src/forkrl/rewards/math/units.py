r"""Units behind (or, for money, before) an answer: split off, converted, and told apart where both answers name one."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from forkrl.rewards.math.unit_names import CURRENCY_SIGNS, GENERIC, LOOKS_LIKE_UNIT, find_unit


class Unit(NamedTuple):
    """What is measured ("" without a unit, "?" in one that is not known), and in multiples of what."""

    measures: str = ""
    factor: Fraction = Fraction(1)


NO_UNIT = Unit()
_UNKNOWN = Unit("?")
_ANGLE, _TEMPERATURES = Unit("angle^1"), ("celsius^1", "fahrenheit^1")

_POWER = r"\^\s*(?:\{\s*-?\d\s*\}|-?\d)"
_IN_TEXT = re.compile(
    rf"^(.*?[\d\w)}}!|])\s*((?:\^\\circ\s*)?\\text\{{[^{{}}]*\}}"
    rf"(?:\s|\\text\{{[^{{}}]*\}}|\\cdot(?![a-zA-Z])|/|{_POWER}|(?<=/)\s*\(?[a-zA-Z]+\)?|[()])*)$",
    re.DOTALL,
)
_ONE_TEXT = rf"(\s*\\text\{{[^{{}}]*\}}(?:{_POWER})?)\s*"
_UNIT_FRACTION = re.compile(r"(?<=[\d\s})])\\frac\{" + _ONE_TEXT + r"\}\{" + _ONE_TEXT + r"\}$")
_NUMBER = r"-?(?:\d[\d,.]*(?:\s*/\s*\d+|:\d\d)?|-?\\frac\{\d+\}\{\d+\})"
_TIMES_TEN = r"(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*(?:\{-?\d+\}|\d)|[eE][+-]?\d+)"
_BARE = re.compile(
    rf"^({_NUMBER}{_TIMES_TEN}?(?:\s*\\(?:pi(?![a-zA-Z])|sqrt\{{\d+\}}))?)(\s*)"
    rf"((?:[a-zA-Z]|[^\x00-\x7f])(?:[a-zA-Z. /()]|[^\x00-\x7f]|\\cdot(?![a-zA-Z])|(?<=[a-zA-Z)]){_POWER})*)$"
)
_CLOSE_TO_NUMBER = {"cm", "mm", "km", "kg", "ml", "mL", "ft", "min", "sec", "hr", "mph", "kph", "kWh", "Hz", "kHz"}
"""Read as a unit behind a number without a space: 5cm, but 2mg may be twice the weight mg."""
_WORD = re.compile(r"[a-zA-Z]{4}|[^\x00-\x7f]")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREE = re.compile(r"\s*\^\\circ\s*([CF](?![a-zA-Z]))?$")
_MONEY = re.compile(
    r"^(-?)\s*((?:US)?\\\$|[$€£¥₹]|(?:\\text\{\s*)?(?:USD|EUR|GBP|INR|JPY|CNY|RMB|Rs\.?)(?:\s*\})?)\s*(?=[-\d.\\(])"
)
_NO_LETTERS = re.compile(r"\\text|[^a-zA-Z]")
_NO_UNIT_WORDS = re.compile(
    r"\b(?:or|and|nor|not|but|is|wrong|incorrect|than|plus|minus|maybe|perhaps|possibly|remainder"
    r"|January|February|March|April|May|June|July|August|September|October|November|December)\b"
    r"|^\s*\\text\{\s*(?:squared|cubed)",
    re.IGNORECASE,
)
"""In no unit, but in ``5 or six``: a second answer, not a measure of the first."""

_DETAIL = re.compile(
    r"(?<=\w) (?:of|long|wide|high|tall|deep|away|apart|later|ago|old|total|altogether|each|from|to|on|more|less|at"
    r"|in(?= [a-z]))\b.*"
)
_FILLER = {"", "total", "in total", "in all", "altogether", "approximately", "approx", "about", "exactly", "answer"}
_TOKEN = re.compile(rf"\s*(?:(/)|([()])|\\cdot(?![a-zA-Z])|([^\W\d_]+|[°$¢€£¥₹])\s*({_POWER})?|-(?=[a-z]))")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b(?:US|U\.S\.)\s+(?=dollar)", ""),
        (r"\bper\b|\ban?\b(?= (?:second|minute|hour|day|week|month|year))", "/"),
        (r"\b(?:square|sq)\.? ([a-z]+)|\b([a-z]+) squared\b", r"\1\2^2"),
        (r"\b(?:cubic|cu)\.? ([a-z]+)|\b([a-z]+) cubed\b", r"\1\2^3"),
        (r"(?:\^\\circ|\bdegrees?)\s*(?:C|[Cc]elsius)\b", "celsius"),
        (r"(?:\^\\circ|\bdegrees?)\s*(?:F|[Ff]ahrenheit)\b", "fahrenheit"),
        (r"\\(?:Omega|mu)\b", lambda name: "Ω" if name[0] == r"\Omega" else "µ"),
    )
]


def split_unit(text: str, *, lenient: bool = False) -> tuple[str, Unit]:
    """The answer without its unit, and the unit.

    Args:
        text: in the notation of ``plain_notation``.
        lenient: letters behind a number are a unit wherever they can be one: ``5m`` are five metres.
    """
    if text.isdecimal():
        return text, NO_UNIT
    text = _UNIT_FRACTION.sub(r"\1/(\2)", text)
    if match := _MONEY.match(text):
        rest, unit = split_unit(match[1] + text[match.end() :])
        return rest, unit if unit.measures not in ("", "?") else _unit(
            CURRENCY_SIGNS.get(match[2][-1]) or _NO_LETTERS.sub("", match[2])
        )
    match = _DEGREE.search(text)
    if match and not TRIGONOMETRY.search(text):
        return _DEGREE.sub("", text), _unit({"C": "celsius", "F": "fahrenheit"}.get(match[1], "degree"))
    match = _IN_TEXT.match(text)
    if match and not _NO_UNIT_WORDS.search(match[2]):
        return match[1].strip(), _unit(match[2])
    match = _BARE.match(text)
    if match and not _NO_UNIT_WORDS.search(match[3]) and _is_bare_unit(match[2], match[3], lenient):
        return match[1].strip(), _unit(match[3])
    return text, NO_UNIT


def scale_between(gold: Unit, found: Unit) -> Fraction | None:
    """What the found number is multiplied with before it is compared; None where the units measure different things.

    A unit may be left out on either side. Words that are no known unit (apples, people) are all alike.
    """
    if not gold.measures or not found.measures:
        return Fraction(1)
    if gold.measures != found.measures:
        is_temperature = found == _ANGLE and gold.measures in _TEMPERATURES  # 25° for 25°C
        return Fraction(1) if is_temperature else None
    return found.factor / gold.factor


def _is_bare_unit(space: str, words: str, lenient: bool) -> bool:
    """2xy is no number of things, and 3m/s may be a formula."""
    unit = _unit(words)
    if unit == _UNKNOWN:
        return bool((space and _WORD.search(words)) or not words[0].isascii())
    if lenient or not words[0].isascii():
        return True
    first = LOOKS_LIKE_UNIT.match(words)
    if first and len(first[0]) > 1:
        return bool(space) or first[0] in _CLOSE_TO_NUMBER or len(first[0]) > 3
    return "/" in words and (bool(space) or words.startswith("m/s"))


def _unit(words: str) -> Unit:
    words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", words)
    for pattern, replacement in _REWRITES:
        words = pattern.sub(replacement, words)
    words = _DETAIL.sub("", " ".join(words.replace(".", "").split()))
    words = re.sub(r"^\((.*)\)$", r"\1", words).strip()
    if words.casefold() in _FILLER:
        return NO_UNIT
    return _product(words.replace("a m", "am").replace("p m", "pm") if len(words) == 3 else words) or _UNKNOWN


def _product(words: str) -> Unit | None:
    """A product of units with powers, such as ``kg m^2/s^2``; None where a factor is not known."""
    factor, powers = Fraction(1), Counter[str]()
    signs = [1]
    sign_of_next = 1
    place, known = 0, 0
    while place < len(words.rstrip()):
        match = _TOKEN.match(words, place)
        if not match:
            return None
        place = match.end()
        slash, bracket, name, power_text = match.groups()
        if slash:
            sign_of_next = -1
        elif bracket == "(":
            signs.append(signs[-1] * sign_of_next)
            sign_of_next = 1
        elif bracket == ")":
            if len(signs) > 1:
                signs.pop()
        elif name:
            power = signs[-1] * sign_of_next * int(re.sub(r"[^-\d]", "", power_text or "1"))
            sign_of_next = 1
            known += 1
            if name.casefold().removesuffix("s") in GENERIC:
                continue
            found = find_unit(name)
            if found is None:
                return None
            scale, bases = found
            factor *= scale**power
            for base, exponent in bases.items():
                powers[base] += exponent * power
    measures = " ".join(f"{base}^{exponent}" for base, exponent in sorted(powers.items()) if exponent)
    return Unit(measures, factor if measures else Fraction(1)) if known else None
