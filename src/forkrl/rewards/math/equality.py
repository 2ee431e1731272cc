"""Compares a found answer with the gold answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from forkrl.rewards.math.answer import FLIPPED, LETTER, Answer, is_name, plain_words, read_measure, tells_a_value
from forkrl.rewards.math.formula import (
    Formula,
    difference,
    entries_of_vector,
    is_multiple,
    is_rounded,
    names_of,
    read_formula,
    same_formula,
    scaled,
)
from forkrl.rewards.math.numbers import Number, same_number
from forkrl.rewards.math.units import scale_between

_CONJUNCTION = re.compile(r"(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")
_FUNCTION = re.compile(r"([a-zA-Z])\s*\(\s*([a-zA-Z])\s*\)")
_OR = re.compile(r"(?<![a-zA-Z])or(?![a-zA-Z])")
_INDEXED = re.compile(r"([a-zA-Z])\s*_\s*(?:\d|\{\s*\d+\s*\})")
_PLACES = re.compile(r"\.(\d+)")
_MOST_COMPARED = 50
_LONGEST_PRODUCT = 3
"""Letters that may be a word or a product: cab."""


def is_same(gold: Answer, found: Answer) -> bool:
    """Whether the found answer equals the gold one. Not symmetric: gold determines the required kind of answer."""
    if gold.text == found.text or (gold.kind == found.kind == "text" and _bare(gold.text) == _bare(found.text)):
        return True
    if gold.kind == "approximation" or found.kind == "approximation":
        return any(is_same(g, f) for g in _readings(gold) for f in _readings(found))
    if found.kind == "equation" or gold.kind == "equation":
        return _same_equation(gold, found)
    match gold.kind, found.kind:
        case "value", "value":
            return _same_value(gold, found)
        case "ratio", "value":
            return isinstance(found.value, Number) and gold.mark == _as_ratio(found.value)
        case ("clock", "ratio") | ("ratio", "clock"):
            return _bare(gold.text) == _bare(found.text)
        case "congruence", "congruence":
            return _same_congruence(gold, found)
        case "value", "choice":
            return any(is_same(gold, part) for part in found.parts)
        case "value", "words" if len(found.text) <= _LONGEST_PRODUCT:
            product = read_formula(found.text)
            return product is not None and gold.value is not None and same_formula(gold.value, product)
        case "words", _:
            return gold.mark == plain_words(found.text)
        case "choice", "value" | "list" | "brackets" | "words":
            return any(is_same(part, found) for part in gold.parts)
        case ("choice", "choice") | ("ratio", "ratio") | ("base", "base"):
            return gold.mark == found.mark
        case "clock", "clock":
            return _same_time(gold, found)
        case "base", "value":
            return gold.mark.partition("_")[0] == found.text
        case "brackets", "brackets":
            return gold.mark == found.mark and _same_in_order(gold.parts, found.parts)
        case "brackets", "list":
            return gold.mark == "()" and _same_in_order(gold.parts, _as_point(found))
        case "brackets", "value":
            entries = entries_of_vector(found.value) if gold.mark == "()" and found.value else []
            return _same_in_order(gold.parts, [Answer("value", "", value=entry) for entry in entries])
        case "list", "brackets":
            if all(part.kind == "equation" for part in gold.parts):
                return found.mark == "()" and _same_in_order(_as_point(gold), found.parts)
            return found.mark in ("()", "[]") and _same_members(gold.parts, found.parts)
        case ("list" | "set", "list" | "set") | ("union", "union" | "list"):
            return _same_members(gold.parts, found.parts)
        case "list", "value":
            return _same_members(gold.parts, (found,))
        case "value", "set" | "list":
            return bool(found.parts) and _same_members((gold,), found.parts)
        case "inequality", "inequality":
            return _same_inequality(gold, found)
    return False


def _bare(text: str) -> str:
    return re.sub(r"[\s{}]", "", text)


def _as_ratio(number: Number) -> str:
    """A fraction in the form of a ratio's ``mark``."""
    return f"1:{1 / number.value}" if number.value and not number.is_percent else ""


def _readings(answer: Answer) -> tuple[Answer, ...]:
    """Both sides of an approximation if the right one is the left one rounded, else only the left one."""
    if answer.kind != "approximation":
        return (answer,)
    left, right = answer.parts
    return (left, right) if _is_rounding(left, right) else (left,)


def _is_rounding(exact: Answer, decimal: Answer) -> bool:
    if not isinstance(exact.value, Formula) or not isinstance(decimal.value, Number):
        return False
    places = _PLACES.search(decimal.text)
    return is_rounded(exact.value, decimal.value, len(places[1]) if places else 0)


def _same_value(gold: Answer, found: Answer) -> bool:
    if gold.unit.measures and not found.unit.measures:
        found = read_measure(found)
    elif found.unit.measures and not gold.unit.measures:
        gold = read_measure(gold)
    factor = scale_between(gold.unit, found.unit)
    if factor is None or gold.value is None or found.value is None:
        return False
    if (_is_percentage(gold) and found.unit.measures) or (_is_percentage(found) and gold.unit.measures):
        return False
    value = scaled(found.value, factor)
    if isinstance(gold.value, Number) and isinstance(value, Number):
        return same_number(gold.value, value)
    return same_formula(gold.value, value)


def _same_time(gold: Answer, found: Answer) -> bool:
    """19:30 equals 7:30 p.m."""
    if scale_between(gold.unit, found.unit) is None:
        return False
    half_days = [gold.unit.measures or found.unit.measures, found.unit.measures or gold.unit.measures]
    return gold.mark == found.mark or _in_full(gold.mark, half_days[0]) == _in_full(found.mark, half_days[1])


def _in_full(time: str, half_day: str) -> str:
    hour, _, minutes = time.partition(":")
    later = 12 if half_day.startswith("afternoon") and int(hour) < 12 else 0
    return f"{int(hour) + later}:{minutes}"


def _is_percentage(answer: Answer) -> bool:
    return isinstance(answer.value, Number) and answer.value.is_percent


def _same_in_order(gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
    return len(gold) == len(found) and all(map(is_same, gold, found))


def _same_members(gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
    """Equality as sets: order and repetition do not count."""
    if all(map(_says_all, (*gold, *found))) and {str(answer) for answer in gold} == {str(answer) for answer in found}:
        return True
    if (plain := _without_indices(found)) is not found and _without_indices(gold) is gold:
        found = plain
    elif plain is found:
        gold = _without_indices(gold)
    if max(len(gold), len(found)) > _MOST_COMPARED:
        return False
    return all(any(is_same(g, f) for f in found) for g in gold) and all(any(is_same(g, f) for g in gold) for f in found)


def _says_all(answer: Answer) -> bool:
    """Whether the text determines the answer: it omits no name and no unit."""
    no_name = answer.kind not in ("equation", "approximation")
    return no_name and not answer.unit.measures and all(map(_says_all, answer.parts))


def _as_point(found: Answer, order: Sequence[str] = ()) -> Sequence[Answer]:
    """``y=2, x=1`` and ``1, 2`` as (1, 2); empty for ``1 or 2`` and ``x=1, x=2``."""
    names = [_bare(part.parts[0].text) if part.kind == "equation" else "" for part in found.parts]
    if not all(names):
        return () if any(names) or _CONJUNCTION.search(found.text) else found.parts
    if len(set(names)) < len(names) or _OR.search(found.text) or (order and sorted(order) != sorted(names)):
        return ()
    by_name = dict(zip(names, found.parts, strict=True))
    return [by_name[name] for name in order or sorted(names, key=lambda name: name.lstrip("\\"))]


def _without_indices(members: Sequence[Answer]) -> Sequence[Answer]:
    """``x_1=2, x_2=5`` as ``x=2, x=5``; other answers unchanged."""
    names = [_INDEXED.fullmatch(part.parts[0].text) if part.kind == "equation" else None for part in members]
    letters = {name[1] for name in names if name}
    if len(letters) != 1 or not all(names) or len({part.parts[0].text for part in members}) < len(members):
        return members
    name = Answer("unreadable", letters.pop())
    return [replace(part, text="", parts=(name, *part.parts[1:])) for part in members]


def _same_equation(gold: Answer, found: Answer) -> bool:
    if gold.kind == found.kind:
        names = [is_name(side.parts[0].text) for side in (gold, found)]
        if all(names) and _bare(gold.parts[0].text) == _bare(found.parts[0].text):
            return any(is_same(gold.parts[-1], conclusion) for conclusion in _conclusions(found))
        functions = [_FUNCTION.fullmatch(side.parts[0].text) for side in (gold, found)]
        if functions[0] and functions[1] and functions[0][1] == functions[1][1]:  # f(n) = n and f(x) = x
            return is_same(gold.parts[-1], _renamed(found.parts[-1], functions[1][2], functions[0][2]))
        if any(functions) and {"y", "x"} == {
            side.parts[0].text if not call else call[2] for side, call in zip((gold, found), functions, strict=True)
        }:  # f(x) = 2x and y = 2x
            return is_same(gold.parts[-1], found.parts[-1])
        return is_multiple(_gap(gold), _gap(found), positive=False)
    if gold.kind == "equation":
        if found.kind == "list" and gold.parts[-1].kind == "brackets":
            order = _bare(gold.parts[0].text).strip("()").split(",")
            return _same_in_order(gold.parts[-1].parts, _as_point(found, order if len(order) > 1 else ()))
        return is_name(gold.parts[0].text) and is_same(gold.parts[-1], found)
    return any(is_same(gold, conclusion) for conclusion in _conclusions(found))


def _conclusions(equation: Answer) -> Sequence[Answer]:
    """The values an equation gives its left side: 3 for ``x = 6/2 = 3``; none for ``x = 2 x = 5`` and ``1 + 1 = 3``."""
    first, *middle, last = equation.parts
    if not middle and not tells_a_value(first.text) and (first.value is None or _has_variables(first)):
        return ()
    conclusions = [last]
    for part in (first, *middle):
        if part.value is None and (is_name(part.text) or (part is first and tells_a_value(part.text))):
            continue
        if part.value is not None and _has_variables(part):
            solves_itself = part is not first and names_of(part.value) & set(LETTER.findall(first.text))
            if solves_itself and not is_same(last, part):
                return ()
        elif is_same(last, part):
            conclusions.append(part)
        elif _is_rounding(part, last):
            conclusions.insert(0, part)
        else:
            return ()
    return conclusions


def _has_variables(answer: Answer) -> bool:
    return answer.value is not None and bool(names_of(answer.value))


def _same_congruence(gold: Answer, found: Answer) -> bool:
    """Compare residues, regardless of their representatives."""
    names = [_bare(side.text.partition(r"\equiv")[0]) if r"\equiv" in side.text else "" for side in (gold, found)]
    if gold.mark != found.mark or (all(names) and names[0] != names[1]):
        return False
    residues = [[_residue(part, gold.mark) for part in side.parts] for side in (gold, found)]
    if None in residues[0] or None in residues[1]:
        return _same_members(gold.parts, found.parts)
    return set(residues[0]) == set(residues[1])


def _residue(answer: Answer, modulus: str) -> Fraction | None:
    if not isinstance(answer.value, Number) or not modulus.isdecimal() or not int(modulus):
        return None
    return answer.value.value % int(modulus)


def _same_inequality(gold: Answer, found: Answer) -> bool:
    if found.mark != gold.mark:
        found = replace(found, parts=found.parts[::-1], mark=FLIPPED[found.mark])
    return found.mark == gold.mark and is_multiple(_gap(gold), _gap(found), positive=True)


def _gap(relation: Answer) -> Formula | None:
    sides = (relation.parts[0], relation.parts[-1])
    left, right = (side.value if side.value is not None else read_formula(side.text) for side in sides)
    return difference(left, right)


def _renamed(answer: Answer, old: str, new: str) -> Answer:
    value = answer.value
    return replace(answer, text="", value=value.renamed(old, new)) if isinstance(value, Formula) else answer
