"""Weights that correct for a sampler whose log-probs differ from the trainer's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from forkrl.method.signals import MAX_LOG_RATIO

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import LossConfig


def sampler_weights(log_ratio: Tensor, response_mask: Tensor, config: LossConfig) -> Tensor | None:
    """Factors of each token's loss, fp32 ``[B, T]`` and 1 outside the response; None for "none".

    With w = exp(``log_ratio``): "token_truncated" is min(w, cap) (truncated importance sampling), "sequence_truncated"
    min(product of w over the response, cap), and "masked" w inside [1 / cap, cap], else 0 (IcePop). Log-ratios and
    their sums are clamped to +-``MAX_LOG_RATIO``, as in verl.

    Args:
        log_ratio: log-prob by the trainer before the update minus that of the sampler, ``[B, T]``.
        response_mask: ``[B, T]`` bool.
    """
    if config.sampler_correction == "none":
        return None
    log_BT = torch.where(response_mask, log_ratio, 0.0)
    if config.sampler_correction == "sequence_truncated":
        log_BT = torch.where(response_mask, log_BT.sum(1, keepdim=True), 0.0)
    weight_BT = log_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if config.sampler_correction == "masked":
        kept_BT = (weight_BT >= 1 / config.sampler_cap) & (weight_BT <= config.sampler_cap)
        return torch.where(kept_BT, weight_BT, 0.0)
    return weight_BT.clamp(max=config.sampler_cap)


def weight_metrics(weight_N: Tensor, cap: float) -> dict[str, float]:
    """Mean of the weights of some response tokens, and the share that is truncated or masked."""
    cut_N = (weight_N == 0) | (weight_N >= cap)
    return {
        "rollout/sampler_weight_mean": float(weight_N.mean()),
        "rollout/sampler_weight_cut": float(cut_N.float().mean()),
    }
