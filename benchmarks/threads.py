"""What OpenMP's waiting policy costs a small training loop on a quiet and on a busy machine (docs/threads.md).

    python -m benchmarks.threads [--steps 4] [--rounds 2]

Every case is a fresh process, for OpenMP reads its settings once. The work is that of a training run on the embedded
model: gradient steps of a small transformer, and one-token forward passes as in decoding. The neighbours are: nobody, a
process that keeps one core busy, or a second copy of the same work with the same settings. With one thread there is
nothing to wait for, so that row shows what the rest of the machine does. The settings take turns, round after round: a
disturbance from outside then falls on all of them, and the spread between rounds shows how large it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks._record import describe_setting, write_result
from forkrl.threads import available_cores

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
}
NEIGHBOURS = ("nobody", "busy core", "second copy")
BUSY_CORE = [sys.executable, "-c", "while True: pass"]


def main() -> None:
    options = parse_options()
    if options.work:
        print(json.dumps(work(options.steps, forever=options.forever)))
        return
    setting = describe_setting()
    cases = []
    for neighbour in NEIGHBOURS:
        for number in range(1, options.rounds + 1):
            for threads, policy in [(1, "passive"), *((available_cores(), policy) for policy in POLICIES)]:
                figures = measure_apart(threads, policy, neighbour, options.steps)
                case = {"neighbour": neighbour, "threads": threads, "policy": policy, "round": number, **figures}
                print(json.dumps(case), flush=True)
                cases.append(case)
                path = write_result("threads", setting, cases)  # after every case: a spinning one may take minutes
    show(cases)
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="OpenMP waiting policies under a busy neighbour.")
    parser.add_argument("--steps", type=int, default=4, help="gradient steps of a case")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every setting")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--forever", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(threads: int, policy: str, neighbour: str, steps: int) -> dict[str, float]:
    """Run the work in a process of its own beside its neighbour."""
    cleared = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment = {**cleared, **POLICIES[policy], "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.threads", "--work", "--steps", str(steps)]
    with beside(neighbour, command, environment):
        began = os.getloadavg()[0]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    figures: dict[str, float] = json.loads(output)
    return {**figures, "load_average": began}


@contextmanager
def beside(neighbour: str, command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """Keep the neighbour running for the length of the block."""
    if neighbour == "nobody":
        yield
        return
    busy = BUSY_CORE if neighbour == "busy core" else [*command, "--forever"]
    process = subprocess.Popen(busy, env=environment, stdout=subprocess.DEVNULL)
    try:
        time.sleep(6.0 if neighbour == "second copy" else 0.2)  # a copy imports torch first
        yield
    finally:
        process.kill()
        process.wait()


def work(steps: int, *, forever: bool) -> dict[str, float]:
    """Milliseconds of one gradient step and of one decoding step of a small transformer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 384, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(64, 128), nn.TransformerEncoder(layer, 4), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens_BT = torch.randint(64, (32, 96))

    def update() -> None:
        loss = nn.functional.cross_entropy(model(tokens_BT).flatten(0, 1), tokens_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def decode() -> None:
        with torch.no_grad():
            model(tokens_BT[:, :1])

    update()
    while forever:
        update()
        decode()
    return {"update_ms": milliseconds(update, steps), "decode_ms": milliseconds(decode, 20 * steps)}


def milliseconds(function: Any, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return 1000 * (time.perf_counter() - began) / repeats


def show(cases: list[dict[str, Any]]) -> None:
    settings, figures_of = ("neighbour", "threads", "policy", "round"), ("update_ms", "decode_ms", "load_average")
    table = Table(*settings, "gradient step ms", "decoding step ms", "load before", box=None)
    for case in cases:
        figures = (f"{case[name]:.1f}" for name in figures_of)
        names = (str(case[name]) for name in settings)
        table.add_row(*names, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
