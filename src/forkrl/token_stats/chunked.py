"""Token statistics in tiles of rows and vocabulary: memory does not grow with N x V, in either direction.

Forward: for each block of rows, one pass over the vocabulary keeps a running maximum ``m``, ``s = sum(exp(z - m))`` and
``a = sum(exp(z - m) (z - m))``; then ``lse = m + log s`` and ``H = log s - a / s``. Backward: the tiles are computed
again, only for rows whose incoming gradient is non-zero, and

    dL/dz_j = g_logp (1[j = target] - p_j) - g_H p_j (log p_j + H).

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary; ``R`` rows of a tile, ``C`` columns of a tile (a slice of ``V``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from forkrl.types import TokenStats

TILE_ELEMENTS_CPU = 1 << 20
"""Logits held at once on a CPU: 4 MiB in fp32, which its cache holds."""
TILE_ELEMENTS = 1 << 24
"""Logits held at once elsewhere: 64 MiB in fp32, so that kernels are few and large. Two or three of them coexist."""
TILE_COLUMNS = 8192
"""Widest slice of the vocabulary; bounds the fp32 sum of the weight's gradient as well."""


def chunked_token_stats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    *,
    temperature: float,
    entropy_grad: bool,
) -> TokenStats:
    """Softmax statistics tile by tile (arXiv 2506.01939v2, eq. 1), as :func:`token_stats` describes them."""
    apply: Callable[..., tuple[Tensor, Tensor]] = _TokenStats.apply
    return TokenStats(*apply(hidden_ND, weight_VD, targets_N, bias_V, temperature, entropy_grad))


class _TokenStats(torch.autograd.Function):
    """Keeps its inputs and two numbers a row for the backward; the logits never outlive their tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        bias_V: Tensor | None,
        temperature: float,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        num_rows, dtype = len(hidden_ND), torch.promote_types(hidden_ND.dtype, torch.float32)
        logprobs_N, lse_N, entropy_N = (torch.empty(num_rows, dtype=dtype, device=hidden_ND.device) for _ in range(3))
        rows_per_tile, columns_per_tile = _tile_shape(num_rows, len(weight_VD), weight_VD.device)
        for rows in _slices(num_rows, rows_per_tile):
            logprobs_N[rows], lse_N[rows], entropy_N[rows] = _scan_vocabulary(
                hidden_ND[rows], weight_VD, targets_N[rows], bias_V, temperature, columns_per_tile
            )
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, bias_V, lse_N, entropy_N)
        ctx.temperature, ctx.entropy_grad = temperature, entropy_grad
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, bias_V, lse_N, entropy_N = ctx.saved_tensors
        live_N = grad_logprobs_N != 0  # true of NaN as well, which must reach the caller
        if ctx.entropy_grad:
            live_N |= grad_entropy_N != 0
        per_row = _Rows(hidden_ND, targets_N, lse_N, entropy_N, grad_logprobs_N, grad_entropy_N)
        live = live_N.nonzero().squeeze(1)
        dense = len(live) == len(live_N)
        if not dense:  # gathering copies the rows, which a dense gradient can do without
            per_row = _Rows(*(field.index_select(0, live) for field in per_row))
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grad_hidden, grad_weight_VD, grad_bias_V = _backward_tiles(
            per_row, weight_VD, bias_V, ctx.temperature, ctx.entropy_grad, needs
        )
        if grad_hidden is not None and not dense:
            grad_hidden = torch.zeros_like(hidden_ND).index_copy_(0, live, grad_hidden)
        return grad_hidden, grad_weight_VD, None, grad_bias_V, None, None


class _Rows(NamedTuple):
    """What the backward knows of the rows it computes: ``hidden`` is ``[R, D]``, the others ``[R]``."""

    hidden: Tensor
    targets: Tensor
    lse: Tensor
    entropy: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor


def _scan_vocabulary(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    columns_per_tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, log-sum-exp and entropy of a block of rows in one pass over the vocabulary."""
    dtype = torch.promote_types(hidden_RD.dtype, torch.float32)
    # The lowest finite number, not -inf: 0 * (m - new_m) below must be 0 on the first tile.
    m_R = torch.full(targets_R.shape, torch.finfo(dtype).min, dtype=dtype, device=hidden_RD.device)
    s_R, a_R, target_R = (torch.zeros_like(m_R) for _ in range(3))
    for columns in _slices(len(weight_VD), columns_per_tile):
        z_RC = _logits_tile(hidden_RD, weight_VD, bias_V, columns, temperature)
        column_R, inside_R = _locate(targets_R, columns)
        target_R = torch.where(inside_R, z_RC.gather(1, column_R[:, None]).squeeze(1), target_R)
        new_m_R = torch.maximum(m_R, z_RC.amax(1))
        shift_R, m_R = m_R - new_m_R, new_m_R
        z_RC.sub_(m_R[:, None])
        exp_RC = z_RC.exp()
        shrink_R = shift_R.exp()
        a_R = shrink_R * (a_R + s_R * shift_R)
        s_R = shrink_R * s_R + exp_RC.sum(1)
        a_R += exp_RC.mul_(z_RC).sum(1)
    log_s_R = s_R.log()
    # s is at least 1 and a at most 0, whatever the rounding: the entropy cannot come out negative.
    return (target_R - m_R) - log_s_R, m_R + log_s_R, log_s_R - a_R / s_R


def _backward_tiles(
    per_row: _Rows,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    entropy_grad: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the given rows, of the weight and of the bias, each where needed; summed in fp32 at least."""
    needs_hidden, needs_weight, needs_bias = needs
    num_rows, dtype = len(per_row.hidden), per_row.lse.dtype
    sum_hidden = torch.zeros_like(per_row.hidden, dtype=dtype) if needs_hidden else None
    grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
    grad_bias_V = torch.zeros_like(bias_V) if needs_bias and bias_V is not None else None
    rows_per_tile, columns_per_tile = _tile_shape(num_rows, len(weight_VD), weight_VD.device)
    # Vocabulary outside: the fp32 sum for the weight is then one slice wide, not [V, D].
    for columns in _slices(len(weight_VD), columns_per_tile):
        sum_weight_CD = torch.zeros_like(weight_VD[columns], dtype=dtype)
        sum_bias_C = sum_weight_CD.new_zeros(len(sum_weight_CD))
        for rows in _slices(num_rows, rows_per_tile):
            tile = _Rows(*(field[rows] for field in per_row))
            grad_RC = _grad_logits_tile(tile, weight_VD, bias_V, columns, temperature, entropy_grad)
            if sum_hidden is not None:
                _add_product(sum_hidden[rows], grad_RC, weight_VD[columns])
            if grad_weight_VD is not None:
                _add_product(sum_weight_CD, grad_RC.T, tile.hidden)
            if grad_bias_V is not None:
                sum_bias_C += grad_RC.sum(0)
        if grad_weight_VD is not None:
            grad_weight_VD[columns] = sum_weight_CD
        if grad_bias_V is not None:
            grad_bias_V[columns] = sum_bias_C
    grad_hidden = None if sum_hidden is None else sum_hidden.to(per_row.hidden.dtype)
    return grad_hidden, grad_weight_VD, grad_bias_V


def _grad_logits_tile(
    tile: _Rows, weight_VD: Tensor, bias_V: Tensor | None, columns: slice, temperature: float, entropy_grad: bool
) -> Tensor:
    """dL/d(hidden @ weight.T + bias) on one tile, by the formula atop this file."""
    log_p_RC = _logits_tile(tile.hidden, weight_VD, bias_V, columns, temperature).sub_(tile.lse[:, None])
    # d z / d logits = 1 / temperature goes into the row factors, which are few.
    grad_logprobs_R = tile.grad_logprobs / temperature
    if entropy_grad:
        grad_entropy_R1 = (tile.grad_entropy / temperature)[:, None]
        factor_RC = (log_p_RC + tile.entropy[:, None]).mul_(grad_entropy_R1).add_(grad_logprobs_R[:, None]).neg_()
        grad_RC = log_p_RC.exp_().mul_(factor_RC)
    else:
        grad_RC = log_p_RC.exp_().mul_(-grad_logprobs_R[:, None])
    column_R, inside_R = _locate(tile.targets, columns)
    return grad_RC.scatter_add_(1, column_R[:, None], torch.where(inside_R, grad_logprobs_R, 0)[:, None])


def _logits_tile(
    hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, columns: slice, temperature: float
) -> Tensor:
    """Scaled logits of some rows and columns, fp32 at least, in memory of their own."""
    logits_RC = F.linear(hidden_RD, weight_VD[columns], None if bias_V is None else bias_V[columns])
    logits_RC = logits_RC.to(torch.promote_types(logits_RC.dtype, torch.float32))
    return logits_RC if temperature == 1 else logits_RC.div_(temperature)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, the product in the dtype of the model, the sum in that of ``total``.

    Two steps on purpose: a fused product may be added to ``total`` term by term (BLAS does so for narrow matrices), and
    150,000 small terms after a large one then lose ten times the digits.
    """
    total += left.to(right.dtype) @ right


def _locate(targets_R: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column inside the slice (clamped into it), and whether it really lies there."""
    column_R = targets_R - columns.start
    width = columns.stop - columns.start
    return column_R.clamp(0, width - 1), (column_R >= 0) & (column_R < width)


def _tile_shape(num_rows: int, num_columns: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile within the device's budget."""
    elements = TILE_ELEMENTS_CPU if device.type == "cpu" else TILE_ELEMENTS
    columns = min(num_columns, TILE_COLUMNS)
    return max(1, min(num_rows, elements // columns)), columns


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
