"""What a page leaves out so that it stays small."""

from __future__ import annotations

from collections.abc import Sequence


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``range(count)``, evenly spaced, both ends among them (the first alone for a limit of 1)."""
    if count <= limit:
        return list(range(count))
    if limit < 2:
        return list(range(limit))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def token_limit(lengths: Sequence[int], budget: int) -> int:
    """The largest cap such that responses cut at it hold at most ``budget`` tokens together (at least 1 each)."""
    remaining, limit = budget, max(lengths, default=1)
    for index, length in enumerate(sorted(lengths)):
        share = remaining // (len(lengths) - index)
        if length > share:
            return max(share, 1)
        remaining -= length
    return max(limit, 1)
