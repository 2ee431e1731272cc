"""Splits off units of answers and converts them, except currencies and temperature scales."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

Bases = dict[str, int]
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_GENERIC = {"unit", "thing", "单位"}
"""Words that mark a unit without naming one."""
_CURRENCY_SIGNS = "$€£¥₹"
_LETTERS = re.compile(r"[a-zA-Z]+")
_PREFIXES = {
    "f": ("femto", -15), "p": ("pico", -12), "n": ("nano", -9), "µ": ("micro", -6), "m": ("milli", -3),
    "c": ("centi", -2), "d": ("deci", -1), "k": ("kilo", 3), "M": ("mega", 6), "G": ("giga", 9), "T": ("tera", 12),
}  # fmt: skip
# Units that take SI prefixes: symbols, names, factor, base units with their powers.
_WITH_PREFIX = """
m: meter metre: 1: m; g: gram gramme: 1/1000: kg; s: second sec: 1: s; L l: liter litre: 1/1000: m3;
N: newton: 1: kg m s-2; J: joule: 1: kg m2 s-2; W: watt: 1: kg m2 s-3; Pa: pascal: 1: kg m-1 s-2;
V: volt: 1: kg m2 s-3 A-1; A: ampere amp: 1: A; Ω Ohm ohm: ohm: 1: kg m2 s-3 A-2; C: coulomb: 1: A s;
F: farad: 1: kg-1 m-2 s4 A2; T: tesla: 1: kg s-2 A-1; Hz: hertz: 1: s-1; mol: mole: 1: mol; K: kelvin: 1: K;
eV: electronvolt: 1602176634/10000000000000000000000000000: kg m2 s-2; cal: calorie: 4184/1000: kg m2 s-2;
Wh: watthour: 3600: kg m2 s-2; bar: bar: 100000: kg m-1 s-2; pc: parsec: 30856775814913673: m; B: byte: 1: byte;
bit: bit: 1/8: byte
"""
# Other units, by base units: symbols (up to two characters) and names, factor.
_OTHERS = """
s: min minute mins 分钟 分 = 60; h hr hour hrs 小时 = 3600; 秒 = 1; d day 天 日 = 86400; week wk 周 = 604800
month: month mo 月 = 1; year yr y 年 岁 = 12
m: in inch inche = 127/5000; ft foot feet = 381/1250; yd yard = 1143/1250; mi mile = 201168/125
m: ly lightyear = 9460730472580800; AU au = 149597870700; Å angstrom = 1/10000000000; micron = 1/1000000; 米 = 1
m: 厘米 = 1/100; 毫米 = 1/1000; 千米 公里 = 1000
m s-1: kmh kph kmph = 5/18; mph = 1397/3125; knot = 463/900
m2: acre = 316160658/78125; ha hectare = 10000; 平方米 = 1; 平方厘米 = 1/10000
m3: 立方米 = 1; 立方厘米 = 1/1000000; cc = 1/1000000; gal gallon = 473176473/125000000000
m3: qt quart = 473176473/500000000000; pint = 473176473/1000000000000; cup = 473176473/2000000000000; 升 = 1/1000
m3: 毫升 = 1/1000000
kg: lb pound = 45359237/100000000; oz ounce = 45359237/1600000000; ton = 45359237/50000; tonne t 吨 = 1000
kg: 克 = 1/1000; 千克 公斤 = 1
kg m-1 s-2: atm atmosphere = 101325; torr mmHg = 101325/760; psi = 6894757/1000
kg m2 s-3: hp horsepower = 7457/10
turn s-1: rpm = 1/60
turn: rev revolution rotation turn = 1
dollar: dollar usd $ buck = 1; cent ¢ penny pennie pence = 1/100
euro: euro eur € = 1
sterling: sterling gbp £ = 1
yen: yen jpy ¥ 円 = 1
yuan: yuan rmb cny 元 = 1
rupee: rupee inr rs ₹ = 1
angle: degree deg ° 度 = 1
radian: radian rad = 1
celsius: celsius = 1
fahrenheit: fahrenheit = 1
morning: am = 1
afternoon: pm = 1
"""


def _bases(text: str) -> Bases:
    return {base: int(power or 1) for base, power in re.findall(r"([a-zA-Z]+)(-?\d*)", text)}


def _tables() -> tuple[dict[str, tuple[Fraction, Bases]], dict[str, tuple[Fraction, Bases]]]:
    """Case-sensitive symbols, and lower-case names."""
    symbols: dict[str, tuple[Fraction, Bases]] = {}
    names: dict[str, tuple[Fraction, Bases]] = {}
    for entry in _WITH_PREFIX.split(";"):
        signs, words, factor, bases = (part.strip() for part in entry.split(":"))
        for sign, prefix, power in (("", "", 0), *((sign, *rest) for sign, rest in _PREFIXES.items())):
            unit = Fraction(factor) * Fraction(10) ** power, _bases(bases)
            symbols |= {sign + symbol: unit for symbol in signs.split()}
            names |= {prefix + word: unit for word in words.split()}
    for line in _OTHERS.strip().splitlines():
        bases, _, entries = line.partition(":")
        for entry in entries.split(";"):
            forms, _, factor = entry.partition("=")
            unit = Fraction(factor), _bases(bases)
            for form in forms.split():
                if len(form) <= 2:
                    symbols[form] = unit
                else:
                    names[form.casefold()] = unit
    return symbols, names


_SYMBOLS, _NAMES = _tables()
_IN_LOWER_CASE = {name.casefold(): unit for name, unit in reversed(_SYMBOLS.items()) if len(name) > 1}


@lru_cache(maxsize=1024)
def find_unit(name: str) -> tuple[Fraction, Bases] | None:
    """Factor and base units of one unit by symbol or name, singular or plural; None if unknown."""
    name = name.replace("μ", "µ")
    if found := _SYMBOLS.get(name):
        return found
    lower = name.casefold()
    for form in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if found := _NAMES.get(form) or _IN_LOWER_CASE.get(form):
            return found
    return None


class Unit(NamedTuple):
    """``measures``: the base units ("" without a unit, "?" if unknown); ``factor``: the size in base units."""

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
"""Units accepted after a number without a space: 5cm. Not 2mg, which may be 2·m·g."""
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
"""Words that no unit contains; in ``5 or six`` they start a second answer."""

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


def flat_text(text: str) -> str:
    return " ".join(_TEXT.sub(r" \1 ", text).split())


def split_unit(text: str, *, lenient: bool = False) -> tuple[str, Unit]:
    """Split ``plain_notation`` into answer and unit; ``lenient`` accepts ambiguous letters: ``5m`` is five metres."""
    if text.isdecimal():
        return text, NO_UNIT
    text = _UNIT_FRACTION.sub(r"\1/(\2)", text)
    if match := _MONEY.match(text):
        rest, unit = split_unit(match[1] + text[match.end() :])
        currency = match[2][-1] if match[2][-1] in _CURRENCY_SIGNS else _NO_LETTERS.sub("", match[2])
        return rest, _unit(currency) if unit.measures in ("", "?") else unit
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
    """Factor for the found number; None if dimensions differ. Units may be omitted; unknown units are all equal."""
    if not gold.measures or not found.measures:
        return Fraction(1)
    if gold.measures != found.measures:
        is_temperature = found == _ANGLE and gold.measures in _TEMPERATURES  # 25° may mean 25°C
        return Fraction(1) if is_temperature else None
    return found.factor / gold.factor


def _is_bare_unit(space: str, words: str, lenient: bool) -> bool:
    """2xy is not a number with a unit, and 3m/s may be a formula."""
    unit = _unit(words)
    if unit == _UNKNOWN:
        return bool((space and _WORD.search(words)) or not words[0].isascii())
    if lenient or not words[0].isascii():
        return True
    first = _LETTERS.match(words)
    if first and len(first[0]) > 1:
        return bool(space) or first[0] in _CLOSE_TO_NUMBER or len(first[0]) > 3
    return "/" in words and (bool(space) or words.startswith("m/s"))


def _unit(words: str) -> Unit:
    words = _TEXT.sub(r" \1 ", words)
    for pattern, replacement in _REWRITES:
        words = pattern.sub(replacement, words)
    words = _DETAIL.sub("", " ".join(words.replace(".", "").split()))
    words = re.sub(r"^\((.*)\)$", r"\1", words).strip()
    if words.casefold() in _FILLER:
        return NO_UNIT
    return _product(words.replace("a m", "am").replace("p m", "pm") if len(words) == 3 else words) or _UNKNOWN


def _product(words: str) -> Unit | None:
    """A product of units with powers, such as ``kg m^2/s^2``; None if a factor is unknown."""
    factor, powers = Fraction(1), Counter[str]()
    signs, sign = [1], 1  # the sign of each open bracket; of the next unit
    place, known = 0, False
    while place < len(words):
        match = _TOKEN.match(words, place)
        if not match:
            return None
        place = match.end()
        slash, bracket, name, power_text = match.groups()
        if slash:
            sign = -1
        elif bracket == "(":
            signs.append(signs[-1] * sign)
            sign = 1
        elif bracket and len(signs) > 1:
            signs.pop()
        elif name:
            power = signs[-1] * sign * int(re.sub(r"[^-\d]", "", power_text or "1"))
            sign, known = 1, True
            if name.casefold().removesuffix("s") in _GENERIC:
                continue
            found = find_unit(name)
            if found is None:
                return None
            factor *= found[0] ** power
            for base, exponent in found[1].items():
                powers[base] += exponent * power
    measures = " ".join(f"{base}^{exponent}" for base, exponent in sorted(powers.items()) if exponent)
    return Unit(measures, factor if measures else Fraction(1)) if known else None
