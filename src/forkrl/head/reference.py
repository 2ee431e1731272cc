"""The definition, written down as it is read: the truth in fp64, and the naive version in any other dtype.

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from forkrl.types import TokenStats


def reference_token_stats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    *,
    temperature: float,
    entropy_grad: bool,
) -> TokenStats:
    """Softmax statistics from all logits at once (arXiv 2506.01939v2, eq. 1), as :func:`token_stats` describes them."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    logprobs_N = log_p_NV.gather(1, targets_N[:, None]).squeeze(1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(1)
    # Rounding may leave -1e-9 where one token has all the probability; an entropy is never negative.
    return TokenStats(logprobs_N, entropy_N.clamp(min=0))
