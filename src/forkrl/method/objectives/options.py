"""Ranges of the objectives' options."""

from __future__ import annotations

import math


def require_range(name: str, value: object, least: float, most: float = math.inf) -> None:
    """Raise ValueError unless the option is a finite number in [``least``, ``most``]."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else value
    if not (math.isfinite(number) and least <= number <= most):
        span = f"of at least {least}" if most == math.inf else f"in [{least}, {most}]"
        raise ValueError(f"loss.options.{name} = {value} must be a finite number {span}")


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless the option is a finite number above 0."""
    require_range(name, value, 0)
    if value == 0:
        raise ValueError(f"loss.options.{name} = {value} must be above 0")
