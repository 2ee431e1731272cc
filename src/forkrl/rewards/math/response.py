"""Finds the final answer in a response: in its last box, after "the answer is", or at its end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from forkrl.rewards.math.notation import plain_notation
from forkrl.rewards.math.units import split_unit
from forkrl.rewards.reply import reply_of, strip_turn_end

_BOX_TAIL = 20_000
"""Characters at the end searched for a box, in linear time."""
_PLAIN_TAIL = 2_000
"""Characters at the end searched if there is no box."""
MAX_ANSWER = 1_000

_BOX_OR_BRACE = re.compile(r"\\+f?boxe?d?\s*\{|\\.|[{}]", re.DOTALL)
_BOX_START = re.compile(r"\\+(?:boxed|fbox)\s*\{")
_BARE_BOX = re.compile(
    r"(\\boxed)\s*(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[a-zA-Z](?![a-zA-Z])|\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})"
)
_SEPARATOR = (
    r"(?:[,;&、]|\\\\|\\q?quad|\\l?or(?![a-zA-Z])|\\land|\\wedge|\\vee"
    r"|(?:\\text\{)?\s*(?:and|or|und|oder|et|ou|y|o|и|или|和|或|以及)(?![a-zA-Z])\s*\}?)"
)
_BETWEEN_BOXES = re.compile(rf"[\s$.]*,?\s*{_SEPARATOR}[\s$]*")
_BETWEEN_NAMED_BOXES = re.compile(rf"(?:[\s$.]|\\[()\[\]]|{_SEPARATOR})*")
_NAME_BEFORE = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z](?:_\w|_\{\w+\}|')?)\s*&?\s*=\s*&?\s*$")
_OR_BETWEEN = re.compile(r"\\l?or(?![a-zA-Z])|\\vee|\b(?:or|oder|ou|o|или)\b|或")
_BEHIND_BOX = re.compile(
    r"\s*(\\%|%|\^\s*\{?\\circ\}?|(?:\\[,;:! ]|~|\s)*"
    r"\\(?:text|mathrm|textrm)\{[^{}]*\}(?:\^\d|\^\{-?\d\})?)"
)
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANNOUNCED = re.compile(
    r"(?:\b(?:answers?|correct (?:option|choice))\b[ \t*_]*(?:is|are|would be|equals|=|:)"
    r"|\b(?:respuesta|resposta)(?: (?:final|correcta|correta))?(?: (?:es|é)\b|[ *]*:)"
    r"|\br[ée]ponse(?: finale)?(?: est\b|[ *]*:)"
    r"|\bantwort(?: (?:ist|lautet)\b|[ *]*:)|\brisposta(?: finale)?(?: è\b|[ *]*:)"
    r"|\bответ[ *]*(?::|[-—])|答案(?:选项)?[ *]*(?:是|为|為|[:：])"
    r"|(?<!不)(?:(?:答案|故|应|应该|因此)选|选项[是为]|选[:：])[ *]*[:：]?(?=[ *]*\(?[A-J])|答[:：]|答えは|答え[:：]"
    r"|(?:정답|답)(?:은|:))"
    r"(?:[ \t]*[:：])?[ \t]*\n?",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(?<![*\w])\*\*(?=[^\s*])([^*\n]{1,200}?)(?<=[^\s*])\*\*(?!\*)")
_PROSE = re.compile(r"(?:(?<![\\a-zA-Z{])[a-zA-Z]{2,}[ ,]+){2,}", re.ASCII)
_FORMULA = re.compile(
    r"\$\$(?P<a>[^$]{1,1000})\$\$|\\\[(?P<b>(?:[^\\]|\\(?!\])){1,1000})\\\]|"
    r"(?<![\\\d])\$(?P<c>[^$\n]{1,1000})(?<!\\)\$|\\\((?P<d>(?:[^\\\n]|\\(?!\))){1,1000})\\\)"
)
_BETWEEN_FORMULAS = re.compile(r"\s*(?:,|,?\s*(?:and|or))\s*")
_ALTERNATIVES = re.compile(
    r"(?<![a-zA-Z\\])([a-zA-Z]\s*=\s*-?\d[\d./]*(?:\s*,?\s*(?:or\b|\\lor\b)\s*(?:[a-zA-Z]\s*=\s*)?-?\d[\d./]*)+)[\s.$]*\Z"
)
"""Such as "x = 2 or x = 5" at the end of a sentence."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]|\n")
_NUMBER = re.compile(
    r"(?<![a-zA-Z0-9_.\\{^])[-−–]?[$€£]?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w))?"
    r"(?:\s*/\s*\d+)?(?:\s?(?:\\?%|percent))?(?![a-zA-Z0-9_{}])"
)
_CJK_PROSE = re.compile(r"[^\x00-\x7f]{2}")
_DECORATION = " \t\n*_`\"'​‌‍﻿"


def final_answer(response: str) -> str:
    r"""The text of the final answer; "" if none is found or it exceeds ``MAX_ANSWER``.

    Only the last complete ``\boxed{...}`` counts; boxes joined by "and", "or" or a comma form one list, so boxing
    several guesses does not help. Without a box: ``<answer>...</answer>``, ``#### ...``, the text after the last
    "answer is", or the last formula of the closing paragraph or number of the closing sentence.
    """
    response = reply_of(response)
    boxed = boxed_answer(response)
    text = _unboxed(response[-_PLAIN_TAIL:]) if boxed is None else boxed
    return text if len(text) <= MAX_ANSWER else ""


def boxed_answer(reply: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}`` and of boxes joined with it; None without a box."""
    return _boxed(reply[-_BOX_TAIL:])


def boxed_or_bare(text: str) -> str:
    """The gold answer without its box and the text before it."""
    if "#### " in text:
        text = text.rpartition("####")[2]
    boxed = boxed_answer(text) if "box" in text else None
    return (text if boxed is None else boxed).strip()


def _boxed(text: str) -> str | None:
    text = _BARE_BOX.sub(r"\1{\2}", text) if "\\boxed" in text else text
    boxes: list[tuple[int, int, int]] = []  # starts of command and content, closing brace; outermost only
    opened: list[tuple[int, int] | None] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match[0]
        if token == "}" and opened:
            begin = opened.pop()
            if begin:
                while boxes and boxes[-1][0] > begin[0]:
                    boxes.pop()
                boxes.append((*begin, match.start()))
        elif token.endswith("{") and token != "\\{":
            opened.append((match.start(), match.end()) if _BOX_START.fullmatch(token) else None)
    if not boxes:
        return None
    joined = _joined_boxes(text, boxes)
    if len(joined) > MAX_ANSWER:
        return joined
    inner = _boxed(joined) if _BOX_START.search(joined) else None
    return joined if inner is None else inner


def _joined_boxes(text: str, boxes: Sequence[tuple[int, int, int]]) -> str:
    r"""The last box, with earlier boxes of the same answer and the names in ``x=\boxed{2}``."""
    names = [_NAME_BEFORE.search(text[max(0, start - 40) : start]) for start, _, _ in boxes]
    first, joint = len(boxes) - 1, " and "
    while first:
        between = gap = text[boxes[first - 1][2] + 1 : boxes[first][0]]
        pattern, name = _BETWEEN_BOXES, names[first]
        if name and names[first - 1]:
            pattern, gap = _BETWEEN_NAMED_BOXES, between[: len(between) - len(name[0])]
        if len(between) > 80 or not pattern.fullmatch(gap):
            break
        joint = " or " if _OR_BETWEEN.search(between) else joint
        first -= 1
    if first == len(boxes) - 1:
        _, content, end = boxes[first]
        match = _BEHIND_BOX.match(text, end + 1)
        behind = match[1] if match else ""
        is_unit = "%" in behind or split_unit(plain_notation("1" + behind))[1].measures not in ("", "?")
        return text[content:end].strip() + (behind if is_unit else "")
    contents = [
        (f"{name[1]}=" if name else "") + text[content:end].strip()
        for name, (_, content, end) in zip(names[first:], boxes[first:], strict=True)
    ]
    return rf" \text{{{joint}}} ".join(dict.fromkeys(contents))


def _unboxed(text: str) -> str:
    if found := _TAGGED.findall(text):
        content = strip_turn_end(str(found[-1])).strip(_DECORATION)
        return _stated(content) if _ANNOUNCED.search(content) or _PROSE.search(content) else content
    if found := _HASHES.findall(text):
        return str(found[-1]).strip(_DECORATION)
    return _stated(text)


def _stated(text: str) -> str:
    if announcements := list(_ANNOUNCED.finditer(text)):
        return _announced(text[announcements[-1].end() :])
    paragraph = text.rstrip().rpartition("\n\n")[2]
    formulas = list(_FORMULA.finditer(paragraph))
    sentence = _last_sentence(paragraph)
    if bold := [content for content in _BOLD.findall(sentence) if _is_answer(content)]:
        return _undressed(bold[-1])
    if either := _ALTERNATIVES.search(sentence):
        return either[1]
    number = _last_number(sentence)
    if formulas and (not number or formulas[-1].end() > paragraph.rfind(number)):
        return _joined(paragraph, formulas)[-1]
    return number


def _is_answer(bold: str) -> bool:
    return bool(_NUMBER.fullmatch(bold.strip(" .,")) or _FORMULA.fullmatch(bold.strip(" .,")))


def _undressed(bold: str) -> str:
    formula = _FORMULA.fullmatch(bold.strip(" .,"))
    return _content(formula) if formula else bold.strip(_DECORATION)


def _announced(text: str) -> str:
    bold = _BOLD.match(text.lstrip())
    if bold and (_is_answer(bold[1]) or not re.match(r"[ \t]*[$\\\w=]", text.lstrip()[bold.end() :])):
        return _undressed(bold[1])
    text = text.lstrip(_DECORATION + ":")
    formulas = list(_FORMULA.finditer(text))
    if formulas and formulas[0].start() == 0:
        return _joined(text, formulas)[0]
    end = _SENTENCE_END.search(text)
    sentence = (text[: end.start()] if end else text).strip(_DECORATION)
    if len(sentence.split()) <= 4:
        return (_last_number(sentence) if _CJK_PROSE.match(sentence) else "") or sentence
    if formulas and (not end or formulas[0].start() < end.start()):
        return _content(formulas[0])
    return _last_number(sentence)


def _joined(text: str, formulas: list[re.Match[str]]) -> list[str]:
    """The formulas, with those joined by "and", "or" or a comma merged."""
    runs: list[list[str]] = []
    end = 0
    for formula in formulas:
        if runs and _BETWEEN_FORMULAS.fullmatch(text[end : formula.start()]):
            runs[-1].append(_content(formula))
        else:
            runs.append([_content(formula)])
        end = formula.end()
    return [r" \text{ and } ".join(run) for run in runs]


def _content(formula: re.Match[str]) -> str:
    return next(content for content in formula.groups() if content is not None).strip()


def _last_sentence(text: str) -> str:
    return next((piece for piece in reversed(_SENTENCE_END.split(text)) if piece.strip(_DECORATION)), "")


def _last_number(sentence: str) -> str:
    numbers: list[str] = _NUMBER.findall(sentence) or [""]
    return numbers[-1].strip()
