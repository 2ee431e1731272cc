"""Rows of a user's JSONL file, with one-line errors."""

from __future__ import annotations

import json
from typing import Any

from forkrl.errors import UserError

_SHOWN = 10


def json_object(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object on a line, without a byte order mark."""
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
    """Reject text that no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{place}: {column} holds half a surrogate pair, which is not a character; repair the row"
        ) from None


def kind_of(value: Any) -> str:
    names = {type(None): "missing", bool: "true or false", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), f"{value!r:.40} ({type(value).__name__})")


class BadRows:
    """Collects the errors of unusable rows; one message reports the first ten and the count."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    @property
    def first(self) -> str:
        return self._first[0]

    def add(self, error: UserError) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self._first.append(str(error))

    def listing(self) -> str:
        more = [f"  and {self.count - _SHOWN:,} more"] if self.count > _SHOWN else []
        return "\n".join([f"  {error}" for error in self._first] + more)

    def require_none(self, source: str, total: int, remedy: str) -> None:
        """Raise UserError if a row is bad: one line for one row, else a list and the count out of ``total``."""
        if self.count == 1:
            raise UserError(f"{self._first[0]}; or {remedy}" if remedy else self._first[0])
        if self.count:
            ending = f"; fix them, or {remedy}" if remedy else ""
            raise UserError(f"{source}: {self.count:,} of {total:,} rows cannot be used{ending}:\n{self.listing()}")
