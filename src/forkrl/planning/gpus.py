"""Memory and rates of GPUs, with the source of each figure."""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

from forkrl.errors import UserError

GIB = 2**30


class Gpu(NamedTuple):
    name: str
    memory: float
    """Bytes that a process can allocate, slightly less than on the data sheet."""
    flops: float
    """Dense bf16 operations per second with fp32 accumulation, without sparsity."""
    bandwidth: float
    """Bytes per second of memory bandwidth; 0: unknown."""
    source: str


# Name, GiB that drivers report as usable, TFLOP/s, TB/s, source of the rates. Entered without the data sheets at hand.
_TABLE = {
    "h100": ("H100 SXM 80 GB", 79, 989, 3.35, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h100-pcie": ("H100 PCIe 80 GB", 79, 756, 2.0, "NVIDIA H100 PCIe GPU product brief"),
    "h200": ("H200 SXM 141 GB", 139, 989, 4.8, "NVIDIA H200 Tensor Core GPU data sheet"),
    "b200": ("B200 SXM 180 GB", 178, 2250, 7.7, "NVIDIA HGX B200 data sheet"),
    "a100-80": ("A100 SXM 80 GB", 79, 312, 2.039, "NVIDIA A100 Tensor Core GPU data sheet"),
    "a100-40": ("A100 SXM 40 GB", 39, 312, 1.555, "NVIDIA A100 Tensor Core GPU data sheet"),
    "l40s": ("L40S 48 GB", 44, 362, 0.864, "NVIDIA L40S data sheet"),
    "rtx4090": ("GeForce RTX 4090 24 GB", 23.5, 165, 1.008, "NVIDIA Ada GPU architecture white paper"),
    "mi300x": ("Instinct MI300X 192 GB", 191, 1307, 5.3, "AMD Instinct MI300X data sheet"),
}
GPUS = {
    key: Gpu(name, gib * GIB, tflops * 1e12, tb_per_s * 1e12, source)
    for key, (name, gib, tflops, tb_per_s, source) in _TABLE.items()
}
DEFAULT_GPU = "h100"


def find_gpu(name: str | None, memory_gib: float | None, tflops: float | None, bandwidth_tb: float | None) -> Gpu:
    """A GPU by name (default: H100) with some numbers replaced, or described by numbers alone."""
    given = {"--gpu-memory": memory_gib, "--gpu-tflops": tflops, "--gpu-bandwidth": bandwidth_tb}
    given = {option: number for option, number in given.items() if number is not None}
    for option, number in given.items():
        if not 0 < (number or 0) < math.inf:
            raise UserError(f"{option} {number}: must be above 0")
    key = (name or DEFAULT_GPU).lower()
    if name is None and given:
        if memory_gib is None or tflops is None:
            raise UserError("--gpu-memory and --gpu-tflops describe a GPU together; give both, or name it with --gpu")
        gpu = Gpu("your GPU", 0, 0, 0, "numbers given on the command line")
    elif key in GPUS:
        gpu = GPUS[key]
        if given:
            gpu = gpu._replace(source=f"{gpu.source}, with your own {', '.join(given)}")
    else:
        near = difflib.get_close_matches(key, GPUS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--gpu {name}: not one of {', '.join(GPUS)}{hint} Others: --gpu-memory and --gpu-tflops")
    return gpu._replace(
        memory=gpu.memory if memory_gib is None else memory_gib * GIB,
        flops=gpu.flops if tflops is None else tflops * 1e12,
        bandwidth=gpu.bandwidth if bandwidth_tb is None else bandwidth_tb * 1e12,
    )


def in_gib(num_bytes: float) -> str:
    gib = num_bytes / GIB
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:,.1f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:,.1f} MiB"
