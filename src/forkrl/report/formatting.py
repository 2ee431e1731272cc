"""Formatting of text and numbers. Model text is hostile: it must not run, hide or reorder anything."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from forkrl.errors import acts_unseen
from forkrl.stats.intervals import Estimate

_HTML_IN_JSON = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
READ_CHARACTERS = 8000


def visible(text: str) -> str:
    """Replace invisible and control characters by a symbol or code point; keep newlines.

    >>> visible("\\x1b[31mred")
    '␛[31mred'
    """
    return text if text.isascii() and text.isprintable() else "".join(_visible_character(c) for c in text)


def visible_token(token: str) -> str:
    """A token as shown in the fork view: newlines, tabs and empty tokens become visible marks."""
    return visible(token.replace("\t", "⇥")).replace("\n", "⏎\n") or "⟨⟩"


def _visible_character(character: str) -> str:
    code = ord(character)
    if character == "\n" or not acts_unseen(character):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def low_entropy(step: int, entropy: float, floor: float) -> str:
    """The warning of the first step below ``log.entropy_floor``."""
    return (
        f"mean entropy fell below log.entropy_floor = {floor:g} nats at step {step}, to {entropy:.3g}: responses to a "
        f"prompt become similar, and little is left to learn from; a new run keeps it higher with loss.entropy_target "
        f"or a higher loss.clip_high"
    )


def script_json(data: Any) -> str:
    """JSON for ``<script type="application/json">``: ASCII, with nothing that can close the element."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_HTML_IN_JSON)


def shortened(text: str, limit: int = READ_CHARACTERS) -> str:
    """The start and the longer end of the text, which holds the answer, with a note on how much is missing."""
    if len(text) <= limit:
        return text
    head = limit // 4
    tail = limit - head
    return f"{text[:head]}\n\n[… {len(text) - limit:,} characters are left out here …]\n\n{text[-tail:]}"


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``range(count)``, evenly spaced, with both ends (only the first if the limit is 1)."""
    if count <= limit:
        return list(range(count))
    if limit < 2:
        return list(range(limit))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def interval_of(row: Any, name: str) -> Estimate:
    values = (row[name + end] for end in ("", "_low", "_high"))
    return Estimate(*(math.nan if value is None else float(value) for value in values))


def percent(estimate: Estimate, *, unit: str = "%", sign: str = "") -> str:
    """``12.3% [10.1, 14.5]``, without the interval if unknown; ``sign="+"`` for a difference."""
    mean, low, high = (100 * value if sign else round(100 * value, 1) + 0.0 for value in estimate)  # no -0.0
    if math.isnan(mean):
        return "–"
    return (
        f"{mean:{sign}.1f}{unit}" if math.isnan(low) else f"{mean:{sign}.1f}{unit} [{low:{sign}.1f}, {high:{sign}.1f}]"
    )


def points(estimate: Estimate) -> str:
    """A difference of two shares: ``+1.2 points [-0.4, +2.8]``."""
    return percent(estimate, unit=" points", sign="+")


def is_clear(difference: Estimate) -> bool:
    """Whether the 95% interval of a difference is known and excludes 0."""
    return difference.low > 0 or difference.high < 0


def probability(p: float) -> str:
    """A p-value: ``p = 0.043`` or ``p < 0.001``."""
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def unverified(count: int, what: str) -> list[str]:
    return [f"{count:,} {what} could not be verified; they count as wrong."] if count else []


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def duration(seconds: float) -> str:
    """``4.2 s``, ``42 s``, ``3 min 05 s``, ``2 h 07 min`` or ``2 d 7 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 and seconds != whole else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours = whole // 3600
    return f"{hours} h {whole % 3600 // 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plain(value: Any) -> str:
    """A setting's value on one line, as in TOML; strings without quotes."""
    return value if isinstance(value, str) else _inline(value)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)


def outcome(scores: Sequence[float | None]) -> str:
    """Right, wrong or mixed; empty if nothing was judged."""
    known = {score for score in scores if score is not None}
    if not known:
        return ""
    return "mixed" if len(known) > 1 else "right" if known == {1.0} else "wrong"
