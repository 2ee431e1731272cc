"""Token statistics in Triton kernels: one fused pass over the vocabulary forward, live rows only backward.

Forward: each program scans a split of the vocabulary for some rows and keeps the largest logit ``m``,
``s = sum(exp((x - m) / T))``, ``a = sum(exp((x - m) / T) (x - m))`` and the target's logit, with ``x`` the logits
before the temperature ``T``. Backward: a kernel writes dL/dlogits of live rows for a vocabulary slice to a bounded
buffer, in the model's dtype; the library computes the matrix products.

    dL/dx_j = (g_logp (1[j = target] - p_j) - g_H p_j (log p_j + H)) / T

Axes: ``N`` rows, ``D`` hidden, ``V`` vocabulary; ``S`` splits (forward), ``R`` rows and ``C`` columns of a slice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from forkrl.errors import UserError, first_line
from forkrl.head import chunked
from forkrl.head.live_rows import Differentiate, Gradients, Head, Needs, Rows, Scan, Scanned, live_row_stats, slices
from forkrl.head.triton_kernels import INTERPRETED, grad_kernel, scan_kernel
from forkrl.types import TokenStats

NUM_PROGRAMS = 4096
"""Most programs of a forward: about 15 per slot of a large GPU. Bounds the partial results to 8 MiB."""
MIN_SPLITS = 32
"""Fewest splits of the vocabulary: a group of rows shares that many weight tiles in the cache."""
BUFFER_BYTES = 64 << 20
"""Largest buffer for dL/dlogits of a slice."""
BUFFER_SHARE = 16
"""The buffer holds at most 1/16 of the live rows' logits, but at least BUFFER_FLOOR."""
BUFFER_FLOOR = 4 << 20
SLICE_COLUMNS = 1024
"""A slice's width is a multiple of this, so that the products after the kernel stay large."""


class Tile(NamedTuple):
    """Launch parameters: a program computes ``rows`` x ``columns`` and prefetches ``stages`` steps of ``depth``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


# Fixed, not autotuned: a resumed run must repeat an uninterrupted one, including the order of summation. Shared memory
# is (rows + columns) x depth x bytes x stages.
HOPPER_TILE = Tile(128, 128, 64, 8, 3, registers=128)
"""96 KiB and half the registers, so that two programs share a multiprocessor: one computes exponentials while the other
multiplies. The compiler's default is 210 registers for the scan; at 128 it spills five."""
TILE = Tile(128, 128, 32, 8, 4)
"""At most 64 KiB: consumer GPUs have 99."""
FP32_TILE = Tile(64, 64, 32, 4, 2)
"""Exact fp32 products use no tensor cores; the tile must fit in registers."""
INTERPRETER_TILE = Tile(16, 32, 16, 1, 1)

CHECKED_ROWS = 4
"""Rows of the first call on which the kernels are checked against the chunked backend."""
STATS_TOLERANCE = 1e-3
"""For log-probs and entropies, relative to the size of the logits: fp32 sums differ in the sixth digit."""
GRADIENT_TOLERANCE = 0.05
"""For the gradient of the hidden states, summed from 16-bit numbers, relative to it and to the weight."""
_checked: set[tuple[object, ...]] = set()


def triton_token_stats(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> TokenStats:
    """Statistics in Triton kernels, checked against the chunked backend on first use."""
    if hidden_ND.dtype == torch.float64:
        raise ValueError('backend = "triton" has no fp64; "chunked" and "reference" do')
    if not (hidden_ND.is_cuda or INTERPRETED):
        raise ValueError(
            f'backend = "triton" runs on a CUDA device; the tensors are on {hidden_ND.device.type}. Use "chunked", or '
            "set TRITON_INTERPRET=1 before Triton is imported to run its interpreter (slow, for tests)"
        )
    bias_V = None if head.bias is None else head.bias.contiguous()
    head = head._replace(weight=head.weight.contiguous(), bias=bias_V)
    hidden_ND, targets_N = hidden_ND.contiguous(), targets_N.contiguous()
    _check_kernels(hidden_ND.detach()[:CHECKED_ROWS], targets_N[:CHECKED_ROWS], head)
    return live_row_stats(_scan_rows, _backward_slices, hidden_ND, targets_N, head)


@torch.no_grad()
def _check_kernels(hidden_RD: Tensor, targets_R: Tensor, head: Head) -> None:
    """Check both kernels against chunked fp32, once per process, device and compiled variant; UserError on failure."""
    variant = (hidden_RD.device, hidden_RD.dtype, hidden_RD.shape[1], head.bias is None, head.entropy_grad)
    if variant in _checked or not len(hidden_RD):
        return
    remedy = 'use backend="chunked" (recipe: model.head=chunked) and report this with the GPU and the version of Triton'
    try:
        stats_2R, gradient_RD, _ = _probe(_scan_rows, _backward_slices, hidden_RD, targets_R, head)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler raises many kinds
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f'backend = "triton" does not run on {hidden_RD.device} ({reason}); {remedy}') from error
    right_2R, right_RD, highest_R = _probe(
        chunked.scan_rows, chunked.backward_tiles, hidden_RD.float(), targets_R, head
    )
    usable_R = right_2R.isfinite().all(0) & right_RD.isfinite().all(1)
    if not usable_R.any():
        return
    norm_R = head.weight[targets_R].float().norm(dim=1).cpu() * (1 + right_2R[1]) / head.temperature
    stats_error_2R = (stats_2R - right_2R).abs() / (1 + highest_R.abs() + right_2R[0].abs())
    gradient_error_R = (gradient_RD - right_RD).norm(dim=1) / (right_RD.norm(dim=1) + norm_R[usable_R].max())
    errors = float(stats_error_2R[:, usable_R].max()), float(gradient_error_R[usable_R].max())
    if not (errors[0] <= STATS_TOLERANCE and errors[1] <= GRADIENT_TOLERANCE):  # NaN deviates as well
        raise UserError(
            f'backend = "triton" gives wrong numbers on {hidden_RD.device}. Relative deviation from "chunked": '
            f"{errors[0]:.2g} in log-probs and entropies (tolerance {STATS_TOLERANCE}), {errors[1]:.2g} in gradients "
            f"(tolerance {GRADIENT_TOLERANCE}); {remedy}"
        )
    _checked.add(variant)


def _probe(
    scan: Scan, differentiate: Differentiate, hidden_RD: Tensor, targets_R: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies ``[2, R]``, the gradient of their sum by ``hidden_RD``, and the largest logits."""
    found = scan(hidden_RD, targets_R, head)
    ones_R = torch.ones_like(found.logprobs)
    rows = Rows(hidden_RD, targets_R, found.highest, found.log_s, found.entropy, ones_R, ones_R, found.log_p)
    gradient_RD = differentiate(rows, head, Needs(hidden=True, weight=False, bias=False)).hidden
    assert gradient_RD is not None, "asked for"
    # The CPU copy synchronises, which is when kernels report their faults.
    return torch.stack([found.logprobs, found.entropy]).cpu(), gradient_RD.float().cpu(), found.highest.cpu()


def _scan_rows(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Scanned:
    num_rows, vocabulary, tile = len(hidden_ND), len(head.weight), _choose_tile(hidden_ND)
    columns_per_split = _split_width(num_rows, vocabulary, tile)
    num_splits, num_blocks = triton.cdiv(vocabulary, columns_per_split), triton.cdiv(num_rows, tile.rows)
    partial_4SN = torch.empty(4, num_splits, num_rows, dtype=torch.float32, device=hidden_ND.device)
    if num_rows:
        with torch.cuda.device_of(hidden_ND):
            scan_kernel[(num_blocks * num_splits,)](
                hidden_ND,
                head.weight,
                targets_N,
                head.bias,
                *partial_4SN,
                num_rows,
                vocabulary,
                columns_per_split,
                math.log2(math.e) / head.temperature,
                **compile_options(hidden_ND.shape[1], hidden_ND.dtype, head.bias is not None, tile),
            )
    return _combine_splits(partial_4SN, head.temperature)


def _combine_splits(partial_4SN: Tensor, temperature: float) -> Scanned:
    m_SN, s_SN, a_SN, target_SN = partial_4SN
    m_N = m_SN.amax(0)
    shift_SN = m_SN - m_N
    shrink_SN = (shift_SN / temperature).exp()
    s_N = (shrink_SN * s_SN).sum(0)
    a_N = (shrink_SN * (a_SN + s_SN * shift_SN)).sum(0)
    log_s_N = s_N.log()
    # s >= 1, a <= 0 and the target's logit <= m even after rounding: no log-prob is positive, no entropy negative. Only
    # the target's own split writes a non-zero target logit.
    logprobs_N = (target_SN.sum(0) - m_N) / temperature - log_s_N
    return Scanned(logprobs_N, m_N, log_s_N, log_s_N - a_N / (s_N * temperature))


def _backward_slices(per_row: Rows, head: Head, needs: Needs) -> Gradients:
    """Gradients of the given rows, the weight and the bias, summed in fp32."""
    hidden_RD, vocabulary = per_row.hidden, len(head.weight)
    width = _slice_width(len(hidden_RD), vocabulary, hidden_RD.element_size())
    buffer_RC = hidden_RD.new_empty(len(hidden_RD), width)
    sum_hidden_RD = torch.zeros_like(hidden_RD, dtype=torch.float32) if needs.hidden else None
    grad_weight_VD = torch.zeros_like(head.weight) if needs.weight else None
    grad_bias_V = torch.zeros_like(head.bias) if needs.bias and head.bias is not None else None
    columns_of_slices = slices(vocabulary, width) if len(hidden_RD) else []
    # The caller may be inside autocast, which would cast the fp32 sums.
    with torch.autocast(hidden_RD.device.type, enabled=False):
        for columns in columns_of_slices:
            grad_RC = _grad_logits(per_row, head, columns, buffer_RC)
            if sum_hidden_RD is not None:
                sum_hidden_RD += _fp32_product(grad_RC, head.weight[columns])
            if grad_weight_VD is not None:
                torch.mm(grad_RC.T, hidden_RD, out=grad_weight_VD[columns])
            if grad_bias_V is not None:
                grad_bias_V[columns] = grad_RC.sum(0, dtype=torch.float32)
    grad_hidden_RD = None if sum_hidden_RD is None else sum_hidden_RD.to(hidden_RD.dtype)
    return Gradients(grad_hidden_RD, grad_weight_VD, grad_bias_V)


def _grad_logits(per_row: Rows, head: Head, columns: slice, buffer_RC: Tensor) -> Tensor:
    """dL/d(hidden @ weight.T + bias) for a slice of the vocabulary, in the buffer's memory."""
    hidden_RD, tile = per_row.hidden, _choose_tile(per_row.hidden)
    num_rows, width = len(hidden_RD), columns.stop - columns.start
    num_programs = triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns)
    with torch.cuda.device_of(hidden_RD):
        grad_kernel[(num_programs,)](
            hidden_RD,
            head.weight,
            per_row.targets,
            head.bias,
            per_row.highest,
            per_row.log_s,
            per_row.entropy,
            # d (x / T) / dx = 1 / T, folded into the few row factors, which may arrive expanded (stride 0).
            (per_row.grad_logprobs / head.temperature).contiguous(),
            (per_row.grad_entropy / head.temperature).contiguous(),
            buffer_RC,
            num_rows,
            columns.start,
            columns.stop,
            buffer_RC.shape[1],
            1 / head.temperature,
            ENTROPY_GRAD=head.entropy_grad,
            **compile_options(hidden_RD.shape[1], hidden_RD.dtype, head.bias is not None, tile),
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
    """Compile-time arguments of both kernels."""
    return {
        "D": width,
        "HAS_BIAS": has_bias,
        "EVEN_D": width % tile.depth == 0,
        "BLOCK_N": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_D": tile.depth,
        # Triton's default for fp32 is TF32, which keeps three digits.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        # The interpreter multiplies the bit patterns of bf16; fp32 products are exact.
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }


def _split_width(num_rows: int, vocabulary: int, tile: Tile) -> int:
    """Columns of a forward split, in whole tiles."""
    num_blocks, num_tiles = max(1, triton.cdiv(num_rows, tile.rows)), triton.cdiv(vocabulary, tile.columns)
    num_splits = min(num_tiles, max(MIN_SPLITS, triton.cdiv(NUM_PROGRAMS, num_blocks)))
    return int(triton.cdiv(num_tiles, num_splits)) * tile.columns


def _slice_width(num_rows: int, vocabulary: int, element_size: int) -> int:
    """Columns of a backward slice, so that its gradient fits the buffer."""
    share = num_rows * vocabulary * element_size // BUFFER_SHARE
    num_bytes = min(BUFFER_BYTES, max(BUFFER_FLOOR, share))
    columns = num_bytes // (max(1, num_rows) * element_size * SLICE_COLUMNS) * SLICE_COLUMNS
    return min(vocabulary, max(SLICE_COLUMNS, columns))
