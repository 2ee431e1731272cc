"""Group advantages, the dynamic-sampling filter and DAPO's length penalty. Axes: ``P`` prompts, ``G`` rollouts each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from forkrl.types import require_tensors

_EPS = 1e-6  # as in verl's GRPO: keeps groups of nearly equal rewards finite


def group_advantages(rewards: Tensor, kind: Literal["standardised", "centred", "relative"] = "standardised") -> Tensor:
    """Compare each reward with its group: ``A = (R - mean) / (std + 1e-6)`` (arXiv 2506.01939v2, eq. 4).

    ``std`` is the sample standard deviation (G - 1), as in verl and the official runs. Groups of equal rewards get
    exactly 0.

    Args:
        rewards: ``[P, G]``, finite, G at least 2.
        kind: "standardised"; "centred" is ``R - mean`` (Dr. GRPO, arXiv 2503.20783); "relative" is
            ``(R - mean) / mean`` (MaxRL, arXiv 2602.02710), and 0 where the mean is 0 or negative: rewards must not be
            negative there, or the division would reverse the sign.

    Returns:
        ``[P, G]``, fp32 (fp64 for fp64 rewards).

    Raises:
        ValueError: not ``[P, G]``, a group of one, a reward that is NaN or infinite, or an unknown kind.
    """
    rewards = _as_groups(rewards)
    mean_P1 = rewards.mean(1, keepdim=True)
    advantages_PG, informative_P = rewards - mean_P1, informative_groups(rewards)
    if kind == "standardised":
        advantages_PG = advantages_PG / (rewards.std(1, keepdim=True, correction=1) + _EPS)
    elif kind == "relative":
        advantages_PG = advantages_PG / mean_P1
        informative_P = informative_P & (mean_P1[:, 0] > 0)
    elif kind != "centred":
        raise ValueError(f'kind = {kind!r} must be "standardised", "centred" or "relative"')
    # The mean is rounded: three rewards of 0.1 differ from it by 1e-8, which is not negligible next to 1e-6.
    return torch.where(informative_P[:, None], advantages_PG, 0.0)


def informative_groups(scores: Tensor) -> Tensor:
    """Groups kept by dynamic sampling, ``[P]`` bool: scores ``[P, G]`` not all equal (arXiv 2506.01939v2, sec. 5.2)."""
    scores = _as_groups(scores)
    return (scores != scores[:, :1]).any(1)


def overlong_penalty(lengths: Tensor, max_length: int, cache_length: int) -> Tensor:
    """DAPO's soft overlong punishment: 0, then linear down to -1 over the last ``cache_length`` tokens.

    ``clip((max_length - cache_length - length) / cache_length, -1, 0)``; arXiv 2506.01939v2 uses 20,480 and 4,096.

    Args:
        lengths: response lengths in tokens, any shape.
        max_length: L_max, longest allowed response.
        cache_length: L_cache; 0 disables the penalty.

    Returns:
        fp32 in [-1, 0], shape of ``lengths``.

    Raises:
        ValueError: ``cache_length`` is negative or larger than ``max_length``.
    """
    require_tensors(lengths=lengths)
    if not 0 <= cache_length <= max_length:
        raise ValueError(f"cache_length = {cache_length} must lie in 0 .. max_length = {max_length}")
    if cache_length == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    # Integer subtraction keeps long lengths exact.
    return ((max_length - cache_length - lengths).to(torch.float32) / cache_length).clamp(-1.0, 0.0)


def _as_groups(values: Tensor) -> Tensor:
    require_tensors(rewards=values)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"rewards {tuple(values.shape)} must be [P, G] with at least 2 responses to a prompt")
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    num_bad = int((~values.isfinite()).sum())
    if num_bad:
        raise ValueError(f"{num_bad} of {values.numel()} rewards are NaN or infinite")
    return values
