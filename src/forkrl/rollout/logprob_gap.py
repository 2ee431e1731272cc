"""Compares log-probs of the sampling engine and the trained model (full vocabulary, rollout temperature).

They should differ only by rounding; a larger gap makes every ratio in the loss wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from forkrl.errors import TrainingHalted
from forkrl.method.batches import collate
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.types import Prompt, Rollout, RolloutGroup, TokenBatch

MAX_MEAN_GAP = {"fp32": 1e-3, "bf16": 0.05}
"""Nats, by ``model.precision``. Rounding alone gives less (docs/engines.md)."""


class LogprobGap(NamedTuple):
    """Absolute differences over all response tokens of a batch, in nats."""

    mean: float
    max: float


@torch.no_grad()
def logprob_gap(policy: Policy, batch: TokenBatch, temperature: float) -> LogprobGap:
    """The gap between ``batch.old_logprobs`` and one forward pass; the batch must be on the policy's device."""
    logprobs_BT = compute_token_stats(policy, batch, temperature=temperature).logprobs
    gap_N = (logprobs_BT - batch.old_logprobs).abs()[batch.response_mask]
    return LogprobGap(float(gap_N.mean()), float(gap_N.max()))


def gap_of_rollouts(policy: Policy, rollouts: Iterable[Rollout]) -> LogprobGap:
    """The gap of responses sampled at temperature 1."""
    groups = [RolloutGroup(Prompt("", "", ""), (rollout,)) for rollout in rollouts]
    batch = collate(groups, torch.zeros(len(groups), 1), pad_id=0)
    return logprob_gap(policy, batch.to(policy.device), 1.0)


def require_small_gap(gap: LogprobGap, precision: str) -> None:
    """Raise TrainingHalted if engine and trainer disagree."""
    limit = MAX_MEAN_GAP[precision]
    if not gap.mean <= limit:
        raise TrainingHalted(
            f"the sampler's log-probs differ from the trainer's by {gap.mean:.2g} nats per token on average (at most "
            f"{gap.max:.2g}), over the limit of {limit:g} for model.precision = {precision!r}; the engine does not "
            f"sample from the model that is trained, so no update was made; use another engine, precision or model"
        )
