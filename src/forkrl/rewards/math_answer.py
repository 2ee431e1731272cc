r"""What a final answer is (a number, a list, an interval, a word, ...), and when two of them are the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from forkrl.rewards.math_formula import Formula, TooLarge, difference, is_multiple, read_formula, same_formula
from forkrl.rewards.math_notation import closing_place, plain_notation, split_outside
from forkrl.rewards.math_numbers import Number, number_word, read_number, same_number
from forkrl.rewards.math_units import NO_UNIT, Unit, scale_between, split_unit

Kind = Literal[
    "value", "words", "choice", "clock", "ratio", "base", "list", "set", "brackets", "union", "equation", "inequality",
    "approximation", "unreadable",
]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A final answer.

    ``text`` is its notation, ``parts`` the members of a list or the sides of a relation, ``mark`` what tells two of a
    kind apart beside their parts: the brackets of an interval, the sign of a relation, a word, a base.
    """

    kind: Kind
    text: str
    parts: tuple[Answer, ...] = ()
    mark: str = ""
    value: Number | Formula | None = None
    unit: Unit = NO_UNIT

    def __str__(self) -> str:
        """In a form in which equal answers are mostly equal text."""
        match self.kind:
            case "value":
                return str(self.value)
            case "words" | "choice" | "clock" | "ratio" | "base":
                return self.mark
            case "list" | "set" | "union":
                members = sorted({str(part) for part in self.parts})
                return " ∪ ".join(members) if self.kind == "union" else "{" + ", ".join(members) + "}"
            case "brackets":
                return self.mark[0] + ", ".join(map(str, self.parts)) + self.mark[1]
            case "equation" if _is_name(self.parts[0].text):
                return str(self.parts[-1])
            case "equation" | "inequality":
                return f" {self.mark} ".join(map(str, self.parts))
            case "approximation":
                return str(self.parts[0])
        return self.text


_SEPARATOR = re.compile(
    r"\s*[,;]\s*(?:(?:and|or)(?![a-zA-Z])|\\text\{(?:and|or)\})?|\s*(?:(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|\\text\{,?\s*(?:and|or)\})"
)
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_MEMBER_OF = re.compile(r"^[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")
_EQUALS = re.compile(r"(?<![\\<>!])=")
_ORDER = re.compile(r"<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])")
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])")
_CALL = r"(?:\\?[a-zA-Z]+'*(?:_(?:\{[^{}]*\}|\w))?)"
_NAME = re.compile(
    rf"(?:{_CALL}|\\text\{{[^{{}}]*\}}|\\(?:angle|overline|overrightarrow|vec|triangle)\s*\{{?\s*[A-Z]+\s*\}}?|\|\s*[A-Z]+\s*\|"
    rf"|{_CALL}\s*\([^()=]*\)|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))"
)
_WHOLE_TEXT = re.compile(r"(?:\\text\{([^{}]*)\}\s*)+")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*\.?")
_SHORT_WORDS = {"yes", "no", "odd", "even", "true", "all", "none", "never"}
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOICE_WITH_TEXT = re.compile(r"(?:\(([A-J])\)\s*|([A-J])\s*[.:)]\s*)(\S.*)", re.DOTALL)
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_BASE = re.compile(r"([0-9A-F]+)\s*_\s*(?:\{\s*(?:\\text\{)?(\d+)\}?\s*\}|(\d))")
_LETTER = re.compile(r"(?<!\\)[a-zA-Z](?![a-zA-Z])")
_TWO_SIGNS = re.compile(r"\\pm(?![a-zA-Z])|\\mp(?![a-zA-Z])")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_MOST_COMPARED = 50


def read_answer(text: str) -> Answer:
    """The answer that a text is; of kind "unreadable" where it is none.

    Raises:
        TooLarge: a formula in it exceeds the bounds of ``read_formula``.
    """
    return _read(plain_notation(text), depth=0)


def _read(text: str, depth: int) -> Answer:
    if not text or depth > 8:
        return Answer("unreadable", text)
    if number := read_number(text):
        return Answer("value", text, value=number)
    if words := _read_words(text):
        return words
    for read in (_read_choice, _read_several, _read_brackets, _read_relation, _read_two_signs, _read_notation):
        if answer := read(text, depth + 1):
            return answer
    return _read_value(text)


def _read_words(text: str) -> Answer | None:
    whole = _WHOLE_TEXT.fullmatch(text)
    words = " ".join(" ".join(_TEXT.findall(text)).split()) if whole else text
    if _CHOICE.fullmatch(words) or not re.search(r"[^\W\d_]", words) or (not whole and not _WORDS.fullmatch(words)):
        return None
    if _CHOICE_WITH_TEXT.fullmatch(words) or (whole and len(words) < 2):
        return None
    lower = words.rstrip(".").casefold()
    longest = max(map(len, re.split(r"[ '-]", lower)))
    if not (whole or longest >= 4 or lower in _SHORT_WORDS or number_word(lower) or words.istitle()):
        return None  # a product of variables
    number = number_word(lower)
    return Answer("value", text, value=number) if number else Answer("words", text, mark=lower)


def _read_choice(text: str, depth: int) -> Answer | None:
    plain = _TEXT.sub(r"\1", text).strip()
    if match := _CHOICE.fullmatch(plain):
        return Answer("choice", text, mark=match[1])
    if match := _CHOICE_WITH_TEXT.fullmatch(plain):
        return Answer("choice", text, (_read(match[3].strip("\\ "), depth),), mark=match[1] or match[2])
    return None


def _read_several(text: str, depth: int) -> Answer | None:
    """Unions and lists."""
    sets = split_outside(_MEMBER_OF.sub("", text), _CUP)
    if len(sets) > 1:
        return Answer("union", text, tuple(_read(part.strip(), depth) for part in sets))
    pieces = [piece.strip() for piece in split_outside(text, _SEPARATOR)]
    members = [_read(piece, depth) for piece in pieces if piece] if len(pieces) > 1 else []
    if len(members) == 1:
        return members[0]
    if members:
        is_union = all(
            member.kind == "brackets" and member.mark != "()" or _ORDER.search(member.text) for member in members
        )
        return Answer("union" if is_union else "list", text, tuple(_unpacked(members)))
    return None


def _unpacked(members: Sequence[Answer]) -> list[Answer]:
    r"""Lists within lists made one: ``0, \pm 2``."""
    return [part for member in members for part in (member.parts if member.kind == "list" else (member,))]


def _read_brackets(text: str, depth: int) -> Answer | None:
    if text == r"\emptyset":
        return Answer("set", text)
    text = _MEMBER_OF.sub("", text)
    for opening, closing, mark in ((r"\{", r"\}", "{}"), (r"\langle", r"\rangle", "()")):
        if text.startswith(opening) and text.endswith(closing) and text.count(opening) == 1:
            return _bracketed(text, text[len(opening) : -len(closing)], mark, depth)
    if text[0] in "([" and closing_place(text, 0) == len(text) - 1:
        return _bracketed(text, text[1:-1], text[0] + text[-1], depth)
    return None


def _bracketed(text: str, inside: str, mark: str, depth: int) -> Answer | None:
    pieces = [piece.strip() for piece in split_outside(inside, re.compile("[,;]"))]
    if mark == "{}":
        members = tuple(_read(piece, depth) for piece in pieces if piece)
        return Answer("set", text, tuple(_unpacked(members)))
    if len(pieces) == 1:
        return _read(inside.strip(), depth) if mark == "()" else None
    return Answer("brackets", text, tuple(_read(piece, depth) for piece in pieces), mark=mark)


def _read_relation(text: str, depth: int) -> Answer | None:
    sides = [side.strip() for side in split_outside(text, _APPROXIMATELY)]
    if len(sides) == 2:
        name, result = sides
        if _is_name(name) or not name:
            return _read(result, depth)
        return Answer("approximation", text, (_read(name, depth), _read(result, depth)))
    sides = [side.strip() for side in split_outside(text, _EQUALS)]
    if len(sides) > 1 and all(sides):
        first = Answer("unreadable", sides[0]) if _is_name(sides[0]) else _read(sides[0], depth)
        last = _read(sides[-1], depth)
        if last.kind == "list" and r"\pm" in text:
            return last
        return Answer("equation", text, (first, last), mark="=")
    sides = [side.strip() for side in split_outside(text, _ORDER)]
    if 2 <= len(sides) <= 3 and all(sides):
        signs = [sign.strip() for sign in _ORDER.findall(text)]
        return _read_inequality(text, sides, signs, depth) if len(signs) == len(sides) - 1 else None
    return None


def _read_inequality(text: str, sides: list[str], signs: list[str], depth: int) -> Answer | None:
    if len(sides) == 3 and len(set(sign in ("<", r"\le") for sign in signs)) == 1:
        if signs[0] in (">", r"\ge"):
            sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
        ends = (_read(sides[0], depth), _read(sides[2], depth))
        return Answer(
            "brackets", text, ends, mark=("[" if signs[0] == r"\le" else "(") + ("]" if signs[1] == r"\le" else ")")
        )
    if len(sides) == 3:
        return None
    left, right, sign = sides[0], sides[1], signs[0]
    if len(right) == 1 and right.isalpha():
        left, right, sign = right, left, _FLIPPED[sign]
    if len(left) == 1 and left.isalpha() and left not in _LETTER.findall(right):
        end, infinity = _read(right, depth), _read(r"\infty" if sign in (">", r"\ge") else r"-\infty", depth)
        closed = sign in (r"\ge", r"\le")
        if sign in (">", r"\ge"):
            return Answer("brackets", text, (end, infinity), mark=("[" if closed else "(") + ")")
        return Answer("brackets", text, (infinity, end), mark="(" + ("]" if closed else ")"))
    return Answer("inequality", text, (_read(left, depth), _read(right, depth)), mark=sign)


def _read_two_signs(text: str, depth: int) -> Answer | None:
    signs = _TWO_SIGNS.findall(text)
    if not signs:
        return None
    plus = _TWO_SIGNS.sub(lambda sign: "+" if sign[0] == r"\pm" else "-", text)
    minus = _TWO_SIGNS.sub(lambda sign: "-" if sign[0] == r"\pm" else "+", text)
    return Answer("list", text, tuple(_read(each.strip().removeprefix("+").strip(), depth) for each in (plus, minus)))


def _read_notation(text: str, depth: int) -> Answer | None:
    """Clock times, ratios, numbers with a base."""
    bare, unit = split_unit(text)
    if match := _CLOCK.fullmatch(bare):
        return Answer("clock", text, mark=f"{int(match[1])}:{match[2]}", unit=unit)
    if _RATIO.fullmatch(bare):
        terms = [read_number(term.strip()) for term in bare.split(":")]
        first = terms[0].value if terms[0] else 0
        if first:
            mark = ":".join(str(term.value / first) for term in terms if term)
            return Answer("ratio", text, mark=mark)
    if match := _BASE.fullmatch(bare):
        base = int(match[2] or match[3])
        if 2 <= base <= 36 and (base > 10 or match[1].isdecimal()):
            return Answer("base", text, mark=f"{match[1].lstrip('0') or '0'}_{base}")
    return None


def _read_value(text: str) -> Answer:
    bare, unit = split_unit(text)
    if bare != text:
        inner = _read(bare, depth=4)
        return replace(inner, text=text, unit=unit if unit.measures else inner.unit)
    percent = bare.endswith(r"\%")
    value = read_formula(bare.removesuffix(r"\%").strip() if percent else bare)
    if isinstance(value, Number) and percent:
        value = value._replace(is_percent=True)
    if value is None:
        return Answer("unreadable", text)
    return Answer("value", text, value=value)


def is_same(gold: Answer, found: Answer) -> bool:
    """Whether the found answer is the gold one. Not symmetric: gold says what kind of answer is wanted."""
    if gold.text == found.text:
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
        case ("words", "words") | ("choice", "choice") | ("ratio", "ratio") | ("base", "base"):
            return gold.mark == found.mark
        case "clock", "clock":
            return gold.mark == found.mark and scale_between(gold.unit, found.unit) is not None
        case "base", "value":
            return gold.mark.partition("_")[0] == found.text
        case "brackets", "brackets":
            return gold.mark == found.mark and _same_in_order(gold.parts, found.parts)
        case "brackets", "list":
            return gold.mark == "()" and _same_in_order(gold.parts, _in_name_order(found.parts))
        case ("list", "brackets") | ("set", "list"):
            return (found.kind == "list" or found.mark in ("()", "[]")) and _same_members(gold.parts, found.parts)
        case ("list", "list") | ("list", "set") | ("set", "set") | ("union", "union") | ("union", "list"):
            return _same_members(gold.parts, found.parts)
        case ("set" | "list", "value") | ("value", "set" | "list"):
            return _same_members(gold.parts or (gold,), found.parts or (found,)) if gold.kind != "set" else False
        case "inequality", "inequality":
            return _same_inequality(gold, found)
    return False


def _readings(answer: Answer) -> tuple[Answer, ...]:
    """Both sides of an approximation; but a number is not excused by what it is said to be near to."""
    if answer.kind != "approximation":
        return (answer,)
    left, right = answer.parts
    return (left,) if isinstance(left.value, Number) else (left, right)


def _same_value(gold: Answer, found: Answer) -> bool:
    factor = scale_between(gold.unit, found.unit)
    if factor is None or gold.value is None or found.value is None:
        return False
    value: Any = found.value
    if isinstance(value, Number):
        value = value._replace(value=value.value * factor)
        if isinstance(gold.value, Number):
            return same_number(gold.value, value)
    elif factor != 1:
        return False
    return same_formula(gold.value, value)


def _same_in_order(gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
    return len(gold) == len(found) and all(map(is_same, gold, found))


def _same_members(gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
    """Whether every member has its equal on the other side; how often and in which order does not count."""
    if {str(answer) for answer in gold} == {str(answer) for answer in found}:
        return True
    if max(len(gold), len(found)) > _MOST_COMPARED:
        return False
    return all(any(is_same(g, f) for f in found) for g in gold) and all(any(is_same(g, f) for g in gold) for f in found)


def _in_name_order(parts: Sequence[Answer]) -> Sequence[Answer]:
    """``y=2, x=1`` as (1, 2)."""
    named = all(part.kind == "equation" for part in parts)
    return sorted(parts, key=lambda part: part.parts[0].text) if named else parts


def _same_equation(gold: Answer, found: Answer) -> bool:
    if gold.kind == found.kind:
        names = [_is_name(side.parts[0].text) for side in (gold, found)]
        if all(names) and gold.parts[0].text == found.parts[0].text:
            return is_same(gold.parts[-1], found.parts[-1])
        gaps = [_gap(side) for side in (gold, found)]
        return gaps[0] is not None and gaps[1] is not None and is_multiple(gaps[0], gaps[1], positive=False)
    equation = gold if gold.kind == "equation" else found
    left, right = equation.parts
    if not _is_name(left.text) and (equation is gold or _LETTER.search(left.text)):
        return False  # 2x + 1 = 7 does not answer 7
    return is_same(right, found) if equation is gold else is_same(gold, right)


def _same_inequality(gold: Answer, found: Answer) -> bool:
    gaps = [_gap(side) for side in (gold, found)]
    if gaps[0] is None or gaps[1] is None:
        return False
    if found.mark == gold.mark:
        return is_multiple(gaps[0], gaps[1], positive=True)
    turned = Formula(-gaps[1].expression, False)
    return _FLIPPED[found.mark] == gold.mark and is_multiple(gaps[0], turned, positive=True)


def _gap(relation: Answer) -> Formula | None:
    """Left side minus right side."""
    left, right = (_side_value(part) for part in relation.parts)
    return difference(left, right) if left is not None and right is not None else None


def _side_value(side: Answer) -> Formula | Number | None:
    return side.value if side.value is not None else read_formula(side.text)


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


__all__ = ["Answer", "TooLarge", "is_same", "read_answer"]
