"""Naive reference implementation; exact in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from forkrl.head.live_rows import Head
from forkrl.types import TokenStats


def reference_token_stats(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> TokenStats:
    logits_NV = F.linear(hidden_ND, head.weight, head.bias)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / head.temperature
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    logprobs_N = log_p_NV.gather(1, targets_N[:, None]).squeeze(1)
    with torch.set_grad_enabled(head.entropy_grad and torch.is_grad_enabled()):
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(1)
    # Rounding may leave -1e-9 where one token has all the probability.
    return TokenStats(logprobs_N, entropy_N.clamp(min=0))
