"""Device code of the "triton" backend. Axes: ``N`` rows, ``D`` hidden, ``V`` columns; ``BLOCK_*`` per program."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton compiles these functions itself; their arguments have no types of Python's.

import triton
import triton.language as tl

GROUP_BLOCKS = tl.constexpr(16)
"""Blocks of rows that traverse the vocabulary together, so that hidden states and weights stay in the cache."""


@triton.jit
def scan_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    bias_ptr,
    m_ptr,
    s_ptr,
    a_ptr,
    target_logit_ptr,
    num_rows,
    vocabulary,
    columns_per_split,
    exponent_scale,  # log2(e) / T: the hardware exponential is base 2
    D: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``m``, ``s``, ``a`` and the target's logit of a block of rows over one split of the vocabulary."""
    num_splits = tl.cdiv(vocabulary, columns_per_split)
    block, split = _grouped(tl.cdiv(num_rows, BLOCK_N), num_splits)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    targets = tl.load(targets_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int32)
    # Lowest finite number, not -inf: the difference of two is 0, not NaN.
    lowest: tl.constexpr = -3.4028234663852886e38
    m = tl.full([BLOCK_N], lowest, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    a = tl.zeros([BLOCK_N], tl.float32)
    target_logit = tl.zeros([BLOCK_N], tl.float32)
    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, vocabulary)
    for start in range(first, last, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        x = _logits(
            hidden_ptr, weight_ptr, bias_ptr, rows, columns, num_rows, vocabulary,
            D, HAS_BIAS, EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        if start + BLOCK_V > last:
            x = tl.where((columns < last)[None, :], x, lowest)
        # Few tiles hold a target; the others skip the elementwise comparison.
        in_tile = (targets >= start) & (targets < start + BLOCK_V)
        if tl.max(in_tile.to(tl.int32), 0) > 0:
            target_logit += tl.sum(tl.where(columns[None, :] == targets[:, None], x, 0.0), 1)
        new_m = tl.maximum(m, tl.max(x, 1))
        shift = m - new_m
        # Subtract before scaling: a fused multiply-add could turn 0 into a small positive exponent.
        x -= new_m[:, None]
        e = tl.exp2(x * exponent_scale)
        shrink = tl.exp2(shift * exponent_scale)
        a = shrink * (a + s * shift) + tl.sum(e * x, 1)
        s = shrink * s + tl.sum(e, 1)
        m = new_m
    stored = rows < num_rows
    offsets = split.to(tl.int64) * num_rows + rows
    tl.store(m_ptr + offsets, m, mask=stored)
    tl.store(s_ptr + offsets, s, mask=stored)
    tl.store(a_ptr + offsets, a, mask=stored)
    tl.store(target_logit_ptr + offsets, target_logit, mask=stored)


@triton.jit
def grad_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    bias_ptr,
    m_ptr,
    log_s_ptr,
    entropy_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    grad_logits_ptr,
    num_rows,
    first,
    last,
    row_stride,
    inverse_temperature,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of dL/dlogits for columns ``first`` to ``last``, by the formula in triton.py."""
    block, column_block = _grouped(tl.cdiv(num_rows, BLOCK_N), tl.cdiv(last - first, BLOCK_V))
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    start = first + column_block * BLOCK_V
    columns = start + tl.arange(0, BLOCK_V)
    x = _logits(
        hidden_ptr, weight_ptr, bias_ptr, rows, columns, num_rows, last,
        D, HAS_BIAS, EVEN_D, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, UPCAST,
    )  # fmt: skip
    inside = rows < num_rows
    m = tl.load(m_ptr + rows, mask=inside, other=0.0)
    log_s = tl.load(log_s_ptr + rows, mask=inside, other=0.0)
    grad_logprobs = tl.load(grad_logprobs_ptr + rows, mask=inside, other=0.0)
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1).to(tl.int32)
    log_p = (x - m[:, None]) * inverse_temperature - log_s[:, None]
    p = tl.exp(log_p)
    if ENTROPY_GRAD:
        entropy = tl.load(entropy_ptr + rows, mask=inside, other=0.0)
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=inside, other=0.0)
        grad = -p * (grad_logprobs[:, None] + grad_entropy[:, None] * (log_p + entropy[:, None]))
    else:
        grad = -p * grad_logprobs[:, None]
    in_tile = (targets >= start) & (targets < start + BLOCK_V)
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        grad += tl.where(columns[None, :] == targets[:, None], grad_logprobs[:, None], 0.0)
    offsets = rows.to(tl.int64)[:, None] * row_stride + (columns - first)[None, :]
    stored = inside[:, None] & (columns < last)[None, :]
    tl.store(grad_logits_ptr + offsets, grad.to(grad_logits_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, rows, columns, num_rows, num_columns,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, summed in fp32, before the temperature."""
    # Rows and columns past the edge read the last one again, in bounds without a mask in the loop, and are not stored.
    # 64-bit offsets: a vocabulary of 151,936 times a width of 14,200 passes 2^31.
    row_offsets = tl.minimum(rows, num_rows - 1).to(tl.int64) * D
    column_offsets = tl.minimum(columns, num_columns - 1).to(tl.int64) * D
    depth = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + row_offsets[:, None] + depth[None, :]
    weight_ptrs = weight_ptr + column_offsets[None, :] + depth[:, None]
    x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            hidden, weight = tl.load(hidden_ptrs), tl.load(weight_ptrs)
        else:
            hidden = tl.load(hidden_ptrs, mask=(depth < D - start)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(depth < D - start)[:, None], other=0.0)
        if UPCAST:
            hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
        x = tl.dot(hidden, weight, x, input_precision=PRECISION)
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tl.minimum(columns, num_columns - 1)).to(tl.float32)
        x += bias[None, :]
    return x


@triton.jit
def _grouped(num_blocks, num_columns):
    """This program's block of rows and its column; GROUP_BLOCKS blocks of rows share each column in the cache."""
    program = tl.program_id(0)
    per_group = GROUP_BLOCKS * num_columns
    first = program // per_group * GROUP_BLOCKS
    size = tl.minimum(num_blocks - first, GROUP_BLOCKS)
    within = program % per_group
    return first + within % size, within // size


INTERPRETED = not isinstance(scan_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when this file was imported."""
