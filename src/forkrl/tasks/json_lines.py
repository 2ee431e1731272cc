"""Lines of a JSONL file, and their text, or one clear line on what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

from forkrl.errors import UserError


def json_object(line: bytes, place: str) -> dict[str, Any]:
    """The object on a line, without a byte order mark."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{place} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(values, dict):
        raise UserError(f"{place} is {kind_of(values)}, not a JSON object")
    return values


def require_characters(text: str, column: str, place: str) -> None:
    """Refuse text that no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{place}: {column} holds half a surrogate pair, which is not a character; repair the row"
        ) from None


def kind_of(value: Any) -> str:
    """What a value is, in words for a person."""
    names = {type(None): "missing", bool: "true or false", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), f"{value!r:.40} ({type(value).__name__})")
