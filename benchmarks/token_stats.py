"""Time and peak memory of the language-model head, forward and backward: chunked against naive.

    python -m benchmarks.token_stats [--rows 512] [--hidden 256] [--vocabularies 1000 32000 151936] [--repeats 3]

Both backends do the same work on the same numbers: log-probs and entropies of all rows, then the gradient of a sum of
log-probs over a fraction of the rows (1.0: every token trains; 0.2: the forking tokens). Each case runs in a process of
its own, so that its peak memory is its own; the time is the median of the repeats after one warm-up, with their range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._record import describe_setting, write_result
from forkrl import token_stats

FRACTIONS = (1.0, 0.2)
BACKENDS = ("reference", "chunked")


def main() -> None:
    options = parse_options()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    setting = {**describe_setting(), "seed": options.seed}
    cases = []
    for vocabulary in options.vocabularies:
        for fraction in FRACTIONS:
            sizes = {"rows": options.rows, "hidden": options.hidden, "vocabulary": vocabulary, "fraction": fraction}
            work = {**sizes, "repeats": options.repeats, "seed": options.seed, "dtype": options.dtype}
            naive, chunked = (measure_apart({**work, "backend": backend}) for backend in BACKENDS)
            cases.append({**work, "naive": naive, "chunked": chunked, **ratios(naive, chunked)})
    show(cases)
    print(f"written to {write_result('token_stats', setting, cases)}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of the head: chunked against naive.")
    parser.add_argument("--rows", type=int, default=512, help="token positions")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[1000, 32000, 151936])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(work: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.token_stats", "--case", json.dumps(work)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """Seconds of forward and backward, and the memory they need beyond their inputs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(work["seed"])
    dtype = getattr(torch, work["dtype"])
    rows, hidden, vocabulary = work["rows"], work["hidden"], work["vocabulary"]
    hidden_ND = torch.randn(rows, hidden, generator=generator).to(device, dtype).requires_grad_()
    weight_VD = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).to(device, dtype).requires_grad_()
    targets_N = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    trained_N = (torch.rand(rows, generator=generator) < work["fraction"]).to(device)

    def step() -> None:
        hidden_ND.grad = weight_VD.grad = None
        stats = token_stats(hidden_ND, weight_VD, targets_N, backend=work["backend"])
        (stats.logprobs * trained_N).sum().backward()
        float(stats.entropy[0])  # waits for the device

    before = current_memory(device)
    step()
    seconds = sorted(timed(step) for _ in range(work["repeats"]))
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [seconds[0], seconds[-1]],
        "peak_mib": (peak_memory(device) - before) / 2**20,
    }


def timed(step: Any) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def current_memory(device: torch.device) -> int:
    """Bytes in use before the case: of the device, or resident in this process."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    """Linux keeps the resident size and its high-water mark per process, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def ratios(naive: dict[str, Any], chunked: dict[str, Any]) -> dict[str, float]:
    return {
        "time_ratio": chunked["seconds"] / naive["seconds"],
        "memory_ratio": chunked["peak_mib"] / naive["peak_mib"],
    }


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("V", "rows with gradient", "naive s", "chunked s", "time ratio", "naive MiB", "chunked MiB", box=None)
    for case in cases:
        naive, chunked = case["naive"], case["chunked"]
        table.add_row(
            f"{case['vocabulary']:,}",
            f"{case['fraction']:.0%}",
            f"{naive['seconds']:.3f}",
            f"{chunked['seconds']:.3f}",
            f"{case['time_ratio']:.2f}",
            f"{naive['peak_mib']:,.0f}",
            f"{chunked['peak_mib']:,.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
