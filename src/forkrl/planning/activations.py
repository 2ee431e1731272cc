"""What a forward pass keeps in memory for its backward.

The counting is that of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
arXiv 2205.05198, section 4.1: 34 + 5 a s / h bytes a token, layer and hidden unit), done again for what runs here:
SwiGLU, grouped queries, RMSNorm as ``transformers`` writes it (which keeps an fp32 copy of its input), no dropout, and
an attention that keeps no s x s matrix, only its output and a logarithm for each query (FlashAttention, arXiv
2205.14135). tests/unit/test_plan_measured.py counts the bytes that PyTorch really keeps.
"""

from __future__ import annotations

from typing import Literal

from forkrl.planning.shapes import ModelShape

Arithmetic = Literal["bf16", "autocast", "fp32"]
"""Of the training pass: weights in bf16 (FSDP2's mixed precision), fp32 weights under bf16 autocast, or all fp32."""


def kept_by_layer(shape: ModelShape, arithmetic: Arithmetic, *, attention_bytes: int | None = None) -> int:
    """Bytes that one layer keeps of one token.

    Args:
        shape: of the model.
        arithmetic: of the pass.
        attention_bytes: of a number within attention, where it is not that of the products: a CPU attends in fp32.
    """
    product = 4 if arithmetic == "fp32" else 2
    attention = attention_bytes or product
    norms = {
        # An fp32 copy of the input, the normalised input before its scale, the result that the products keep.
        "bf16": 2 * (4 + 2 + 2) * shape.hidden,
        # The input is fp32 itself; each product keeps a bf16 copy of its own: three for attention, two for the MLP.
        "autocast": (2 * (4 + 4) + (3 + 2) * 2) * shape.hidden,
        "fp32": 2 * (4 + 4 + 4) * shape.hidden,
    }[arithmetic]
    rotated = attention
    normalised = 4 + product if shape.qk_norm else 0
    queries_and_keys = (normalised + rotated) * (shape.query_width + shape.kv_width)
    # The output is kept by attention and by the product after it: one tensor where both have the same precision.
    output = attention if attention == product else attention + product
    rest = attention * shape.kv_width + output * shape.query_width
    per_row = 4 * shape.heads + 2 * 4 + (4 * (shape.heads + shape.kv_heads) if shape.qk_norm else 0)
    mlp = 4 * product * shape.intermediate
    return norms + queries_and_keys + rest + per_row + mlp


def kept_outside(shape: ModelShape, arithmetic: Arithmetic) -> int:
    """Bytes kept of one token by the last norm, the head's input and the rotary tables."""
    norm = {"bf16": 4 + 2 + 2, "autocast": 4 + 4 + 2, "fp32": 4 + 4 + 4}[arithmetic] * shape.hidden
    hidden = 2 if arithmetic == "bf16" else 4
    tables = 2 * hidden * shape.head_dim
    return norm + tables + 8  # and its id


def stream_bytes(shape: ModelShape, arithmetic: Arithmetic) -> int:
    """Bytes of one token between two layers: what gradient checkpointing keeps of each."""
    return shape.hidden * (2 if arithmetic == "bf16" else 4)


def kept_in_all(
    shape: ModelShape, arithmetic: Arithmetic, *, checkpointing: bool, attention_bytes: int | None = None
) -> int:
    """Bytes of one token at the highest point; with checkpointing one layer is whole, the others are their inputs."""
    layer = kept_by_layer(shape, arithmetic, attention_bytes=attention_bytes)
    outside = kept_outside(shape, arithmetic)
    if checkpointing:
        return shape.layers * stream_bytes(shape, arithmetic) + layer + outside
    return shape.layers * layer + outside
