"""Rows of a user's data that cannot be used: collected, so that one message reports the first ten and the count."""

from __future__ import annotations

from forkrl.errors import UserError

_SHOWN = 10


class BadRows:
    """The first few reasons, each with its row, and how many there are."""

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
        """The first few, a line each."""
        more = self.count - len(self._first)
        lines = [f"  {reason}" for reason in self._first] + ([f"  and {more:,} more"] if more else [])
        return "\n".join(lines)

    def require_none(self, source: str, total: int, remedy: str) -> None:
        """Raise UserError if there is any: one line for one row, else a list with the count of all rows read."""
        if self.count == 1:
            raise UserError(f"{self._first[0]}; or {remedy}" if remedy else self._first[0])
        if self.count:
            ending = f"; fix them, or {remedy}" if remedy else ""
            raise UserError(f"{source}: {self.count:,} of {total:,} rows cannot be used{ending}:\n{self.listing()}")
