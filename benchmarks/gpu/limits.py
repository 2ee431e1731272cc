"""What the machine itself can do: matrix products and copies. Everything else is a share of these.

python -m benchmarks.gpu.limits [--device cuda] [--small]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._record import describe_setting, write_result

DATASHEET = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}
"""Dense bf16 operations and bytes of memory a second of the SXM cards, by their vendor."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rates of matrix products and copies.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    size, num_bytes = (256, 2**20) if options.small else (8192, 2**33)
    torch.manual_seed(0)
    cases: list[dict[str, Any]] = []
    for precision in ("bf16", "tf32", "fp32"):
        cases.append(
            {"what": f"matrix product, {precision}", "flops_per_s": product_rate(options.device, precision, size)}
        )
    cases.append({"what": "copy, bytes read and written", "bytes_per_s": copy_rate(options.device, num_bytes)})
    setting = describe_setting() | {"size": size, "copied_bytes": num_bytes}
    for name, (flops, memory) in DATASHEET.items():
        if name in setting["device"]:
            setting |= {"datasheet": {"bf16_flops_per_s": flops, "bytes_per_s": memory}}
    for case in cases:
        print(case)
    write_result("limits", setting, cases)


def product_rate(device: str, precision: str, size: int) -> float:
    """Operations a second of a square product of random numbers: zeros run faster."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)
    return 2 * size**3 / seconds_each(lambda: torch.mm(one, other, out=out), device)


def copy_rate(device: str, num_bytes: int) -> float:
    source = torch.randint(256, (num_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_each(lambda: target.copy_(source), device)


def seconds_each(work: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median seconds of one call, timed one by one after three to warm up."""
    times = []
    for _ in range(3 + repeats):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
