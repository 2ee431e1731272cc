"""What a mask, a weight or an objective may read of a batch's tokens. Axes: ``B`` sequences, ``T`` positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """Detached; ``[B, T]`` fields are 0 outside the response, whose tokens need not start at the first position.

    With ``selection.entropy = "rollout"``, and before the weights have changed, ``logprobs`` are the old ones.
    """

    response_mask: Tensor
    """``[B, T]`` bool."""
    entropy: Tensor
    """``[B, T]`` nats, of the policy that ``selection.entropy`` names."""
    logprobs: Tensor
    """``[B, T]`` of that policy."""
    old_logprobs: Tensor
    """``[B, T]`` the denominator of the ratio."""
    advantages: Tensor
    """``[B]``."""
    rewards: Tensor
    """``[B]``, as they enter the advantage."""
    groups: Tensor
    """``[B]`` int64: equal for responses to the same prompt."""
    clip: tuple[float, float] = (0.2, 0.28)
    """``loss.clip_low`` and ``loss.clip_high``."""
    generator: torch.Generator | None = None

    @property
    def ratio(self) -> Tensor:
        """Current over old probability, ``[B, T]``; 1 outside the response."""
        return (self.logprobs - self.old_logprobs).exp()

    @property
    def position(self) -> Tensor:
        """Index of each token in its response, int64 ``[B, T]``."""
        return (self.response_mask.cumsum(1) - 1).clamp(min=0)

    @property
    def lengths(self) -> Tensor:
        """Response tokens, int64 ``[B]``."""
        return self.response_mask.sum(1)

    def rows(self, rows_B: Tensor) -> Signals:
        """The given sequences."""
        return self._each(lambda field: field[rows_B])

    def to(self, device: torch.device | str) -> Signals:
        return self._each(lambda field: field.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Signals:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: change(each) for name, each in values.items() if isinstance(each, Tensor)}
        return Signals(**values)


MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this magnitude before ``exp``, as in verl; fp32 overflows above 88."""


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What an objective reads of a micro-batch, ``[B, T]``; log-probs and entropies are 0 outside ``read``."""

    read: Tensor
    """bool: tokens whose log-probs are known. Those of ``selected``, or of all responses with an advantage if the
    objective reads whole responses."""
    selected: Tensor
    """bool: the tokens whose loss counts, a subset of ``read``."""
    logprobs: Tensor
    """Of the policy being trained; carries the gradient."""
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    """Of the starting policy; None unless the objective asks for it."""
    entropy: Tensor
    """Nats, of the current policy; detached."""
    advantages: Tensor
    """Times their weights."""
    clip_low: float
    clip_high: float
    dual_clip: float | None

    @property
    def exact_log_ratio(self) -> Tensor:
        """Current minus old log-prob."""
        return self.logprobs - self.old_logprobs

    @property
    def log_ratio(self) -> Tensor:
        """The same, clamped to +-``MAX_LOG_RATIO``, so that its ``exp`` is finite."""
        return self.exact_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
