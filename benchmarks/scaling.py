"""How the cost of a step grows: seconds and peak memory against batch, response length, vocabulary and model size.

    python -m benchmarks.scaling [--device cpu] [--draw-only]

Random weights in a Qwen3 shape; all responses have the full length (no token ends one). One thing grows at a time, from
64 responses of 64 tokens, a vocabulary of 26 and the shape of the embedded base model. Every case is a fresh process: a
small step to warm up, then one rollout and one gradient step on the top 20% of tokens, in fp32. On a CPU the time is
that of one thread's processor, which other work on the machine does not lengthen, and the memory is what the process
holds beyond what it held when the small step was done. A slope is that of a line through the larger half of the points
on logarithmic axes: 1 is proportional.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks._record import RESULTS, ROOT, describe_setting, write_result
from benchmarks.gpu.limits import synchronize
from benchmarks.gpu.steps import PROMPT, Numerals, Shape, build_batch, build_model, build_settings, with_statistics
from forkrl.model.policy import Policy
from forkrl.parallel.processes import return_freed_memory
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.training.update import update_policy
from forkrl.types import Prompt, SamplingParams

FIGURE = ROOT / "docs" / "images" / "scaling.svg"
BASE = {"batch": 64, "response": 64, "vocabulary": 26, "hidden": 128, "layers": 4}
GROWN: dict[str, list[dict[str, int]]] = {
    "batch": [{"batch": size} for size in (32, 64, 128, 256, 512)],
    "response": [{"response": length, "batch": 32} for length in (64, 128, 256, 512, 1024, 2048)],
    "vocabulary": [{"vocabulary": size, "batch": 32} for size in (26, 512, 4096, 32_768, 151_936)],
    "parameters": [
        {"hidden": hidden, "layers": layers, "batch": 32}
        for hidden, layers in ((128, 4), (256, 4), (384, 6), (512, 8), (768, 8))
    ],
}
LABELS = {
    "batch": "responses in a batch",
    "response": "tokens of a response",
    "vocabulary": "tokens of the vocabulary",
    "parameters": "parameters",
}
GROUP = 8
LEAST_MIB = 1.0
"""What a process holds is told in pages and blocks; less than this is noise, and not drawn."""


def main() -> None:
    options = parse_options()
    if options.case:
        print(json.dumps(measure(json.loads(options.case), options.device)))
        return
    if not options.draw_only:
        cases = []
        for name, steps in GROWN.items():
            for step in steps:
                cases.append({"grown": name, **measure_apart(BASE | step, options.device)})
                print(json.dumps(cases[-1]), flush=True)
        write_result("scaling", describe_setting() | {"device": options.device, "threads": 1}, cases)
    draw(json.loads((RESULTS / "scaling.json").read_text())["cases"], FIGURE)
    print(f"drawn to {FIGURE}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How time and memory of a step grow.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draw-only", action="store_true", help="the figure, from figures measured before")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(case: dict[str, int], device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--device", device, "--case", json.dumps(case)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def measure(case: dict[str, int], device: str) -> dict[str, Any]:
    """Seconds and peak bytes of a rollout and of an update."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = shape_of(case)
    model = build_model(shape, device)
    policy = Policy(model, Numerals(shape.vocabulary), "fp32")  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    small = case | {"batch": GROUP, "response": 4}
    rollout_of(policy, small, device)()
    update_of(policy, optimizer, small, device)()
    rollout = observe(rollout_of(policy, case, device), device)
    update = observe(update_of(policy, optimizer, case, device), device)
    costs = {"rollout_s": rollout[0], "rollout_peak_bytes": rollout[1], "update_s": update[0]}
    return {**case, "parameters": model.num_parameters(), **costs, "update_peak_bytes": update[1]}


def shape_of(case: dict[str, int]) -> Shape:
    hidden, heads = case["hidden"], case["hidden"] // 32
    tokens = case["batch"] * case["response"]
    return Shape(
        hidden, 2 * hidden, case["layers"], heads, heads // 2, 32, tied=True, vocabulary=case["vocabulary"],
        tokens_per_step=tokens,
    )  # fmt: skip


def rollout_of(policy: Policy, case: dict[str, int], device: str) -> Callable[[], object]:
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=PROMPT, max_sequences=2**20)
    ids = torch.randint(case["vocabulary"], (case["batch"] // GROUP, PROMPT)).tolist()
    prompts = [Prompt(str(place), " ".join(map(str, row)), "") for place, row in enumerate(ids)]
    sampling, generator = SamplingParams(case["response"]), torch.Generator(device).manual_seed(0)
    return lambda: engine.generate(prompts, group_size=GROUP, sampling=sampling, generator=generator)


def update_of(
    policy: Policy, optimizer: torch.optim.Optimizer, case: dict[str, int], device: str
) -> Callable[[], object]:
    options = argparse.Namespace(response=case["response"], device=device)
    batch = with_statistics(policy, build_batch(shape_of(case), options), shape_of(case))
    settings: Any = build_settings("dense", max_tokens=32_768)
    generator = torch.Generator(device)
    return lambda: update_policy(Workers(policy), optimizer, batch, settings, generator, on_policy=True)


def observe(work: Callable[[], object], device: str) -> tuple[float, int]:
    """Seconds that the work takes, and bytes at its peak above those held before."""
    on_gpu = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    return_freed_memory()  # as an update does at its beginning
    before = reset_peak(on_gpu)
    synchronize(device)
    began = clock()
    work()
    synchronize(device)
    return clock() - began, peak(on_gpu) - before


def reset_peak(on_gpu: bool) -> int:
    """Forget the peak so far; returns the bytes held now."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
    return peak(on_gpu)


def peak(on_gpu: bool) -> int:
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through the larger half of the points, on logarithmic axes."""
    start = min(len(x) // 2, len(x) - 2)
    x, y = [math.log(value) for value in x[start:]], [math.log(value) for value in y[start:]]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True))
    return rise / sum((one - mean_x) ** 2 for one in x)


def short(number: float) -> str:
    """26, 4.1k, 152k, 2.4M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{0 if number >= 10 * size else 1}f}{unit}".replace(".0", "")
    return str(int(number))


@rc_context({"svg.fonttype": "none", "svg.hashsalt": "forkrl", "font.size": 9, "font.family": "sans-serif"})
def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Small multiples: what grows from left to right, seconds above, memory below."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(2, len(GROWN), sharey="row")
    rows = (("seconds", "_s", 1.0), ("peak memory, MiB", "_peak_bytes", 2.0**20))
    for row, (label, suffix, unit) in enumerate(rows):
        axes[row, 0].set_ylabel(label)
        for column, grown in enumerate(GROWN):
            own, panel = [case for case in cases if case["grown"] == grown], axes[row, column]
            for part, colour in (("rollout", "#0072b2"), ("update", "#d55e00")):
                points = [(case[grown], case[part + suffix] / unit) for case in own]
                x, y = zip(*[point for point in points if not row or point[1] >= LEAST_MIB], strict=True)
                name = f"{part}, slope {slope(x, y):.2f}"
                panel.plot(x, y, "o-", color=colour, markersize=3.5, linewidth=1.3, label=name)
            panel.set(xscale="log", yscale="log", xlabel=LABELS[grown] if row else "")
            panel.set_xticks([case[grown] for case in own])
            panel.set_xticklabels([short(case[grown]) for case in own] if row else [])
            panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            panel.legend(frameon=False, fontsize=8, loc="upper left")
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
            panel.margins(y=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
