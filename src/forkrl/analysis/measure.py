"""What a model thinks at each position: entropy, log-prob, rank and the likeliest alternatives, a few rows at a time.

Axes: ``N`` rows (token positions), ``R`` rows of a tile, ``D`` hidden, ``V`` vocabulary, ``K`` alternatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_ELEMENTS_CPU = 1 << 22
"""Logits held at once on a CPU: 16 MiB in fp32, 27 rows of a vocabulary of 150,000. Two or three such tiles coexist."""
TILE_ELEMENTS = 1 << 25
"""Logits held at once elsewhere: 128 MiB in fp32, so that kernels are few and large."""


class TokenDetails(NamedTuple):
    """Per position, fp32 in nats where not said otherwise."""

    entropy: Tensor  # [N]
    logprobs: Tensor  # [N], of the target
    ranks: Tensor  # [N] int32: 1 + the number of tokens that are likelier than the target
    top_ids: Tensor  # [N, K] int32, likeliest first
    top_probs: Tensor  # [N, K]


@torch.no_grad()
def token_details(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    top: int = 5,
) -> TokenDetails:
    """Entropy (arXiv 2506.01939v2, eq. 1), log-prob and rank of each target, and the ``top`` likeliest tokens.

    Unlike :func:`forkrl.token_stats` it sees every token's probability, so it holds whole rows of logits, but only a
    tile of them: memory does not grow with N x V. The matrix product is in the dtype given, what follows in fp32
    (fp64 for fp64 inputs).

    Args:
        hidden: ``[N, D]``, last hidden states.
        weight: ``[V, D]``, the head's matrix, same dtype.
        targets: ``[N]`` int64 in ``[0, V)``.
        bias: ``[V]`` or None.
        temperature: divides the logits; positive.
        top: alternatives wanted; fewer where the vocabulary is smaller.

    Raises:
        ValueError: shapes disagree, or the temperature is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} must be "
            f"[N, D], [V, D] and [N]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} must be positive")
    num_rows, num_top = len(hidden), min(top, len(weight))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # Before the first tile: small results that stay, allocated between large ones that go, would keep the allocator
    # from ever using a tile's memory again (15 GB were seen for 8,000 rows of a vocabulary of 150,000).
    found = TokenDetails(
        entropy=hidden.new_empty(num_rows, dtype=dtype),
        logprobs=hidden.new_empty(num_rows, dtype=dtype),
        ranks=hidden.new_empty(num_rows, dtype=torch.int32),
        top_ids=hidden.new_empty(num_rows, num_top, dtype=torch.int32),
        top_probs=hidden.new_empty(num_rows, num_top, dtype=dtype),
    )
    tile = max((TILE_ELEMENTS_CPU if hidden.device.type == "cpu" else TILE_ELEMENTS) // len(weight), 1)
    for start in range(0, num_rows, tile):
        rows = slice(start, start + tile)
        details = _tile_details(hidden[rows], weight, targets[rows], bias, temperature, num_top)
        for column, part in zip(found, details, strict=True):
            column[rows] = part
    return found


def _tile_details(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, bias_V: Tensor | None, temperature: float, top: int
) -> TokenDetails:
    logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD, bias_V)
    log_p_RV = torch.log_softmax(logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) / temperature, -1)
    logprobs_R1 = log_p_RV.gather(1, targets_R[:, None])
    top_RK, ids_RK = log_p_RV.topk(top, dim=1)
    return TokenDetails(
        entropy=(log_p_RV.exp() * log_p_RV).sum(1).neg_().clamp_min_(0),
        logprobs=logprobs_R1[:, 0],
        ranks=((log_p_RV > logprobs_R1).sum(1) + 1).int(),
        top_ids=ids_RK.int(),
        top_probs=top_RK.exp(),
    )
