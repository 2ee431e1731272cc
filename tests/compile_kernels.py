"""Compile the Triton kernels for cards that are not here, and print what they need: the interpreter accepts more.

python -m tests.compile_kernels        (without TRITON_INTERPRET)
"""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_for

from forkrl.head.triton import FP32_TILE, HOPPER_TILE, TILE, Tile, compile_options
from forkrl.head.triton_kernels import grad_kernel, scan_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORDS = {"targets_ptr": "*i64", "exponent_scale": "fp32", "inverse_temperature": "fp32"}
OF_THE_MODEL = ("hidden_ptr", "weight_ptr", "bias_ptr", "grad_logits_ptr")


def main() -> None:
    for capability, dtype, width, tile, full in (
        (80, "bf16", 4096, TILE, False),
        (86, "fp16", 1000, TILE, True),
        (86, "fp32", 1024, FP32_TILE, False),
        (90, "bf16", 4096, HOPPER_TILE, False),
        (90, "fp16", 1000, HOPPER_TILE, True),
    ):
        for kernel in (scan_kernel, grad_kernel):
            found = build(kernel, capability, dtype, width, tile, full=full)
            case = {"kernel": kernel.__name__, "capability": capability, "dtype": dtype}
            print(json.dumps({**case, "shared": found.metadata.shared, "wgmma": "wgmma" in found.asm["ptx"]}))


def build(kernel: Any, capability: int, dtype: str, width: int, tile: Tile, *, full: bool) -> Any:
    """``full``: with a bias and a gradient of the entropy, on a width that no tile divides."""
    options = compile_options(width, DTYPES[dtype], full, tile)
    constants = (
        options | ({"ENTROPY_GRAD": full} if kernel is grad_kernel else {}) | ({} if full else {"bias_ptr": None})
    )
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
            continue
        other = f"*{dtype}" if name in OF_THE_MODEL else "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = WORDS.get(name, other)
        if name not in ("exponent_scale", "inverse_temperature"):  # real pointers and most sizes are multiples of 16
            attributes[(place,)] = [["tt.divisibility", 16]]
    launch = {name: value for name, value in options.items() if name not in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return compile_for(source, target=GPUTarget("cuda", capability, 32), options=launch)


if __name__ == "__main__":
    main()
