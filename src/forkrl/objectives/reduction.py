"""The token mean that every objective shares: one sum, one denominator, however the mini-batch was cut.

Axes: ``B`` sequences, ``T`` token positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forkrl.types import require_tensors


def masked_sum_over(values_BT: Tensor, mask_BT: Tensor, denominator: float | Tensor) -> Tensor:
    """``sum(values[mask]) / denominator``, and 0, still attached to the graph, where the denominator counts nothing.

    Values outside the mask, NaN among them, reach neither the sum nor its gradient.

    Args:
        values_BT: one number a token.
        mask_BT: bool.
        denominator: tokens to divide by: a count of this call as a tensor, or the whole mini-batch's as a number.

    Raises:
        ValueError: the denominator is negative or not finite, or is the number 0 although tokens were selected.
    """
    total = torch.where(mask_BT, values_BT, 0.0).sum()
    if isinstance(denominator, Tensor):
        return total / denominator.clamp(min=1)
    if not (math.isfinite(denominator) and denominator >= 0):
        raise ValueError(f"denominator = {denominator} must be a finite count of tokens")
    if denominator == 0 and bool(mask_BT.any()):
        raise ValueError(f"denominator = 0, yet {int(mask_BT.sum())} tokens enter the loss")
    return total / (denominator or 1.0)


def check_like(reference_BT: Tensor, **others: Tensor) -> None:
    """Check that all are tensors of the first one's shape, and that masks (named ``*_mask``) are bool.

    Raises:
        TypeError: one is not a tensor.
        ValueError: a shape differs, or a mask is not bool.
    """
    require_tensors(**others)
    for name, tensor in others.items():
        if tensor.shape != reference_BT.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} is not shaped like logprobs {tuple(reference_BT.shape)}")
        if name.endswith("_mask") and tensor.dtype != torch.bool:
            raise ValueError(f"{name} is {tensor.dtype}; it must be bool")
