"""How pages and terminal lines state a difference: better and worse only where the interval excludes 0."""

from __future__ import annotations

import math


def is_clear(low: float, high: float) -> bool:
    """Whether the 95% interval of a difference excludes 0; an interval that is not known does not."""
    return low > 0 or high < 0


def probability(p: float) -> str:
    """A p-value as one writes it."""
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def signed_points(mean: float, low: float, high: float) -> str:
    """A difference of two shares: ``+1.2 points [-0.4, +2.8]``."""
    interval = "" if math.isnan(low) else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * mean:+.1f} points{interval}"
