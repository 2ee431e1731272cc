"""Autograd function of the fast backends: differentiates only live rows, those with a non-zero incoming gradient.

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary; ``R`` live rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from forkrl.types import TokenStats


class Head(NamedTuple):
    """``weight`` ``[V, D]`` and ``bias`` ``[V]`` or None, in the dtype of the hidden states."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    entropy_grad: bool


class Rows(NamedTuple):
    """Backward inputs per row: ``hidden`` is ``[R, D]``, the others ``[R]``."""

    hidden: Tensor
    targets: Tensor
    highest: Tensor
    log_s: Tensor
    entropy: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor
    log_p: Tensor | None
    """``[R, V]`` if small enough for the forward to keep."""

    def take(self, rows: Tensor | slice) -> Rows:
        """Some of the rows; indices copy them, a slice does not."""
        return self._replace(**{name: field[rows] for name, field in self._asdict().items() if field is not None})


class Needs(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """``[R, D]``, ``[V, D]`` and ``[V]`` in the dtype of the inputs, or None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Scanned(NamedTuple):
    """``[N]`` each, and log-probs ``[N, V]`` if few. Adding ``highest`` to the log of the sum would lose digits."""

    logprobs: Tensor
    highest: Tensor
    log_s: Tensor
    entropy: Tensor
    log_p: Tensor | None = None


Scan = Callable[[Tensor, Tensor, Head], Scanned]
"""Statistics of every row, from hidden states ``[N, D]`` and targets ``[N]``."""
Differentiate = Callable[[Rows, Head, Needs], Gradients]
"""Gradients of the given rows, the weight and the bias."""


def live_row_stats(
    scan: Scan, differentiate: Differentiate, hidden_ND: Tensor, targets_N: Tensor, head: Head
) -> TokenStats:
    """Statistics by ``scan``; ``differentiate`` runs on the live rows in the backward."""
    apply: Callable[..., tuple[Tensor, Tensor]] = _LiveRowStats.apply
    return TokenStats(*apply(scan, differentiate, hidden_ND, targets_N, *head))


class _LiveRowStats(autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scan: Scan, differentiate: Differentiate, hidden_ND: Tensor, targets_N: Tensor, *head: Any
    ) -> tuple[Tensor, Tensor]:
        weight_VD, bias_V, *settings = head
        scanned = scan(hidden_ND, targets_N, Head(*head))
        ctx.save_for_backward(weight_VD, bias_V, hidden_ND, targets_N, *scanned[1:])
        ctx.differentiate, ctx.settings = differentiate, settings
        if not Head(*head).entropy_grad:
            ctx.mark_non_differentiable(scanned.entropy)
        return scanned.logprobs, scanned.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        weight_VD, bias_V, hidden_ND, targets_N, highest_N, log_s_N, entropy_N, log_p_NV = ctx.saved_tensors
        head = Head(weight_VD, bias_V, *ctx.settings)
        live_N = grad_logprobs_N != 0  # True for NaN too, which must reach the caller
        if head.entropy_grad:
            live_N |= grad_entropy_N != 0
        per_row = Rows(hidden_ND, targets_N, highest_N, log_s_N, entropy_N, grad_logprobs_N, grad_entropy_N, log_p_NV)
        live = live_N.nonzero().squeeze(1)
        dense = len(live) == len(live_N)
        if not dense:  # gathering copies the rows; a dense gradient needs no copy
            per_row = per_row.take(live)
        _, _, needs_hidden, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs = Needs(needs_hidden, needs_weight, needs_bias)
        grad_hidden, grad_weight_VD, grad_bias_V = ctx.differentiate(per_row, head, needs)
        if grad_hidden is not None and not dense:
            grad_hidden = torch.zeros_like(hidden_ND).index_copy_(0, live, grad_hidden)
        return None, None, grad_hidden, None, grad_weight_VD, grad_bias_V, None, None


def slices(length: int, step: int) -> list[slice]:
    """``[0, length)`` in slices of ``step``; the last may be shorter."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
