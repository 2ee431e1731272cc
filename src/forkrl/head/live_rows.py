"""The autograd function of the fast backends: it keeps a few numbers a row, and its backward takes live rows only.

A row is live where its incoming gradient is not zero. What a backend does with the rows it is given, tile by tile or
in kernels, is its own; which rows those are is decided here, once.

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary; ``R`` the rows that are live.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, autograd, zeros_like
from torch.autograd.function import once_differentiable

from forkrl.types import TokenStats


class Rows(NamedTuple):
    """What a backward knows of the rows it computes: ``hidden`` is ``[R, D]``, the others ``[R]``."""

    hidden: Tensor
    targets: Tensor
    highest: Tensor
    log_s: Tensor
    entropy: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor
    log_p: Tensor | None
    """``[R, V]``, of a problem so small that the forward kept it."""

    def take(self, rows: Tensor | slice) -> Rows:
        """Some of the rows; a tensor of indices copies them, a slice does not."""
        return self._replace(**{name: field[rows] for name, field in self._asdict().items() if field is not None})


class Needs(NamedTuple):
    """Which gradients somebody wants."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """``[R, D]``, ``[V, D]`` and ``[V]`` in the dtype of the inputs, or None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Scanned(NamedTuple):
    """``[N]`` each, and all log-probs where they are few enough to keep: ``[N, V]`` or None.

    The largest logit and the logarithm of the sum stay apart: their sum would cost large logits their last digits.
    """

    logprobs: Tensor
    highest: Tensor
    log_s: Tensor
    entropy: Tensor
    log_p: Tensor | None = None


class Scan(Protocol):
    """The statistics of every row."""

    def __call__(
        self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None, temperature: float
    ) -> Scanned: ...


class Differentiate(Protocol):
    """Gradients of the given rows, of the weight and of the bias."""

    def __call__(
        self,
        per_row: Rows,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        temperature: float,
        entropy_grad: bool,
        needs: Needs,
    ) -> Gradients: ...


def live_row_stats(
    scan: Scan,
    differentiate: Differentiate,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    entropy_grad: bool,
) -> TokenStats:
    """Statistics by ``scan``, differentiable by ``differentiate`` on the rows that are live then."""
    apply: Callable[..., tuple[Tensor, Tensor]] = _LiveRowStats.apply
    inputs = (hidden_ND, weight_VD, targets_N, bias_V)
    return TokenStats(*apply(scan, differentiate, *inputs, temperature, entropy_grad))


class _LiveRowStats(autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scan: Scan,
        differentiate: Differentiate,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        bias_V: Tensor | None,
        temperature: float,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs_N, highest_N, log_s_N, entropy_N, log_p_NV = scan(hidden_ND, weight_VD, targets_N, bias_V, temperature)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, bias_V, highest_N, log_s_N, entropy_N, log_p_NV)
        ctx.differentiate, ctx.temperature, ctx.entropy_grad = differentiate, temperature, entropy_grad
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, bias_V, highest_N, log_s_N, entropy_N, log_p_NV = ctx.saved_tensors
        live_N = grad_logprobs_N != 0  # true of NaN as well, which must reach the caller
        if ctx.entropy_grad:
            live_N |= grad_entropy_N != 0
        per_row = Rows(hidden_ND, targets_N, highest_N, log_s_N, entropy_N, grad_logprobs_N, grad_entropy_N, log_p_NV)
        live = live_N.nonzero().squeeze(1)
        dense = len(live) == len(live_N)
        if not dense:  # gathering copies the rows, which a dense gradient can do without
            per_row = per_row.take(live)
        _, _, needs_hidden, needs_weight, _, needs_bias, _, _ = ctx.needs_input_grad
        needs = Needs(needs_hidden, needs_weight, needs_bias)
        grad_hidden, grad_weight_VD, grad_bias_V = ctx.differentiate(
            per_row, weight_VD, bias_V, ctx.temperature, ctx.entropy_grad, needs
        )
        if grad_hidden is not None and not dense:
            grad_hidden = zeros_like(hidden_ND).index_copy_(0, live, grad_hidden)
        return None, None, grad_hidden, grad_weight_VD, None, grad_bias_V, None, None


def slices(length: int, step: int) -> list[slice]:
    """``[0, length)`` cut into slices of ``step``, the last one perhaps shorter."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
