r"""Where in a response the final answer stands: in its last box, or behind "the answer is", or at its end."""

from __future__ import annotations

import re

_BOX_TAIL = 20_000
"""Characters from the end that are searched for a box. The conclusion stands there; the search is linear."""
_PLAIN_TAIL = 2_000
"""Characters from the end that are searched where there is no box."""
MAX_ANSWER = 1_000
"""A longer text is no final answer."""

_BOX_OR_BRACE = re.compile(r"\\+f?boxe?d?\s*\{|\\.|[{}]", re.DOTALL)
_BOX_START = re.compile(r"\\+(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$.]*(?:,|;|,?\s*(?:\\text\{)?\s*(?:and|or)\s*\}?)[\s$]*")
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANNOUNCED = re.compile(
    r"\b(?:answers?|correct (?:option|choice))\b[ \t]*(?:is|are|would be|equals|=|:)(?:[ \t]*:)?\**[ \t]*\n?",
    re.IGNORECASE,
)
_FORMULA = re.compile(
    r"\$\$(?P<a>[^$]{1,1000})\$\$|\\\[(?P<b>(?:[^\\]|\\(?!\])){1,1000})\\\]|"
    r"(?<![\\\d])\$(?P<c>[^$\n]{1,1000})(?<!\\)\$|\\\((?P<d>(?:[^\\\n]|\\(?!\))){1,1000})\\\)"
)
_BETWEEN_FORMULAS = re.compile(r"\s*(?:,|,?\s*(?:and|or))\s*")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_NUMBER = re.compile(
    r"(?<![\w.\\{^_])[-−–]?[$€£]?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w))?"
    r"(?:\s*/\s*\d+)?(?:\s?(?:\\?%|percent))?(?![\w{}])"
)
_DECORATION = " \t\n*_`\"'​‌‍﻿"


def final_answer(response: str) -> str:
    r"""The text of the final answer; "" where none is found, or it is longer than ``MAX_ANSWER``.

    The last complete ``\boxed{...}`` counts and nothing else where there is one; boxes joined by "and", "or" or a comma
    are one list, so that boxing several answers does not pay. Without a box: ``<answer>...</answer>``, ``#### ...``,
    what follows the last "answer is", and at last the last formula of the closing paragraph or number of the closing
    sentence.
    """
    boxed = _boxed(response[-_BOX_TAIL:])
    text = _unboxed(response[-_PLAIN_TAIL:]) if boxed is None else boxed
    return text if len(text) <= MAX_ANSWER else ""


def boxed_or_bare(text: str) -> str:
    """The gold answer without the box around it, or what stands before it."""
    if "#### " in text:
        text = text.rpartition("####")[2]
    boxed = _boxed(text[-_BOX_TAIL:]) if "box" in text else None
    return (text if boxed is None else boxed).strip()


def _boxed(text: str) -> str | None:
    boxes: list[tuple[int, int, int]] = []  # where the command, the content and the closing brace stand; outermost only
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
    last = len(boxes) - 1
    while last and _BETWEEN_BOXES.fullmatch(text[boxes[last - 1][2] + 1 : boxes[last][0]][:40]):
        last -= 1
    contents = list(dict.fromkeys(text[content:end].strip() for _, content, end in boxes[last:]))
    joined = r" \text{ and } ".join(contents)
    if len(joined) > MAX_ANSWER:
        return joined
    inner = _boxed(joined) if _BOX_START.search(joined) else None
    return joined if inner is None else inner


def _unboxed(text: str) -> str:
    for pattern in (_TAGGED, _HASHES):
        if found := pattern.findall(text):
            return str(found[-1]).strip(_DECORATION)
    announcements = list(_ANNOUNCED.finditer(text))
    if announcements:
        return _announced(text[announcements[-1].end() :])
    paragraph = text.rstrip().rpartition("\n\n")[2]
    formulas = list(_FORMULA.finditer(paragraph))
    sentence = _last_sentence(paragraph)
    number = _last_number(sentence)
    if formulas and (not number or formulas[-1].end() > paragraph.rfind(number)):
        return _joined(paragraph, formulas, len(formulas) - 1)
    return number


def _announced(text: str) -> str:
    text = text.lstrip(_DECORATION + ":")
    formulas = list(_FORMULA.finditer(text))
    if formulas and formulas[0].start() == 0:
        last = 0
        while last + 1 < len(formulas) and _BETWEEN_FORMULAS.fullmatch(
            text[formulas[last].end() : formulas[last + 1].start()]
        ):
            last += 1
        return _joined(text, formulas[: last + 1], last)
    end = _SENTENCE_END.search(text)
    sentence = (text[: end.start()] if end else text).strip(_DECORATION)
    if len(sentence.split()) <= 4:
        return sentence
    if formulas and (not end or formulas[0].start() < end.start()):
        return _content(formulas[0])
    return _last_number(sentence)


def _joined(text: str, formulas: list[re.Match[str]], last: int) -> str:
    """The formula at ``last`` with those before it that are joined to it by "and", "or" or a comma."""
    first = last
    while first and _BETWEEN_FORMULAS.fullmatch(text[formulas[first - 1].end() : formulas[first].start()]):
        first -= 1
    return r" \text{ and } ".join(_content(formula) for formula in formulas[first : last + 1])


def _content(formula: re.Match[str]) -> str:
    return next(content for content in formula.groups() if content is not None).strip()


def _last_sentence(text: str) -> str:
    pieces = [piece for piece in _SENTENCE_END.split(text) if piece.strip(_DECORATION)]
    return pieces[-1] if pieces else ""


def _last_number(sentence: str) -> str:
    numbers = _NUMBER.findall(sentence)
    return numbers[-1].strip() if numbers else ""
