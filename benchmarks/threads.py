"""Threads, waiting or sleeping, against workers, on a quiet and on a busy machine (docs/threads.md).

    python -m benchmarks.threads [--seconds 5] [--rounds 2]

Every case is a fresh process, for OpenMP reads its settings once. The work is that of a training run on the embedded
model: decoding 256 responses, and gradients of 8 x 1,024 tokens, in tokens per second. The neighbours are: nobody, a
process that keeps one core busy, or a second copy of the same work with the same settings. The settings take turns,
round after round: a disturbance from outside then falls on all of them, and the spread between rounds shows how large
it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._record import describe_setting, write_result
from forkrl.config import ModelConfig, RuntimeConfig
from forkrl.model.policy import open_policy
from forkrl.parallel.threads import available_cores
from forkrl.parallel.workers import open_workers
from forkrl.rollout import EmbeddedEngine
from forkrl.tasks.countdown import countdown_task
from forkrl.training.sft import accumulate_cross_entropy
from forkrl.types import Prompt, SamplingParams

CORES = available_cores()
WAITING = {
    "spins": {"OMP_WAIT_POLICY": "ACTIVE"},
    "spins a little": {},  # what OpenMP does unless told otherwise
    "sleeps": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
}
WAYS: dict[str, tuple[int, int, str]] = {  # threads in all, workers, what a waiting thread does
    "1 thread": (1, 1, "sleeps"),
    **{f"{CORES} threads, {waiting}": (CORES, 1, waiting) for waiting in reversed(WAITING)},
    f"{CORES} workers": (CORES, CORES, "sleeps"),
}
NEIGHBOURS = ("nobody", "busy core", "second copy")
BUSY_CORE = [sys.executable, "-c", "while True: pass"]


def main() -> None:
    options = parse_options()
    if options.work:
        work(*options.work, seconds=options.seconds)
        return
    setting = describe_setting()
    cases = []
    for neighbour in NEIGHBOURS:
        for number in range(1, options.rounds + 1):
            for way in WAYS:
                case = {"neighbour": neighbour, "way": way, "round": number}
                case |= measure_apart(way, neighbour, options.seconds)
                print(json.dumps(case), flush=True)
                cases.append(case)
                path = write_result("threads", setting, cases)  # after every case: a spinning one may take minutes
    show(cases)
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Threads and workers next to a busy process.")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement, at least")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every way")
    parser.add_argument("--work", nargs=2, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(way: str, neighbour: str, seconds: float) -> dict[str, float]:
    """Run the work in a process of its own beside its neighbour."""
    threads, workers, waiting = WAYS[way]
    cleared = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment = {**cleared, **WAITING[waiting]}
    command = [sys.executable, "-m", "benchmarks.threads", "--work", str(threads), str(workers)]
    with beside(neighbour, [*command, "--seconds", "1e9"], environment):
        began = os.getloadavg()[0]
        command += ["--seconds", str(seconds)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    figures: dict[str, float] = json.loads(output)
    return {**figures, "load_average": began}


@contextmanager
def beside(neighbour: str, command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """Keep the neighbour running for the length of the block."""
    if neighbour == "nobody":
        yield
        return
    busy = BUSY_CORE if neighbour == "busy core" else command
    process = subprocess.Popen(busy, env=environment, stdout=subprocess.DEVNULL)
    try:
        time.sleep(12.0 if neighbour == "second copy" else 0.2)  # a copy imports torch first
        yield
    finally:
        process.kill()
        process.wait()


def work(threads: int, workers: int, *, seconds: float) -> None:
    """Print tokens per second of decoding and of gradients with the embedded model; in turns, as training does them."""
    policy = open_policy(ModelConfig(), "cpu")
    prompts = countdown_task().train[:16]
    done, spent = {"decode": 0, "gradient": 0}, {"decode": 0.0, "gradient": 0.0}
    with open_workers(policy, None, RuntimeConfig(threads=threads, workers=workers)) as opened:
        engine = EmbeddedEngine(opened, max_prompt_tokens=16, max_sequences=256 // workers)
        generator = torch.Generator().manual_seed(0)
        warm = False
        while min(spent.values()) < seconds:
            for name, function in (("decode", decode), ("gradient", gradient)):
                began = time.perf_counter()
                tokens = function(engine, prompts, generator)
                if warm:
                    done[name], spent[name] = done[name] + tokens, spent[name] + time.perf_counter() - began
            warm = True
    print(json.dumps({f"{name}_tokens_per_s": done[name] / spent[name] for name in done}))


def decode(engine: EmbeddedEngine, prompts: Sequence[Prompt], generator: torch.Generator) -> int:
    groups = engine.generate(prompts, group_size=16, sampling=SamplingParams(160), generator=generator)
    return sum(len(rollout) for group in groups for rollout in group.rollouts)


def gradient(engine: EmbeddedEngine, prompts: Sequence[Prompt], generator: torch.Generator) -> int:
    micro_batches = list(torch.randint(3, 20, (8, 8, 128), generator=generator))
    engine.workers.zero_gradients()
    engine.workers.map(accumulate_cross_entropy, [(ids_BT, ids_BT) for ids_BT in micro_batches], 8 * 1024)
    engine.workers.sum_gradients()
    return sum(ids_BT.numel() for ids_BT in micro_batches)


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("neighbour", "way", "round", "decoding, tokens/s", "gradients, tokens/s", "load before", box=None)
    for case in cases:
        names = (str(case[name]) for name in ("neighbour", "way", "round"))
        rates = (f"{case[name]:,.0f}" for name in ("decode_tokens_per_s", "gradient_tokens_per_s"))
        table.add_row(*names, *rates, f"{case['load_average']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
