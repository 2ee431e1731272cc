"""Text that a model wrote, made safe to look at: nothing in it may act, hide or reorder what stands beside it."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

# Control, format (bidi overrides, zero-width), lone surrogate, private use, unassigned, line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_HTML_IN_JSON = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def visible(text: str) -> str:
    """Replace every character that acts without being seen by a picture or its code point; keep newlines.

    >>> visible("\\x1b[31mred")
    '␛[31mred'
    """
    return text if text.isascii() and text.isprintable() else "".join(_visible_character(c) for c in text)


def visible_token(token: str) -> str:
    """A token as the fork view shows it: newlines and tabs leave a mark, an empty token is a mark itself."""
    return visible(token.replace("\t", "⇥")).replace("\n", "⏎\n") or "⟨⟩"


def script_json(data: Any) -> str:
    """JSON fit for ``<script type="application/json">``: pure ASCII, and no character that could end the element."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_HTML_IN_JSON)


def is_hidden(character: str) -> bool:
    """Whether a character acts without being seen. A newline does not count: it is seen."""
    return character != "\n" and unicodedata.category(character) in _HIDDEN


def _visible_character(character: str) -> str:
    code = ord(character)
    if not is_hidden(character):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"
