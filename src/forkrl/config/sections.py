"""What every table of a recipe is made of: its base class, and the ranges that many settings share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FROM_LIST = Field(strict=False)
"""TOML has arrays, not tuples."""


class Section(BaseModel):
    """A table of a recipe: unknown keys are refused, values are not coerced across types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def default_of(schema: type[Section], key: str) -> Any:
    """What a setting is where nobody sets it."""
    return schema.model_fields[key].get_default()
