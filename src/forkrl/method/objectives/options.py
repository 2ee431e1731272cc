"""Ranges of the objectives' options."""

from __future__ import annotations

import math
from typing import Any


def require_range(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raise ValueError unless the option is a finite number in [``least``, ``most``]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and least <= value <= most):
        span = f"of at least {least}" if most == math.inf else f"in [{least}, {most}]"
        raise ValueError(f"loss.options.{name} = {value} must be a finite number {span}")


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless the option is a finite number above 0."""
    require_range(name, value, 0)
    if value == 0:
        raise ValueError(f"loss.options.{name} = {value} must be above 0")
