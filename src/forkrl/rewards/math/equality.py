"""When a found answer is the gold answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from forkrl.rewards.math.answer import FLIPPED, Answer, is_name, plain_words, tells_a_value
from forkrl.rewards.math.formula import Formula, difference, is_multiple, is_rounded, read_formula, same_formula
from forkrl.rewards.math.numbers import Number, same_number
from forkrl.rewards.math.units import scale_between

_CONJUNCTION = re.compile(r"(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")
_FUNCTION = re.compile(r"([a-zA-Z])\s*\(\s*([a-zA-Z])\s*\)")
_PLACES = re.compile(r"\.(\d+)")
_MOST_COMPARED = 50


def is_same(gold: Answer, found: Answer) -> bool:
    """Whether the found answer is the gold one. Not symmetric: gold says what kind of answer is wanted."""
    if gold.text == found.text or (gold.kind == found.kind == "text" and _bare(gold.text) == _bare(found.text)):
        return True
    if gold.kind == "approximation" or found.kind == "approximation":
        return any(is_same(g, f) for g in _readings(gold) for f in _readings(found))
    if found.kind == "equation" or gold.kind == "equation":
        return _same_equation(gold, found)
    match gold.kind, found.kind:
        case "value", "value":
            return _same_value(gold, found)
        case "value", "choice":
            return any(is_same(gold, part) for part in found.parts)
        case "words", _:
            return gold.mark == plain_words(found.text)
        case ("choice", "choice") | ("ratio", "ratio") | ("base", "base"):
            return gold.mark == found.mark
        case "clock", "clock":
            return gold.mark == found.mark and scale_between(gold.unit, found.unit) is not None
        case "base", "value":
            return gold.mark.partition("_")[0] == found.text
        case "brackets", "brackets":
            return gold.mark == found.mark and _same_in_order(gold.parts, found.parts)
        case "brackets", "list":
            return gold.mark == "()" and _same_in_order(gold.parts, _as_point(found))
        case "list", "brackets":
            if all(part.kind == "equation" for part in gold.parts):
                return found.mark == "()" and _same_in_order(_as_point(gold), found.parts)
            return found.mark in ("()", "[]") and _same_members(gold.parts, found.parts)
        case "set", "list":
            return _same_members(gold.parts, found.parts)
        case ("list", "list") | ("list", "set") | ("set", "set") | ("union", "union") | ("union", "list"):
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


def _readings(answer: Answer) -> tuple[Answer, ...]:
    """Both sides of an approximation where the right one is the left one rounded, else the left one: two answers that
    are merely said to be near each other are no answer and its decimal fraction."""
    if answer.kind != "approximation":
        return (answer,)
    left, right = answer.parts
    if not isinstance(left.value, Formula) or not isinstance(right.value, Number):
        return (left,)
    places = _PLACES.search(right.text)
    is_rounding = is_rounded(left.value, right.value, len(places[1]) if places else 0)
    return (left, right) if is_rounding else (left,)


def _same_value(gold: Answer, found: Answer) -> bool:
    factor = scale_between(gold.unit, found.unit)
    if factor is None or gold.value is None or found.value is None:
        return False
    if (_is_percentage(gold) and found.unit.measures) or (_is_percentage(found) and gold.unit.measures):
        return False
    value: Any = found.value
    if isinstance(value, Number):
        value = value._replace(value=value.value * factor)
        if isinstance(gold.value, Number):
            return same_number(gold.value, value)
    elif factor != 1:
        return False
    return same_formula(gold.value, value)


def _is_percentage(answer: Answer) -> bool:
    return isinstance(answer.value, Number) and answer.value.is_percent


def _same_in_order(gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
    return len(gold) == len(found) and all(map(is_same, gold, found))


def _same_members(gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
    """Whether every member has its equal on the other side; how often and in which order does not count."""
    if all(map(_says_all, (*gold, *found))) and {str(answer) for answer in gold} == {str(answer) for answer in found}:
        return True
    if max(len(gold), len(found)) > _MOST_COMPARED:
        return False
    return all(any(is_same(g, f) for f in found) for g in gold) and all(any(is_same(g, f) for g in gold) for f in found)


def _says_all(answer: Answer) -> bool:
    """Whether answers with its text are equal to it: no name, no unit is left out of the text."""
    no_name = answer.kind not in ("equation", "approximation")
    return no_name and not answer.unit.measures and all(map(_says_all, answer.parts))


def _as_point(found: Answer) -> Sequence[Answer]:
    """``y=2, x=1`` as (1, 2), and ``1, 2`` too; nothing for ``1 or 2`` and ``x=1, x=2``."""
    names = [part.parts[0].text if part.kind == "equation" else "" for part in found.parts]
    if _CONJUNCTION.search(found.text) or (any(names) and len(set(names)) < len(names)):
        return ()
    return sorted(found.parts, key=lambda part: part.parts[0].text) if all(names) else found.parts


def _same_equation(gold: Answer, found: Answer) -> bool:
    if gold.kind == found.kind:
        names = [is_name(side.parts[0].text) for side in (gold, found)]
        if all(names) and _bare(gold.parts[0].text) == _bare(found.parts[0].text):
            return is_same(gold.parts[-1], found.parts[-1])
        functions = [_FUNCTION.fullmatch(side.parts[0].text) for side in (gold, found)]
        if functions[0] and functions[1] and functions[0][1] == functions[1][1]:  # f(n) = n and f(x) = x
            return is_same(gold.parts[-1], _renamed(found.parts[-1], functions[1][2], functions[0][2]))
        gaps = [_gap(side) for side in (gold, found)]
        return gaps[0] is not None and gaps[1] is not None and is_multiple(gaps[0], gaps[1], positive=False)
    if gold.kind == "equation":
        return is_name(gold.parts[0].text) and is_same(gold.parts[-1], found)
    return tells_a_value(found.parts[0].text) and is_same(gold, found.parts[-1])


def _same_inequality(gold: Answer, found: Answer) -> bool:
    gaps = [_gap(side) for side in (gold, found)]
    if gaps[0] is None or gaps[1] is None:
        return False
    if found.mark == gold.mark:
        return is_multiple(gaps[0], gaps[1], positive=True)
    turned = Formula(-gaps[1].expression, False)
    return FLIPPED[found.mark] == gold.mark and is_multiple(gaps[0], turned, positive=True)


def _gap(relation: Answer) -> Formula | None:
    """Left side minus right side."""
    left, right = (_side_value(part) for part in relation.parts)
    return difference(left, right) if left is not None and right is not None else None


def _side_value(side: Answer) -> Formula | Number | None:
    return side.value if side.value is not None else read_formula(side.text)


def _renamed(answer: Answer, old: str, new: str) -> Answer:
    value = answer.value
    return replace(answer, text="", value=value.renamed(old, new)) if isinstance(value, Formula) else answer
