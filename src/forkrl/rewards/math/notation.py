r"""Normalises notation: ``½``, ``\dfrac12`` and ``\frac {1} {2}`` become the same text.

Input is a final answer of bounded length, so patterns may take quadratic time.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from forkrl.rewards.math.markup import without_markup
from forkrl.rewards.math.phrases import with_phrases_read

_CHARACTERS = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
    "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "°": r"^\circ ", "⟨": "(", "⟩": ")",
    "∨": r"\lor ", "∧": r"\land ", "≡": r"\equiv ", "℃": r"^\circ C",
    "％": "%", "，": ",", "、": ",", "。": ".",
    "…": r"\ldots ", "−": "-", "∶": ":", "∣": "|", "→": r"\to ", "⇒": r"\Rightarrow ",
}  # fmt: skip
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+|[a-zA-Z]))")

_TEXT_COMMANDS = (
    r"text(?:bf|it|rm|sf|tt|sc|sl|md|up|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname\*?|boldsymbol|pmb|bm"
    r"|unit"
)
_REPEATING = r"\\(?:overline|bar|overbar)\s*(?:\{\s*(\d+)\s*\}|(\d))"
_DOTTED = r"\\dot\s*(?:\{\s*(\d)\s*\}|(\d))"
_ABOVE = r"(?:(?P<a>\d+)|\{\s*(?P<a2>\d+)\s*\})"
_CHOSEN = r"(?:(?P<c>\d+)|\{\s*(?P<c2>\d+)\s*\})"
_END = r"((?:[^\[\](),;]|\([^()]*\))*)"


def _with_bar(dotted: re.Match[str]) -> str:
    places, *repeating = dotted.groups()
    return rf"{places}\overline{{{''.join(filter(None, repeating))}}}"


def _binomial(match: re.Match[str]) -> str:
    """``C_{10}^3``; if the lower number is below 2 or less than the upper, C is a variable."""
    above, chosen = (int(match["a"] or match["a2"]), int(match["c"] or match["c2"]))
    return rf"\binom{{{above}}}{{{chosen}}}" if 2 <= above >= chosen else match[0]


def _cis(match: re.Match[str]) -> str:
    angle = match[1].strip()
    if degrees := re.fullmatch(r"[({]?\s*(\d{1,6})\s*\^\\circ\s*[)}]?", angle):
        half_turns = Fraction(int(degrees[1]), 180)
        angle = rf"\frac{{{half_turns.numerator}\pi}}{{{half_turns.denominator}}}"
    return rf"e^{{i\cdot ({angle})}}"


def _with_usual_brackets(interval: re.Match[str]) -> str:
    """]a, b[ as (a, b)."""
    opening, left, separator, right, closing = interval.groups()
    if not left.strip() or not right.strip():
        return interval[0]  # between two intervals
    return opening.replace("]", "(") + left + separator + right + closing.replace("[", ")")


_SYNONYMS = {
    name: symbol
    for names, symbol in (
        ("dfrac tfrac cfrac nicefrac xfrac sfrac flatfrac", r"\frac"),
        ("leq leqslant le", r"\le "),
        ("geq geqslant ge", r"\ge "),
        ("lvert rvert vert", "|"),
        ("langle lparen", "("),
        ("rangle rparen", ")"),
    )
    for name in names.split()
} | {
    "lbrack": "[", "rbrack": "]", "lbrace": r"\{", "rbrace": r"\}", "lt": "<", "gt": ">", "neq": r"\ne ",
    "cong": r"\equiv ", "bigcup": r"\cup ", "bigcap": r"\cap ", "varnothing": r"\emptyset", "lg": r"\log_{10}",
}  # fmt: skip
_ROWS = re.compile(r"matrix|array|cases")
_DOUBLED_BACKSLASH = re.compile(r"\\\\(?=[a-zA-Z])")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\text\{\s*\\?\$\s*(\}?)", lambda money: r"\$" if money[1] else r"\$\text{"),
        (r"^\s*\$\s*(?=\d[\d.,]*$)", r"\\$"),  # $ 18.00
        (r"(?<=\d)(?:\{,\}|,\s*\\!|\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),  # thousands
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
        (r"\\!", ""),
        (rf"\\({'|'.join(_SYNONYMS)})(?![a-zA-Z])", lambda command: _SYNONYMS[command[1]]),
        (r"\\\\\s*\[[^\[\]]*\]", r"\\\\"),  # extra space between rows
        (r"(?<!\\)\\[,;:> ]|~", " "),
        (r"\\colon(?![a-zA-Z])|\{:\}|\\text\s*\{\s*:\s*\}", ":"),
        (r"\\[lc]?dots[cbmio]?(?![a-zA-Z])|(?<!\.)\.\.\.(?!\.)", r"\\ldots "),
        (r"(?<=\d)\{,\}(?=\d)", "."),  # a decimal comma: the thousands are gone
        (rf"\\(?:{_TEXT_COMMANDS})\s*\{{", r"\\text{"),
        (r"\\text\{\s*([^{}]*?)\s*\}", r"\\text{\1}"),
        (r"(?<=[\d.])\s*(?:\\text\{E\}|E(?=\s*\{))\s*\{?\s*([-+]?\d+)\s*\}?", r"e\1"),
        (r"\\text\{([-+]?[\d.,/]*\d|[ei])\}|\\text\{infinity\}", lambda m: m[1] or r"\infty"),
        (r"\\text\{([-+]?\d[\d.,/]*) ([^{}\d]*)\}$", r"\1 \\text{\2}"),  # \text{12 cm}
        (rf"(\.\d*?){_REPEATING}", lambda m: rf"{m[1]}\overline{{{m[2] or m[3]}}}"),
        (
            rf"(\.\d*){_DOTTED}(?:(\d*){_DOTTED})?",
            lambda m: rf"{m[1]}\overline{{{''.join(filter(None, m.groups()[1:]))}}}",
        ),
        (r"(?<=\.)(\d*)\((\d+)\)$", r"\1\\overline{\2}"),
        (r"(?<=\.)(\d*?)(?:(\d)\2\2+|(\d{2,6}?)\3+)\s*\\ldots\s*$", r"\1\\overline{\2\3}"),
        (r"\\text\{(?:percent|percentage|\\?%)\}|(?<![a-zA-Z])percent(?:age)?(?![a-zA-Z])|(?<!\\)%", r"\\%"),
        (r"(?<!\\)\$|(?<!\\)\\[()\[\]]", ""),
        (r"<=|=<", r"\\le "),
        (r">=", r"\\ge "),
        (r"\*\*", "^"),
        (r"\*|\\ast(?![a-zA-Z])", r"\\cdot "),
        (r"(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])|\\infin(?![a-zA-Z])", r"\\infty"),
        (
            r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![a-zA-Z]))|\\(?:text)?degree(?![a-zA-Z])",
            r"^\\circ",
        ),
        (r"(?<=\d)\s*\^\s*(?:\{\s*(?:\\text\{o\}|o)\s*\}|\\text\{o\}|o(?![a-zA-Z]))", r"^\\circ"),
        (r"(\\sqrt|[\^_])\s*\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\1{\\frac{\2}{\3}}"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"(?<![a-zA-Z\\])sqrt(?![a-zA-Z])", r"\\sqrt"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\frac\s*(\\pi|[0-9a-zA-Z])", r"\\frac{\1}"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\\pi|[0-9a-zA-Z])", r"\\frac\1{\2}"),
        (r"\\frac\s+\{", r"\\frac{"),
        (r"(\\frac\{[^{}]*\})\s+\{", r"\1{"),
        (r"\^\s*(-?\d{2,}|-\d)", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"^([^{}]*)\\choose(?![a-zA-Z])([^{}]*)$", r"\\binom{\1}{\2}"),
        (rf"(?:\\text\{{C\}}|(?<![a-zA-Z\\])C)\s*_\s*{_ABOVE}\s*\^\s*{_CHOSEN}", _binomial),
        (rf"(?:\\text\{{C\}}|(?<![a-zA-Z\\])C)\s*\^\s*{_CHOSEN}\s*_\s*{_ABOVE}", _binomial),
        (rf"(?:^|\{{\s*\}})\s*[_^]\s*{_ABOVE}\s*(?:C|\\text\{{C\}})\s*_\s*{_CHOSEN}", _binomial),
        (r"(?<![a-zA-Z\\])C\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)", r"\\binom{\1}{\2}"),
        (r"\\log\s*_\s*(?:e(?![a-zA-Z])|\{\s*e\s*\})", r"\\ln "),
        (r"\\text\{cis\}\s*(.*)$", _cis),
        # Must run last: these see the output of all other rules.
        (rf"([(\[\]]){_END}([,;]){_END}([)\[\]])", _with_usual_brackets),
    )
]
_POWER_IN_TEXT = re.compile(r"(\\text\{[^{}]*)\^\{(-?\d+)\}")
_GROUPED = re.compile(
    r"(?<![\d.,/^_])(?:(?<!\d )\d{1,3}(?:,\d{3})+(?!\d|,\d)"
    r"|(?<!\d )\d{1,3}(?: \d{3})+(?=\s*(?:\.\d|\\text|\\%|[a-zA-Z])))"
)
_OPENING = re.compile(r"^(?:[\s:=*]|\\#(?=\s*\d)|\\approx(?![a-zA-Z])|\+(?=[\d.\\]))+")
_CLOSING = re.compile(r"(?:[\s.,;:*]|\\\\|(?<!\\)\\(?=$))+$")
_BRACKET = re.compile(r"\\[^{}]|[()\[\]{}]")
_CHANGE_OF_DEPTH = dict.fromkeys("([{", 1) | dict.fromkeys(")]}", -1)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_SPACES = re.compile(r"\s+")
_ALREADY_PLAIN = re.compile(r"-?(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})", re.ASCII)
"""Fast path for most answers."""
_PLAIN = re.compile(r"[\w./(), -]*\w", re.ASCII)


def plain_notation(text: str) -> str:
    """Normalised ASCII text without spacing commands, dollar signs and closing punctuation."""
    if _ALREADY_PLAIN.fullmatch(text):
        return text
    text = without_markup(_CONTROL.sub("", text))
    if not text.isascii():
        text = _to_ascii(text)
    if not _PLAIN.fullmatch(text) or "sqrt" in text or "inf" in text or "percent" in text or ".." in text:
        if not _ROWS.search(text):
            text = _DOUBLED_BACKSLASH.sub(r"\\", text)
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        while (flat := _POWER_IN_TEXT.sub(r"\1^\2", text)) != text:
            text = flat
        text = _CLOSING.sub("", _OPENING.sub("", text))
    text = _SPACES.sub(" ", text).strip()
    while text.startswith("{") and closing_place(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return with_phrases_read(text)


def without_thousands(text: str) -> str:
    """8000 for 8,000 outside brackets; (1,234) and 1, 234 stay two numbers."""
    if "," not in text and " " not in text:
        return text
    pieces, place = [], 0
    while place < len(text):
        opened = re.compile(r"[(\[]|\\\{").search(text, place)
        start = opened.start() if opened else len(text)
        pieces.append(_GROUPED.sub(lambda number: re.sub("[, ]", "", number[0]), text[place:start]))
        end = closing_place(text, opened.end() - 1) if opened else -1
        place = len(text) if end < 0 else end + 1
        pieces.append(text[start:place])
    return "".join(pieces)


def _to_ascii(text: str) -> str:
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + "".join(map(_SUPERSCRIPTS.__getitem__, run[0])) + "}", text)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2] or root[3]}}}", text)
    return "".join(character if character.isascii() else _one_to_ascii(character) for character in text)


def _one_to_ascii(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category.startswith("Z"):
        return " "
    if category in ("Cf", "Cc", "Cs", "Cn"):  # invisible: joiners, direction marks, surrogates
        return ""
    folded = unicodedata.normalize("NFKC", character)
    if "⁄" in folded:  # ½
        top, _, bottom = folded.partition("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}"
    return folded


def closing_place(text: str, start: int) -> int:
    """The index where the bracket at ``start`` closes, or -1. Bracket types may differ, as in intervals."""
    depth = 0
    for token in _BRACKET.finditer(text, start):
        depth += _CHANGE_OF_DEPTH.get(token[0], 0)
        if depth == 0:
            return token.start()
    return -1


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """The pieces between matches of ``separator`` that are outside all brackets."""
    pieces, depth, begin, place = [], 0, 0, 0
    while place < len(text):
        if depth == 0 and (match := separator.match(text, place)) and match[0]:
            pieces.append(text[begin:place])
            begin = place = match.end()
            continue
        token = _BRACKET.match(text, place)
        depth = max(0, depth + _CHANGE_OF_DEPTH.get(token[0], 0)) if token else depth
        place = token.end() if token else place + 1
    return [*pieces, text[begin:]]
