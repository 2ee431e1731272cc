"""Parses the notation of a final answer into its kind: number, list, interval, word, ..."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from forkrl.rewards.math.formula import Formula, read_formula
from forkrl.rewards.math.notation import closing_place, plain_notation, split_outside, without_thousands
from forkrl.rewards.math.numbers import Number, number_word, read_number
from forkrl.rewards.math.phrases import SET_OF_ALL
from forkrl.rewards.math.units import NO_UNIT, Unit, flat_text, split_unit

Kind = Literal[
    "value", "words", "choice", "clock", "ratio", "base", "list", "set", "brackets", "union", "equation", "inequality",
    "congruence", "approximation", "text", "unreadable",
]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A final answer.

    ``text`` is its notation and ``parts`` the members of a list or sides of a relation. ``mark`` distinguishes answers
    of one kind: an interval's brackets, a relation's sign, a word, a base.
    """

    kind: Kind
    text: str
    parts: tuple[Answer, ...] = ()
    mark: str = ""
    value: Number | Formula | None = None
    unit: Unit = NO_UNIT

    def __str__(self) -> str:
        """A form in which equal answers mostly have equal text."""
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
            case "equation" if tells_a_value(self.parts[0].text):
                return str(self.parts[-1])
            case "equation" | "inequality":
                return f" {self.mark} ".join(map(str, self.parts))
            case "congruence":
                return ", ".join(sorted(map(str, self.parts))) + f" mod {self.mark}"
            case "approximation":
                return str(self.parts[0])
        return self.text


_JOIN = r"(?:(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|\\text\{,?\s*(?:and|or)\})"
_LEADING_WORDS = re.compile(
    r"^(?:\\text\{)?\s*(?:so|thus|hence|therefore|then|(?:the )?(?:final )?answer(?: is|:)|answer is|is)"
    r"[\s,:]*(?:\}|(?<=[\s:]))\s*"
    r"(?=[-\d\\(\[]|[a-zA-Z]\s*=)",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(rf"\s*[,;]\s*{_JOIN}?|\s*{_JOIN}")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_MEMBER_OF = re.compile(r"^(?:[a-zA-Z]|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))\s*\\in(?![a-zA-Z])\s*")
_EQUALS = re.compile(r"(?<![\\<>!])=|\\equiv(?![a-zA-Z])")
_CONGRUENCE = re.compile(
    r"(?:(?P<left>[^=]*?)\s*\\equiv\s*)?(?P<residues>.*?)[\s,]*\(?\s*(?P<mod>\\pmod|\\bmod|\\mod|\\text\{mod\}|(?<![a-zA-Z\\])mod)"
    r"\s*(?:\{(?P<braced>[^{}]*)\}|(?P<bare>\w+))\s*\)?"
)
_ORDER = re.compile(r"<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])")
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])")
_CALL = r"(?:\\?[a-zA-Z]+'*(?:_(?:\{[^{}]*\}|\w))?)"
_NAME = re.compile(
    rf"(?:{_CALL}|\\text\{{[^{{}}]*\}}"
    r"|\\(?:angle|overline|overrightarrow|vec|triangle)\s*\{?\s*[A-Z]+\s*\}?|\|\s*[A-Z]+\s*\|"
    rf"|{_CALL}\s*\([^()=]*\)|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))"
)
_WHOLE_TEXT = re.compile(r"(?:\\text\{([^{}]*)\}\s*)+")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*\.?")
_ARTICLE = re.compile(r"^(?:an?|the) (?=\w)")
_SHORT_WORDS = {"yes", "no", "odd", "even", "true", "all", "none", "never"}
_SHORT_WORD = re.compile(r"[b-df-hj-np-tv-z][aeiou][b-df-hj-np-tv-z]")
"""Matches "cat", not "abc"."""
_CHOICE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer|选项|选)\s*:?\s*)?\(?([A-J])\)?")
_CHOICE_WITH_TEXT = re.compile(r"(?:\(([A-J])\)\s*|([A-J])\s*[.:)]\s*)(\S.*)", re.DOTALL)
_CHOICE_AND_VALUE = re.compile(r"^\\text\{([A-J])\}\s+(?=[-\d\\$])")
_ANOTHER_CHOICE = re.compile(r"(?:and|or|,)?\s*\(?[A-J]\)?", re.IGNORECASE)
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_BASE = re.compile(r"\(?([0-9A-F]+)\)?\s*_\s*(?:\{\s*(?:\\text\{)?\(?(\d+)\)?\}?\s*\}|(\d))")
LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
_NUMERIC_COMMANDS = re.compile(r"\\(?:cdot|times|div|frac|sqrt|binom|pi)(?![a-zA-Z])")
_QUANTITY = re.compile(r"-?[a-zA-Z](?:\s*[-+]?\s*[a-zA-Z])*")
_OF_NAMES = re.compile(
    r"\\(?:sin|cos|tan|cot|sec|csc)\s*[({]?\s*(?:\\angle\s*)?\\?[a-zA-Z]+\s*[)}]?"
    r"|\\frac\{\s*[a-zA-Z]+\s*\}\{\s*[a-zA-Z]+\s*\}|[a-zA-Z]+\s*[:/]\s*[a-zA-Z]+|\|[^|=]+\|"
)
_NO_WORDS = re.compile(r"\\(?:text|begin|end)\{[^{}]*\}")
_LONG_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?:the|and|not|are|for|but|any|all)(?![a-zA-Z])"
    r"|(?<![\\a-zA-Z])(?!(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-zA-Z])|sqrt|frac|pmod|bmod)[a-zA-Z]{4}"
)
_WORD_AMONG_SYMBOLS = re.compile(
    r"(?<![_^{])\\text\{(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?\}|(?:ln|log|exp|sgn|sign|det|tr|Re|Im|lcm|gcd)\})[^{}]*[a-z]{2}"
)
_TWO_SIGNS = re.compile(r"\\pm(?![a-zA-Z])|\\mp(?![a-zA-Z])")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_CONTENT = re.compile(r"[^\W_]")
_RISING = ("<", r"\le")
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def read_answer(text: str, *, thousands: bool = True) -> Answer:
    """Read LaTeX or plain text, or kind "unreadable"; with ``thousands``, 8,000 is one number. May raise TooLarge."""
    text = plain_notation(text)
    return _read(without_thousands(text) if thousands else text, depth=0)


def read_measure(answer: Answer) -> Answer:
    """Read the letters after the answer's number as a unit: 5 m."""
    bare, unit = split_unit(answer.text, lenient=True)
    return replace(_read(bare, depth=4), text=answer.text, unit=unit) if unit.measures else answer


def _read(text: str, depth: int) -> Answer:
    while text.startswith("{") and closing_place(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    sentence = _TEXT.fullmatch(text)
    text = _LEADING_WORDS.sub("", sentence[1] if sentence and _LEADING_WORDS.match(sentence[1]) else text)
    if not text or depth > 8:
        return Answer("unreadable", text)
    if number := read_number(text):
        return Answer("value", text, value=number)
    if words := _read_words(text):
        return words
    readers = (_read_choice, _read_congruence, _read_several, _read_brackets, _read_relation, _read_two_signs)
    for read in (*readers, _read_notation):
        if answer := read(text, depth + 1):
            return answer
    return _read_value(text)


def _read_words(text: str) -> Answer | None:
    whole = _WHOLE_TEXT.fullmatch(text)
    words = flat_text(text)
    if _CHOICE.fullmatch(words) or not re.search(r"[^\W\d_]", words) or (not whole and not _WORDS.fullmatch(words)):
        return None
    if _CHOICE_WITH_TEXT.fullmatch(words) or (whole and len(words) < 2):
        return None
    lower = plain_words(words)
    number = number_word(lower)
    is_long = max(map(len, re.split(r"[ '-]", lower))) >= 4 or lower in _SHORT_WORDS or words.istitle()
    if not (whole or number or is_long or _SHORT_WORD.fullmatch(lower)):
        return None  # a product of variables
    return Answer("value", text, value=number) if number else Answer("words", text, mark=lower)


def plain_words(text: str) -> str:
    """Lower case, without a leading article and a final full stop."""
    return _ARTICLE.sub("", flat_text(text).rstrip(".").casefold())


def _read_choice(text: str, depth: int) -> Answer | None:
    plain = _TEXT.sub(r"\1", _CHOICE_AND_VALUE.sub(r"(\1) ", text)).strip()
    if match := _CHOICE.fullmatch(plain):
        return Answer("choice", text, mark=match[1])
    match = _CHOICE_WITH_TEXT.fullmatch(plain)
    if match and not _ANOTHER_CHOICE.fullmatch(match[3]):
        return Answer("choice", text, (_read(match[3].strip("\\ "), depth),), mark=match[1] or match[2])
    return None


def _read_congruence(text: str, depth: int) -> Answer | None:
    r"""``n \equiv 1, 3 \pmod 8``. Without a left side, ``17 \bmod 5`` is a number."""
    match = _CONGRUENCE.fullmatch(text)
    if not match or not match["residues"]:
        return None
    residues, modulus = _read(match["residues"].strip(), depth), (match["braced"] or match["bare"]).strip()
    if match["left"] is None and match["mod"] == r"\bmod":
        dividend = residues.value
        if not isinstance(dividend, Number) or not modulus.isdecimal() or not int(modulus):
            return None
        return Answer("value", text, value=Number(dividend.value % int(modulus)))
    parts = residues.parts if residues.kind == "list" else (residues,)
    left = (match["left"] or "").strip()
    return Answer("congruence", text, parts, mark=modulus) if not left or is_name(left) else None


def _read_several(text: str, depth: int) -> Answer | None:
    sets = split_outside(_MEMBER_OF.sub("", text), _CUP)
    if len(sets) > 1:
        return Answer("union", text, tuple(_read(part.strip(), depth) for part in sets))
    pieces = [piece.strip() for piece in split_outside(text, _SEPARATOR)]
    members = [_read(piece, depth) for piece in pieces if piece] if len(pieces) > 1 else []
    if len(members) == 1:
        return members[0]
    if members:
        is_union = all(
            (member.kind == "brackets" and member.mark != "()") or _ORDER.search(member.text) for member in members
        )
        return Answer("union" if is_union else "list", text, tuple(_unpacked(members)))
    return None


def _unpacked(members: Sequence[Answer]) -> list[Answer]:
    r"""Flatten nested lists: ``0, \pm 2``."""
    return [part for member in members for part in (member.parts if member.kind == "list" else (member,))]


def _read_brackets(text: str, depth: int) -> Answer | None:
    if text == r"\emptyset":
        return Answer("set", text)
    text = _MEMBER_OF.sub("", text)
    if match := SET_OF_ALL.fullmatch(text):
        return _read(match[1].strip(), depth)
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
        if is_name(name) or not name:
            return _read(result, depth)
        return Answer("approximation", text, (_read(name, depth), _read(result, depth)))
    sides = [side.strip() for side in split_outside(text, _EQUALS)]
    if len(sides) > 1 and all(sides):
        last = _read(sides[-1], depth)
        if last.kind == "list" and r"\pm" in text:
            return last
        before = (Answer("unreadable", side) if is_name(side) else _read(side, depth) for side in sides[:-1])
        return Answer("equation", text, (*before, last), mark="=")
    sides = [side.strip() for side in split_outside(text, _ORDER)]
    if 2 <= len(sides) <= 3 and all(sides):
        signs = [sign.strip() for sign in _ORDER.findall(text)]
        return _read_inequality(text, sides, signs, depth) if len(signs) == len(sides) - 1 else None
    return None


def _read_inequality(text: str, sides: list[str], signs: list[str], depth: int) -> Answer | None:
    if len(sides) == 3:
        if (signs[0] in _RISING) != (signs[1] in _RISING):
            return None
        if signs[0] not in _RISING:
            sides, signs = sides[::-1], [FLIPPED[sign] for sign in signs[::-1]]
        return _interval(text, sides[0], signs[0], signs[1], sides[2], depth)
    left, right, sign = sides[0], sides[1], signs[0]
    if len(right) == 1 and right.isalpha():
        left, right, sign = right, left, FLIPPED[sign]
    if len(left) == 1 and left.isalpha() and left not in LETTER.findall(right):
        if sign in _RISING:
            return _interval(text, r"-\infty", "<", sign, right, depth)
        return _interval(text, right, FLIPPED[sign], "<", r"\infty", depth)
    return Answer("inequality", text, (_read(left, depth), _read(right, depth)), mark=sign)


def _interval(text: str, low: str, low_sign: str, high_sign: str, high: str, depth: int) -> Answer:
    mark = ("[" if low_sign == r"\le" else "(") + ("]" if high_sign == r"\le" else ")")
    return Answer("brackets", text, (_read(low, depth), _read(high, depth)), mark=mark)


def _read_two_signs(text: str, depth: int) -> Answer | None:
    signs = _TWO_SIGNS.findall(text)
    if not 1 <= len(signs) <= 2:
        return None
    plus = _TWO_SIGNS.sub(lambda sign: "+" if sign[0] == r"\pm" else "-", text)
    minus = _TWO_SIGNS.sub(lambda sign: "-" if sign[0] == r"\pm" else "+", text)
    return Answer("list", text, tuple(_read(each.strip().removeprefix("+").strip(), depth) for each in (plus, minus)))


def _read_notation(text: str, depth: int) -> Answer | None:
    """Read clock times, ratios and numbers with a base."""
    bare, unit = split_unit(text)
    match = _CLOCK.fullmatch(bare)
    if match and _is_clock(int(match[1]), match[2], unit):
        return Answer("clock", text, mark=f"{int(match[1])}:{match[2]}", unit=unit)
    if _RATIO.fullmatch(bare):
        terms = [Fraction(term.strip()) for term in bare.split(":")]
        if terms[0]:
            return Answer("ratio", text, mark=":".join(str(term / terms[0]) for term in terms))
    if match := _BASE.fullmatch(bare):
        base = int(match[2] or match[3])
        if 2 <= base <= 36 and (base > 10 or match[1].isdecimal()):
            return Answer("base", text, mark=f"{match[1].lstrip('0') or '0'}_{base}")
    return None


def _is_clock(hour: int, minutes: str, unit: Unit) -> bool:
    """Heuristic to distinguish 3:45 from a ratio: times are mostly multiples of five minutes."""
    return hour <= 24 and int(minutes) <= 59 and (bool(unit.measures) or minutes[0] == "0" or int(minutes) % 5 == 0)


def _read_value(text: str) -> Answer:
    bare, unit = split_unit(text)
    if bare != text:
        inner = _read(bare, depth=4)
        return replace(inner, text=text, unit=unit if unit.measures else inner.unit)
    percent = bare.endswith(r"\%")
    if _LONG_WORD.search(_NO_WORDS.sub("", bare)) or _WORD_AMONG_SYMBOLS.search(bare):
        return Answer("text", text)
    value = read_formula(bare.removesuffix(r"\%").strip() if percent else bare)
    if isinstance(value, Number) and percent:
        value = value._replace(is_percent=True)
    if value is None:
        return Answer("text" if _CONTENT.search(_COMMAND.sub("", text)) else "unreadable", text)
    return Answer("value", text, value=value)


def tells_a_value(text: str) -> bool:
    """Whether the right side of an equation with this left side is an answer; in 2x + 1 = 7 it is not."""
    if is_name(text) or _QUANTITY.fullmatch(text) or _OF_NAMES.fullmatch(text):
        return True
    return not re.search(r"[a-zA-Z\\]", _NUMERIC_COMMANDS.sub("", text))


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None
