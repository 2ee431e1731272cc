"""Token statistics in tiles of rows and vocabulary, forward and backward, so memory does not grow with N x V.

Forward, per row: running maximum ``m``, ``s = sum(exp(z - m))``, ``a = sum(exp(z - m) (z - m))``; then
``log p = (z - m) - log s`` and ``H = log s - a / s``. Backward, on tiles recomputed for live rows:

    dL/dz_j = g_logp (1[j = target] - p_j) - g_H p_j (log p_j + H)

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary; ``R`` rows and ``C`` columns of a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from forkrl.head.live_rows import Gradients, Head, Needs, Rows, Scanned, live_row_stats, slices
from forkrl.types import TokenStats

TILE_ELEMENTS_CPU = 1 << 20
"""Logits per tile on a CPU: 4 MiB in fp32, which fits the cache."""
TILE_ELEMENTS = 1 << 24
"""Logits per tile elsewhere: 64 MiB in fp32, for few, large kernels. Two or three tiles coexist."""
TILE_COLUMNS = 8192
"""Widest slice of the vocabulary."""
FORWARD_COLUMNS = 2048
"""Narrowest slice in the forward, where every slice costs a few operations per row."""
BACKWARD_COLUMNS = 256
"""Narrowest slice in the backward: a tile with all rows writes the weight gradient in one go."""


def chunked_token_stats(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> TokenStats:
    return live_row_stats(scan_rows, backward_tiles, hidden_ND, targets_N, head)


def scan_rows(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Scanned:
    """Statistics of every row; logits do not outlive their tile unless it is the only one."""
    num_rows, vocabulary = len(hidden_ND), len(head.weight)
    rows_per_tile, columns_per_tile = _tile_shape(num_rows, vocabulary, hidden_ND.device, FORWARD_COLUMNS)
    if num_rows <= rows_per_tile and vocabulary <= columns_per_tile:
        return _scan_vocabulary(hidden_ND, targets_N, head, columns_per_tile, keep=True)
    found_4N = hidden_ND.new_empty(4, num_rows, dtype=_summing_dtype(hidden_ND))
    for rows in slices(num_rows, rows_per_tile):
        scanned = _scan_vocabulary(hidden_ND[rows], targets_N[rows], head, columns_per_tile, keep=False)
        found_4N[:, rows] = torch.stack(scanned[:4])
    return Scanned(*found_4N)


def _scan_vocabulary(hidden_RD: Tensor, targets_R: Tensor, head: Head, columns_per_tile: int, *, keep: bool) -> Scanned:
    """Statistics of a block of rows in one pass over the vocabulary; ``keep`` returns a single slice's log-probs."""
    dtype = _summing_dtype(hidden_RD)
    # Lowest finite number, not -inf: 0 * (m - new_m) below must be 0 on the first tile.
    m_R = torch.full(targets_R.shape, torch.finfo(dtype).min, dtype=dtype, device=hidden_RD.device)
    s_R, a_R, target_R = (torch.zeros_like(m_R) for _ in range(3))
    for columns in slices(len(head.weight), columns_per_tile):
        z_RC = _logits_tile(hidden_RD, head, columns)
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
    # s >= 1 and a <= 0 even after rounding, so the entropy is not negative.
    log_p_RV = z_RC.sub_(log_s_R[:, None]) if keep else None
    return Scanned((target_R - m_R) - log_s_R, m_R, log_s_R, log_s_R - a_R / s_R, log_p_RV)


def backward_tiles(per_row: Rows, head: Head, needs: Needs) -> Gradients:
    """Gradients of the given rows, the weight and the bias, summed in at least fp32."""
    num_rows, vocabulary, dtype = len(per_row.hidden), len(head.weight), per_row.log_s.dtype
    sum_hidden = torch.zeros_like(per_row.hidden, dtype=dtype) if needs.hidden else None
    new = torch.empty_like if num_rows else torch.zeros_like  # any row writes all of them
    grad_weight_VD = new(head.weight) if needs.weight else None
    grad_bias_V = new(head.bias) if needs.bias and head.bias is not None else None
    rows_per_tile, columns_per_tile = _tile_shape(num_rows, vocabulary, per_row.hidden.device, BACKWARD_COLUMNS)
    row_slices = slices(num_rows, rows_per_tile)
    # Vocabulary in the outer loop: the fp32 sum for the weight is one slice wide, not [V, D].
    for columns in slices(vocabulary, columns_per_tile) if num_rows else []:
        weight_CD = head.weight[columns].to(per_row.hidden.dtype)
        several = needs.weight and len(row_slices) > 1
        sum_weight_CD = torch.zeros_like(weight_CD, dtype=dtype) if several else None
        sum_bias_C = torch.zeros(len(weight_CD), dtype=dtype, device=weight_CD.device)
        for rows in row_slices:
            tile = per_row.take(rows)
            grad_RC = _grad_logits_tile(tile, head, columns)
            if grad_bias_V is not None:
                sum_bias_C += grad_RC.sum(0)
            grad_RC = grad_RC.to(weight_CD.dtype)
            if sum_hidden is not None:
                _add_product(sum_hidden[rows], grad_RC, weight_CD)
            if sum_weight_CD is not None:
                _add_product(sum_weight_CD, grad_RC.T, tile.hidden)
            elif grad_weight_VD is not None:
                torch.mm(grad_RC.T, tile.hidden, out=grad_weight_VD[columns])
        if grad_weight_VD is not None and sum_weight_CD is not None:
            grad_weight_VD[columns] = sum_weight_CD
        if grad_bias_V is not None:
            grad_bias_V[columns] = sum_bias_C
    grad_hidden = None if sum_hidden is None else sum_hidden.to(per_row.hidden.dtype)
    return Gradients(grad_hidden, grad_weight_VD, grad_bias_V)


def _grad_logits_tile(tile: Rows, head: Head, columns: slice) -> Tensor:
    """dL/d(hidden @ weight.T + bias) on one tile (formula in the module docstring)."""
    if tile.log_p is None:
        z_RC = _logits_tile(tile.hidden, head, columns)
        log_p_RC = z_RC.sub_(tile.highest[:, None]).sub_(tile.log_s[:, None])
    else:
        log_p_RC = tile.log_p[:, columns].clone()  # the graph may be traversed twice
    # d z / d logits = 1 / temperature, folded into the row factors because they are few.
    grad_logprobs_R = tile.grad_logprobs / head.temperature
    if head.entropy_grad:
        grad_entropy_R1 = (tile.grad_entropy / head.temperature)[:, None]
        factor_RC = (log_p_RC + tile.entropy[:, None]).mul_(grad_entropy_R1).add_(grad_logprobs_R[:, None]).neg_()
        grad_RC = log_p_RC.exp_().mul_(factor_RC)
    else:
        grad_RC = log_p_RC.exp_().mul_(-grad_logprobs_R[:, None])
    column_R, inside_R = _locate(tile.targets, columns)
    return grad_RC.scatter_add_(1, column_R[:, None], torch.where(inside_R, grad_logprobs_R, 0)[:, None])


def _logits_tile(hidden_RD: Tensor, head: Head, columns: slice) -> Tensor:
    """Scaled logits of a tile, at least fp32; ``hidden_RD`` may be more precise than the weight."""
    weight_CD, bias_C = (None if part is None else part[columns].to(hidden_RD.dtype) for part in head[:2])
    assert weight_CD is not None
    logits_RC = F.linear(hidden_RD, weight_CD, bias_C)
    logits_RC = logits_RC.to(_summing_dtype(logits_RC))
    return logits_RC if head.temperature == 1 else logits_RC.div_(head.temperature)


def _summing_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``: product in the model's dtype, sum in the dtype of ``total``."""
    # Not fused: BLAS may add narrow products term by term, and 150,000 small terms after a large one lose a digit.
    total += left @ right


def _locate(targets_R: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in the slice (clamped), and whether it is inside."""
    column_R = targets_R - columns.start
    width = columns.stop - columns.start
    return column_R.clamp(0, width - 1), (column_R >= 0) & (column_R < width)


def _tile_shape(num_rows: int, num_columns: int, device: torch.device, narrowest: int) -> tuple[int, int]:
    """Rows and columns of a tile within the device's budget: all rows unless that is too narrow."""
    elements = TILE_ELEMENTS_CPU if device.type == "cpu" else TILE_ELEMENTS
    columns = min(num_columns, TILE_COLUMNS, max(narrowest, elements // max(1, num_rows)))
    return max(1, min(num_rows, elements // columns)), columns
