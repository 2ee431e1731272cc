"""Compares log-probs of the sampling engine and the trained model (full vocabulary, rollout temperature).

They should differ only by rounding; a larger gap makes every ratio in the loss wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from forkrl.errors import TrainingHalted
from forkrl.method.batches import collate
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.types import Prompt, Rollout, RolloutGroup, TokenBatch

MAX_MEAN_GAP = {"fp32": 1e-3, "bf16": 0.1}
"""Nats, by ``model.precision``. Rounding alone gives less (docs/engines.md)."""


class LogprobGap(NamedTuple):
    """How far the trainer's log-probs are from the sampler's, over some response tokens; NaN without any."""

    mean: float
    """Absolute difference in nats, as ``max``."""
    max: float
    k3: float
    """Estimate of KL(sampler || trainer) in nats: the mean of w - 1 - ln w, where w is the ratio of probabilities."""
    beyond_2x: float
    """Share of tokens whose probabilities differ by more than a factor of 2."""

    @staticmethod
    def of(log_ratio: Tensor) -> LogprobGap:
        """``log_ratio``: the trainer's log-probs minus the sampler's, ``[N]``."""
        if not len(log_ratio):
            return LogprobGap(math.nan, math.nan, math.nan, math.nan)
        log_ratio_N, size_N = log_ratio.double(), log_ratio.double().abs()
        k3 = float((log_ratio_N.expm1() - log_ratio_N).mean())
        return LogprobGap(float(size_N.mean()), float(size_N.max()), k3, float((size_N > math.log(2)).double().mean()))

    def metrics(self) -> dict[str, float]:
        return {f"rollout/logprob_gap_{name}": value for name, value in self._asdict().items()}


@torch.no_grad()
def logprob_gap(policy: Policy, batch: TokenBatch, temperature: float) -> LogprobGap:
    """The gap between ``batch.old_logprobs`` and one forward pass; the batch must be on the policy's device."""
    logprobs_BT = compute_token_stats(policy, batch, temperature=temperature).logprobs
    return LogprobGap.of((logprobs_BT - batch.old_logprobs)[batch.response_mask])


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
            f"sample from the model that is trained, so no update was made; use another engine, precision or model "
            f"(loss.sampler_correction does not lift the limit)"
        )
