r"""Removes fonts, colours, sizes, Markdown and equation alignment; unifies separators.

``\lor``, ``\quad``, line breaks and "or"/"and" in several languages become commas, ``\text{ or }``, ``\text{ and }``.
"""

from __future__ import annotations

import re

_SIZES = "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
_SWITCHES = (
    rf"{_SIZES}|bf|rm|it|sf|tt|sc|em|bfseries|mdseries|itshape|upshape|boldmath|displaystyle|textstyle|scriptstyle"
    "|scriptscriptstyle|limits|nolimits|hfill|centering|strut|checkmark|square|blacksquare|bigstar"
)
_AROUND = "underline|uline|uwave|emph|mathnormal|ensuremath|mathbin|mathord|mathstrut|mathop|boxed|fbox|framebox|smash"
_COLOUR = r"\\(?:textcolor|colorbox|color)\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\}\s*"
_NESTED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^\s*(\*\*|__|\*|_|`+|'+|\"+)(.+)\1\s*$", r"\2"),  # **17**, `17`
        (r"\\(?:label|tag\*?|hspace\*?|vspace\*?|[hv]?phantom|mathstrut)\s*\{[^{}]*\}", " "),
        (r"\{\s*\\(?:rm|bf|it|sf|tt)(?![a-zA-Z])\s*([^{}\\]*)\}", r"\\text{\1}"),
        (_COLOUR, ""),
        (rf"\\(?:{_SWITCHES})(?![a-zA-Z])\s*", ""),
    )
]
_WRAPPED = re.compile(rf"\\(?:{_AROUND})\s*{_NESTED}")
_SIMPLE = re.compile(r"-?[\d.,]+|[a-zA-Z]")
_ALIGNED = re.compile(
    r"(?:\\left)?\s*(?:\\\{|\\lbrace)?\s*\\begin\s*\{(?P<name>cases|aligned|align\*?|gathered|gather\*?|array|split)\}"
    r"(?:\s*(?:\[\w*\]|\{[lcr\s]*\}))?(?P<rows>(?:(?!\\begin|\\end).)*)\\end\s*\{(?P=name)\}(?:\s*\\right\s*\.)?",
    re.DOTALL,
)
_ROW_END = re.compile(r"\\\\(?:\s*\[[^\[\]]*\])?")
_NEW_ROW = re.compile(r"\\\\\s*(?=[a-zA-Z](?:'|_\w|_\{\w+\})?\s*(?:=|<|>|\\(?:le|ge|in)))")
_QUAD = re.compile(r"\\q?quad(?![a-zA-Z])")
_AT_SEPARATOR = re.compile(r"[,;]$|\\(?:lor|vee|land|wedge|text\s*\{[^{}]*\})$|(?:^|\s)(?:and|or)$")
_STARTS_SEPARATOR = re.compile(
    r"[,;]|\\(?:lor|vee|land|wedge|text|mathrm|mbox|pmod|bmod|mod|rm)(?![a-zA-Z])|\(|(?:and|or)\b"
)
_OR, _AND = r"\text{ or }", r"\text{ and }"
_OR_WORDS = "or|oder|ou|oppure|или|або|veya|lub|of|eller|或者?|または|又は|もしくは|또는"
_AND_WORDS = "and|und|et|и|та|ve|oraz|en|och|和|以及|与|及|且|並びに|そして|과|와|및|그리고"
_JOINTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:lor|vee)(?![a-zA-Z])", _OR),
        (r"\\(?:land|wedge)(?![a-zA-Z])|\\&", _AND),
        (rf"\\(?:text|mathrm|mbox|textrm|textnormal|rm)\s*\{{[\s,]*(?:{_OR_WORDS})[\s,]*\}}", _OR),
        (rf"\\(?:text|mathrm|mbox|textrm|textnormal|rm)\s*\{{[\s,]*(?:{_AND_WORDS})[\s,]*\}}", _AND),
        (r"\\text\s*\{\s+[oó]\s+\}|(?<=\s)\\text\s*\{\s*[oó]\s*\}(?=\s|\\ )", _OR),
        (r"\\text\s*\{\s+[yei]\s+\}", _AND),
        (r"(?<![a-zA-Z\\{])(?:oder|oppure|или|veya)(?![a-zA-Z])|或者?|または|又は|もしくは|또는", _OR),
        (
            r"(?<![a-zA-Z\\{])(?:und|oraz)(?![a-zA-Z])|(?<=[\d\s}$])(?:和|以及|与|及|且|과|와|と)(?=[\d\s\\a-zA-Z$-])",
            _AND,
        ),
    )
]


def without_markup(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    while (unwrapped := _WRAPPED.sub(_unwrapped, text)) != text:
        text = unwrapped
    text = _ALIGNED.sub(_rows_joined, text)
    text = _NEW_ROW.sub(", ", text)
    for pattern, replacement in _JOINTS:
        text = pattern.sub(lambda _, joint=replacement: joint, text)  # type: ignore[misc]
    return _quads_as_commas(text) if "quad" in text else text


def _unwrapped(command: re.Match[str]) -> str:
    return command[1] if _SIMPLE.fullmatch(command[1].strip()) else f"{{{command[1]}}}"


def _rows_joined(environment: re.Match[str]) -> str:
    """Rows of equations as a list; a matrix or a function by cases stays unchanged."""
    rows = [row.replace("&=", "=").replace("& =", "=").replace("=&", "=").strip(" ,;&\n") for row in
            _ROW_END.split(environment["rows"])]  # fmt: skip
    rows = [row for row in rows if row]
    if not rows or any(row.count("=") != 1 or "&" in row for row in rows):
        return environment[0]
    return ", ".join(rows)


def _quads_as_commas(text: str) -> str:
    r"""``x=2 \quad y=3`` as a list; next to a separator, word or bracket, ``\quad`` is only a space."""
    pieces = [piece.strip() for piece in _QUAD.split(text)]
    joined = pieces[0]
    for piece in pieces[1:]:
        apart = joined and piece and not _AT_SEPARATOR.search(joined) and not _STARTS_SEPARATOR.match(piece)
        joined += (", " if apart else " ") + piece
    return joined.strip()
