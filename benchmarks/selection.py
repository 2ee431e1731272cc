"""Seconds and memory of choosing the top fifth of up to 10^8 entropies, beside what PyTorch offers.

    python -m benchmarks.selection [--largest 8]

Every case is a fresh process, for peak memory is a figure of a process. The memory counted is what the process holds at
its peak beyond the entropies themselves; one bool a token of it is the answer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._record import describe_setting, write_result
from forkrl.method.selection import select_tokens


def by_forkrl(entropy_N: Tensor) -> Tensor:
    return select_tokens(entropy_N[None], torch.ones_like(entropy_N[None], dtype=torch.bool), "top_entropy", 0.2)


def by_topk(entropy_N: Tensor) -> Tensor:
    selected_N = torch.zeros_like(entropy_N, dtype=torch.bool)
    selected_N[entropy_N.topk(len(entropy_N) // 5, sorted=False).indices] = True
    return selected_N


def by_quantile(entropy_N: Tensor) -> Tensor:
    return entropy_N >= torch.quantile(entropy_N, 0.8)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {"forkrl": by_forkrl, "topk": by_topk, "quantile": by_quantile}


def main() -> None:
    parser = argparse.ArgumentParser(description="The top fifth of many entropies.")
    parser.add_argument("--largest", type=int, default=8, help="as a power of ten")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(measure(WAYS[options.work[0]], int(options.work[1]))))
        return
    setting, cases = {**describe_setting(), "seed": 0, "threads": 1}, []
    for power in range(5, options.largest + 1):
        for way in WAYS:
            cases.append({"way": way, "tokens": 10**power, **measure_apart(way, 10**power)})
            print(json.dumps(cases[-1]), flush=True)
    path = write_result("selection", setting, cases)
    show(cases)
    print(f"written to {path}")


def measure_apart(way: str, num_tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.selection", "--work", way, str(num_tokens)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(output)
    return figures


def measure(choose: Callable[[Tensor], Tensor], num_tokens: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    choose(torch.rand(1000))  # what PyTorch loads when first called does not count
    entropy_N = torch.rand(num_tokens, generator=torch.Generator().manual_seed(0))
    before, began = peak_bytes(), time.perf_counter()
    try:
        kept = int(choose(entropy_N).sum())
    except RuntimeError as error:
        return {"refused": str(error).splitlines()[0]}
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes() - before, "kept": kept}


def peak_bytes() -> int:
    """The largest memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("tokens", "way", "seconds", "peak MiB", "bytes a token", box=None)
    for case in cases:
        figures = [case.get("refused", ""), "", ""]
        if "seconds" in case:
            peak = case["peak_bytes"]
            figures = [f"{case['seconds']:.3f}", f"{peak / 2**20:,.0f}", f"{peak / case['tokens']:.1f}"]
        table.add_row(f"{case['tokens']:,}", case["way"], *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
