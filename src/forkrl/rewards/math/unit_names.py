"""Names and symbols of units, each in base units. Currencies and scales of temperature are not converted."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

Bases = dict[str, int]
GENERIC = {"unit", "thing", "单位"}
"""Words that say that there is a unit, not which."""
CURRENCY_SIGNS = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
LOOKS_LIKE_UNIT = re.compile(r"[a-zA-Z]+")

_FORCE = {"kg": 1, "m": 1, "s": -2}
_ENERGY = {"kg": 1, "m": 2, "s": -2}
_POWER = {"kg": 1, "m": 2, "s": -3}
_PRESSURE = {"kg": 1, "m": -1, "s": -2}
_VOLTAGE = {"kg": 1, "m": 2, "s": -3, "A": -1}
_LENGTH, _MASS, _TIME, _AREA, _VOLUME, _SPEED = {"m": 1}, {"kg": 1}, {"s": 1}, {"m": 2}, {"m": 3}, {"m": 1, "s": -1}

# Symbol and names without prefix; they take the prefixes of SI.
_WITH_PREFIX: list[tuple[str, str, str, Bases]] = [
    ("m", "meter metre", "1", _LENGTH),
    ("g", "gram gramme", "1/1000", _MASS),
    ("s", "second sec", "1", _TIME),
    ("L l", "liter litre", "1/1000", _VOLUME),
    ("N", "newton", "1", _FORCE),
    ("J", "joule", "1", _ENERGY),
    ("W", "watt", "1", _POWER),
    ("Pa", "pascal", "1", _PRESSURE),
    ("V", "volt", "1", _VOLTAGE),
    ("A", "ampere amp", "1", {"A": 1}),
    ("Ω Ohm ohm", "ohm", "1", {"kg": 1, "m": 2, "s": -3, "A": -2}),
    ("C", "coulomb", "1", {"A": 1, "s": 1}),
    ("F", "farad", "1", {"kg": -1, "m": -2, "s": 4, "A": 2}),
    ("T", "tesla", "1", {"kg": 1, "s": -2, "A": -1}),
    ("Hz", "hertz", "1", {"s": -1}),
    ("mol", "mole", "1", {"mol": 1}),
    ("K", "kelvin", "1", {"K": 1}),
    ("eV", "electronvolt", "1602176634/10000000000000000000000000000", _ENERGY),
    ("cal", "calorie", "4184/1000", _ENERGY),
    ("Wh", "watthour", "3600", _ENERGY),
    ("bar", "bar", "100000", _PRESSURE),
    ("pc", "parsec", "30856775814913673", _LENGTH),
    ("B", "byte", "1", {"byte": 1}),
    ("bit", "bit", "1/8", {"byte": 1}),
]
_PREFIXES = {
    "f": ("femto", -15), "p": ("pico", -12), "n": ("nano", -9), "µ": ("micro", -6), "m": ("milli", -3),
    "c": ("centi", -2), "d": ("deci", -1), "k": ("kilo", 3), "M": ("mega", 6), "G": ("giga", 9), "T": ("tera", 12),
}  # fmt: skip
_OTHERS: list[tuple[str, str, Bases]] = [
    ("min minute mins 分钟 分", "60", _TIME),
    ("h hr hour hrs 小时", "3600", _TIME),
    ("秒", "1", _TIME),
    ("d day 天 日", "86400", _TIME),
    ("week wk 周", "604800", _TIME),
    ("month mo 月", "1", {"month": 1}),
    ("year yr y 年 岁", "12", {"month": 1}),
    ("in inch inche", "127/5000", _LENGTH),
    ("ft foot feet", "381/1250", _LENGTH),
    ("yd yard", "1143/1250", _LENGTH),
    ("mi mile", "201168/125", _LENGTH),
    ("ly lightyear", "9460730472580800", _LENGTH),
    ("AU au", "149597870700", _LENGTH),
    ("Å angstrom", "1/10000000000", _LENGTH),
    ("micron", "1/1000000", _LENGTH),
    ("米", "1", _LENGTH),
    ("厘米", "1/100", _LENGTH),
    ("毫米", "1/1000", _LENGTH),
    ("千米 公里", "1000", _LENGTH),
    ("kmh kph kmph", "5/18", _SPEED),
    ("mph", "1397/3125", _SPEED),
    ("knot", "463/900", _SPEED),
    ("acre", "316160658/78125", _AREA),
    ("ha hectare", "10000", _AREA),
    ("平方米", "1", _AREA),
    ("平方厘米", "1/10000", _AREA),
    ("立方米", "1", _VOLUME),
    ("立方厘米", "1/1000000", _VOLUME),
    ("cc", "1/1000000", _VOLUME),
    ("gal gallon", "473176473/125000000000", _VOLUME),
    ("qt quart", "473176473/500000000000", _VOLUME),
    ("pint", "473176473/1000000000000", _VOLUME),
    ("cup", "473176473/2000000000000", _VOLUME),
    ("升", "1/1000", _VOLUME),
    ("毫升", "1/1000000", _VOLUME),
    ("lb pound", "45359237/100000000", _MASS),
    ("oz ounce", "45359237/1600000000", _MASS),
    ("ton", "45359237/50000", _MASS),
    ("tonne t 吨", "1000", _MASS),
    ("克", "1/1000", _MASS),
    ("千克 公斤", "1", _MASS),
    ("atm atmosphere", "101325", _PRESSURE),
    ("torr mmHg", "101325/760", _PRESSURE),
    ("psi", "6894757/1000", _PRESSURE),
    ("hp horsepower", "7457/10", _POWER),
    ("rpm", "1/60", {"turn": 1, "s": -1}),
    ("rev revolution rotation turn", "1", {"turn": 1}),
    ("dollar usd $ buck", "1", {"dollar": 1}),
    ("cent ¢ penny pennie pence", "1/100", {"dollar": 1}),
    ("euro eur €", "1", {"euro": 1}),
    ("sterling gbp £", "1", {"sterling": 1}),
    ("yen jpy ¥ 円", "1", {"yen": 1}),
    ("yuan rmb cny 元", "1", {"yuan": 1}),
    ("rupee inr rs ₹", "1", {"rupee": 1}),
    ("degree deg ° 度", "1", {"angle": 1}),
    ("radian rad", "1", {"radian": 1}),
    ("celsius", "1", {"celsius": 1}),
    ("fahrenheit", "1", {"fahrenheit": 1}),
    ("am", "1", {"morning": 1}),
    ("pm", "1", {"afternoon": 1}),
]


def _tables() -> tuple[dict[str, tuple[Fraction, Bases]], dict[str, tuple[Fraction, Bases]]]:
    """Symbols, whose case counts, and names, in lower case."""
    symbols: dict[str, tuple[Fraction, Bases]] = {}
    names: dict[str, tuple[Fraction, Bases]] = {}
    for signs, words, factor, bases in _WITH_PREFIX:
        for sign in signs.split():
            symbols[sign] = Fraction(factor), bases
            symbols |= {
                prefix + sign: (Fraction(factor) * Fraction(10) ** power, bases)
                for prefix, (_, power) in _PREFIXES.items()
            }
        for word in words.split():
            names[word] = Fraction(factor), bases
            names |= {
                prefix + word: (Fraction(factor) * Fraction(10) ** power, bases) for prefix, power in _PREFIXES.values()
            }
    for all_names, factor, bases in _OTHERS:
        for name in all_names.split():
            target = symbols if len(name) <= 2 else names
            target[name if target is symbols else name.casefold()] = Fraction(factor), bases
    return symbols, names


_SYMBOLS, _NAMES = _tables()
_IN_LOWER_CASE = {name.casefold(): unit for name, unit in reversed(_SYMBOLS.items()) if len(name) > 1}


@lru_cache(maxsize=1024)
def find_unit(name: str) -> tuple[Fraction, Bases] | None:
    """One unit's factor and base units by symbol or name, singular or plural; None where it is not known."""
    name = name.replace("μ", "µ")
    if found := _SYMBOLS.get(name):
        return found
    lower = name.casefold()
    for form in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if found := _NAMES.get(form) or _IN_LOWER_CASE.get(form):
            return found
    return None
