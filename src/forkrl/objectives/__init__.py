"""What the optimizer minimises: pure functions of tensors, each returning a loss and what to log of it."""

from __future__ import annotations

from forkrl.objectives.kl import kl_penalty
from forkrl.objectives.policy_loss import policy_loss
from forkrl.objectives.reduction import masked_sum_over

__all__ = ["kl_penalty", "masked_sum_over", "policy_loss"]
