"""The table ``[lora]`` of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import model_validator

from forkrl.config.sections import FROM_LIST, Count, PositiveInt, Section


class LoraConfig(Section):
    """Train low-rank adapters and freeze the model (docs/lora.md). Needs `pip install 'forkrl[lora]'`."""

    rank: Count = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: PositiveInt = 32
    """The adapters' output is multiplied by alpha / rank."""
    targets: Annotated[tuple[str, ...], FROM_LIST] = ("all-linear",)
    """Names of the layers that get one, such as ["q_proj", "v_proj"]; "all-linear": every linear layer but the head."""

    @model_validator(mode="after")
    def _needs_a_rank(self) -> LoraConfig:
        if not self.rank and (changed := self.changed()):
            raise ValueError(f"lora.{changed[0]} is read only with lora.rank above 0; set that, or remove it")
        if not self.targets:
            raise ValueError('lora.targets is empty; name layers, or set it to "all-linear"')
        return self
