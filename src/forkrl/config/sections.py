"""The base class of every table of a recipe, and the ranges that many settings share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0)]
FROM_LIST = Field(strict=False)
"""TOML has arrays, not tuples."""


class PowerOfTen(float):
    """A number written as ``1e3``, which an integer setting takes as 1000."""


class Section(BaseModel):
    """A table of a recipe. Rejects unknown keys; does not convert values between types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _accept_shorthand(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept ``1e3`` in integer settings, and a bare word where a list of words belongs."""
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = [getattr(each, "__origin__", each) for each in (kind, *get_args(kind))]
        if isinstance(value, PowerOfTen) and int in kinds:
            return int(value)
        is_word = isinstance(value, str) and not value.startswith("[")
        return [value] if is_word and kinds[0] is tuple and kinds[1] in (str, Literal) else value

    def changed(self) -> list[str]:
        """The settings whose values differ from their defaults."""
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
