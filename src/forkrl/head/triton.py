"""Token statistics in Triton kernels: one fused pass over the vocabulary forward, live rows only backward.

Forward: a program computes some rows against a split of the vocabulary, tile by tile, and keeps per row the largest
logit ``m``, ``s = sum(exp((x - m) / T))``, ``a = sum(exp((x - m) / T) (x - m))`` and the target's logit; ``x`` are
logits before the temperature ``T``. The splits are combined afterwards. Backward: a kernel computes the logits again
and writes dL/dlogits of the live rows for a slice of the vocabulary, in the dtype of the model, into a buffer of
bounded size; the matrix products that follow are the library's.

    dL/dx_j = (g_logp (1[j = target] - p_j) - g_H p_j (log p_j + H)) / T

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary; ``S`` splits of the vocabulary in the forward; ``R`` rows and ``C``
columns of a slice in the backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from forkrl.head.live_rows import Gradients, Needs, Rows, Scanned, live_row_stats, slices
from forkrl.head.triton_kernels import INTERPRETED, grad_kernel, scan_kernel
from forkrl.types import TokenStats

NUM_PROGRAMS = 4096
"""Programs that a forward is cut into, if it can be: some fifteen for each place on a large card, so that the last
ones to finish leave little of it idle. It bounds the partial results as well, to 8 MiB."""
MIN_SPLITS = 32
"""Splits of the vocabulary however many rows there are: a group of rows meets that many weight tiles in the cache."""
BUFFER_BYTES = 64 << 20
"""Most that dL/dlogits of a slice may hold."""
BUFFER_SHARE = 16
"""It holds at most this fraction of the live rows' logits, but BUFFER_FLOOR in any case."""
BUFFER_FLOOR = 4 << 20
SLICE_COLUMNS = 1024
"""A slice's width is a multiple of this, so that the products after the kernel stay large."""


class Tile(NamedTuple):
    """What one program computes at a time, and with what: it loads ``stages`` steps of ``depth`` ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


# A table rather than a search: what wins a search depends on the moment, and with it the order of summation; a resumed
# run must repeat an uninterrupted one. Shared memory is (rows + columns) x depth x bytes x stages.
HOPPER_TILE = Tile(128, 128, 64, 8, 3, registers=128)
"""With 96 KiB and half the registers, two programs share a multiprocessor: the exponentials of one hide behind the
product of the other. Left alone, the compiler takes 210 registers for the scan; at 128 it spills five."""
TILE = Tile(128, 128, 32, 8, 4)
"""64 KiB at most: consumer cards have 99."""
FP32_TILE = Tile(64, 64, 32, 4, 2)
"""Exact fp32 products use no matrix units; the tile is what registers hold."""
INTERPRETER_TILE = Tile(16, 32, 16, 1, 1)


def triton_token_stats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    *,
    temperature: float,
    entropy_grad: bool,
) -> TokenStats:
    """Softmax statistics in Triton kernels (arXiv 2506.01939v2, eq. 1), as :func:`token_stats` describes them."""
    if hidden_ND.dtype == torch.float64:
        raise ValueError('backend = "triton" has no fp64; "chunked" and "reference" do')
    if not (hidden_ND.is_cuda or INTERPRETED):
        raise ValueError(
            f'backend = "triton" runs on a CUDA device; the tensors are on {hidden_ND.device.type}. Use "chunked", or '
            "set TRITON_INTERPRET=1 before Triton is imported to run its interpreter (slow, for tests)"
        )
    inputs = (hidden_ND.contiguous(), weight_VD.contiguous(), targets_N.contiguous())
    bias_V = None if bias_V is None else bias_V.contiguous()
    return live_row_stats(_scan_rows, _backward_slices, *inputs, bias_V, temperature, entropy_grad)


def _scan_rows(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None, temperature: float
) -> Scanned:
    """The statistics of every row."""
    num_rows, vocabulary, tile = len(hidden_ND), len(weight_VD), _choose_tile(hidden_ND)
    columns_per_split = _split_width(num_rows, vocabulary, tile)
    num_splits, num_blocks = triton.cdiv(vocabulary, columns_per_split), triton.cdiv(num_rows, tile.rows)
    partial_4SN = torch.empty(4, num_splits, num_rows, dtype=torch.float32, device=hidden_ND.device)
    if num_rows:
        with torch.cuda.device_of(hidden_ND):
            scan_kernel[(num_blocks * num_splits,)](
                hidden_ND,
                weight_VD,
                targets_N,
                bias_V,
                *partial_4SN,
                num_rows,
                vocabulary,
                columns_per_split,
                math.log2(math.e) / temperature,
                **compile_options(hidden_ND.shape[1], hidden_ND.dtype, bias_V is not None, tile),
            )
    return _combine_splits(partial_4SN, temperature)


def _combine_splits(partial_4SN: Tensor, temperature: float) -> Scanned:
    """The statistics of rows whose vocabulary was split."""
    m_SN, s_SN, a_SN, target_SN = partial_4SN
    m_N = m_SN.amax(0)
    shift_SN = m_SN - m_N
    shrink_SN = (shift_SN / temperature).exp()
    s_N = (shrink_SN * s_SN).sum(0)
    a_N = (shrink_SN * (a_SN + s_SN * shift_SN)).sum(0)
    log_s_N = s_N.log()
    # s is at least 1, a at most 0 and the target's logit at most m, whatever the rounding: no log-prob comes out
    # positive and no entropy negative. Only the target's own split has written anything but 0 for it.
    logprobs_N = (target_SN.sum(0) - m_N) / temperature - log_s_N
    return Scanned(logprobs_N, m_N, log_s_N, log_s_N - a_N / (s_N * temperature))


def _backward_slices(
    per_row: Rows,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    entropy_grad: bool,
    needs: Needs,
) -> Gradients:
    """Gradients of the given rows, of the weight and of the bias, each where needed; summed in fp32."""
    hidden_RD, vocabulary = per_row.hidden, len(weight_VD)
    width = _slice_width(len(hidden_RD), vocabulary, hidden_RD.element_size())
    buffer_RC = hidden_RD.new_empty(len(hidden_RD), width)
    sum_hidden_RD = torch.zeros_like(hidden_RD, dtype=torch.float32) if needs.hidden else None
    grad_weight_VD = torch.zeros_like(weight_VD) if needs.weight else None
    grad_bias_V = torch.zeros_like(bias_V) if needs.bias and bias_V is not None else None
    columns_of_slices = slices(vocabulary, width) if len(hidden_RD) else []
    # A caller may be inside autocast, which would cast what is summed in fp32.
    with torch.autocast(hidden_RD.device.type, enabled=False):
        for columns in columns_of_slices:
            grad_RC = _grad_logits(per_row, weight_VD, bias_V, columns, temperature, entropy_grad, buffer_RC)
            if sum_hidden_RD is not None:
                sum_hidden_RD += _fp32_product(grad_RC, weight_VD[columns])
            if grad_weight_VD is not None:
                torch.mm(grad_RC.T, hidden_RD, out=grad_weight_VD[columns])
            if grad_bias_V is not None:
                grad_bias_V[columns] = grad_RC.sum(0, dtype=torch.float32)
    grad_hidden_RD = None if sum_hidden_RD is None else sum_hidden_RD.to(hidden_RD.dtype)
    return Gradients(grad_hidden_RD, grad_weight_VD, grad_bias_V)


def _grad_logits(
    per_row: Rows,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    columns: slice,
    temperature: float,
    entropy_grad: bool,
    buffer_RC: Tensor,
) -> Tensor:
    """dL/d(hidden @ weight.T + bias) for a slice of the vocabulary, in the buffer's memory."""
    hidden_RD, tile = per_row.hidden, _choose_tile(per_row.hidden)
    num_rows, width = len(hidden_RD), columns.stop - columns.start
    num_programs = triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns)
    with torch.cuda.device_of(hidden_RD):
        grad_kernel[(num_programs,)](
            hidden_RD,
            weight_VD,
            per_row.targets,
            bias_V,
            per_row.highest,
            per_row.log_s,
            per_row.entropy,
            # d (x / T) / dx = 1 / T goes into the row factors, which are few. They may arrive expanded, with stride 0.
            (per_row.grad_logprobs / temperature).contiguous(),
            (per_row.grad_entropy / temperature).contiguous(),
            buffer_RC,
            num_rows,
            columns.start,
            columns.stop,
            buffer_RC.shape[1],
            1 / temperature,
            ENTROPY_GRAD=entropy_grad,
            **compile_options(hidden_RD.shape[1], hidden_RD.dtype, bias_V is not None, tile),
        )
    return buffer_RC[:, :width]


def _fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in fp32; a CPU and ROCm round 16-bit products to their own dtype first."""
    if left.is_cuda and left.dtype != torch.float32 and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def _choose_tile(hidden_ND: Tensor) -> Tile:
    if INTERPRETED:
        return INTERPRETER_TILE
    if hidden_ND.dtype == torch.float32:
        return FP32_TILE
    return HOPPER_TILE if torch.cuda.get_device_capability(hidden_ND.device)[0] == 9 else TILE


def compile_options(width: int, dtype: torch.dtype, has_bias: bool, tile: Tile) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "D": width,
        "HAS_BIAS": has_bias,
        "EVEN_D": width % tile.depth == 0,
        "BLOCK_N": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_D": tile.depth,
        # Triton's own choice for fp32 is TF32, which keeps three digits.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        # The interpreter multiplies the bit patterns of bf16; its products are exact in fp32.
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }


def _split_width(num_rows: int, vocabulary: int, tile: Tile) -> int:
    """Columns of a split in the forward, in whole tiles."""
    num_blocks, num_tiles = max(1, triton.cdiv(num_rows, tile.rows)), triton.cdiv(vocabulary, tile.columns)
    num_splits = min(num_tiles, max(MIN_SPLITS, triton.cdiv(NUM_PROGRAMS, num_blocks)))
    return int(triton.cdiv(num_tiles, num_splits)) * tile.columns


def _slice_width(num_rows: int, vocabulary: int, element_size: int) -> int:
    """Columns of a slice in the backward, so that its gradient keeps within the buffer."""
    share = num_rows * vocabulary * element_size // BUFFER_SHARE
    num_bytes = min(BUFFER_BYTES, max(BUFFER_FLOOR, share))
    columns = num_bytes // (max(1, num_rows) * element_size) // SLICE_COLUMNS * SLICE_COLUMNS
    return min(vocabulary, max(SLICE_COLUMNS, columns))
