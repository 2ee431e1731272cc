"""Distance to the starting policy. The paper trains without it.

Axes: ``B`` sequences, ``T`` token positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from forkrl.objectives.policy_loss import MAX_LOG_RATIO
from forkrl.objectives.reduction import check_like, masked_sum_over
from forkrl.types import LossOutput, require_tensors


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    denominator: Literal["response"] | float = "response",
) -> LossOutput:
    """Mean k3 estimate of KL(policy || reference): ``exp(d) - d - 1`` with ``d = ref_logprobs - logprobs``.

    Never negative, token by token, and unbiased for tokens sampled from the policy (GRPO, arXiv 2402.03300, eq. 4).

    ``d`` is clamped from above at ``MAX_LOG_RATIO``, so that ``exp`` cannot overflow; such a token has zero gradient.
    Unlike verl, which also clamps ``d`` from below and the estimate to 10, nothing else is clamped: those clamps remove
    the gradient where the policy is far from the reference (d > 2.6 or d < -11).

    Args:
        logprobs: ``[B, T]``, of the policy being trained; carries the gradient.
        ref_logprobs: ``[B, T]``, of the reference policy.
        response_mask: ``[B, T]`` bool.
        denominator: "response" counts this call's tokens; a number is the whole mini-batch's count.

    Returns:
        The penalty to add to a loss, and over this call ``kl`` (the mean) and ``num_response`` to weigh it by.

    Raises:
        ValueError: shapes disagree, the mask is not bool, or the denominator is no count.
        TypeError: an argument that must be a tensor is not one.
    """
    require_tensors(logprobs=logprobs)
    check_like(logprobs, ref_logprobs=ref_logprobs, response_mask=response_mask)
    if isinstance(denominator, str) and denominator != "response":
        raise ValueError(f'denominator = {denominator!r} must be "response" or a number')
    num_response = response_mask.sum()
    difference_BT = torch.where(response_mask, ref_logprobs.detach(), 0.0) - torch.where(response_mask, logprobs, 0.0)
    difference_BT = difference_BT.clamp(max=MAX_LOG_RATIO)
    kl_BT = difference_BT.expm1() - difference_BT  # expm1: exp(d) - 1 loses all digits of a small d
    loss = masked_sum_over(kl_BT, response_mask, num_response if isinstance(denominator, str) else denominator)
    return LossOutput(
        loss, {"kl": masked_sum_over(kl_BT.detach(), response_mask, num_response), "num_response": num_response}
    )
