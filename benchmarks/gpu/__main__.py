"""Everything that an accelerator can tell, in one command that ends within nine minutes and writes one JSON file.

    make bench-gpu                                    (the python3 of the machine, nothing installed)
    python -m benchmarks.gpu --device cpu --small     (the same code in a minute on any machine)

Decoding, beside ``transformers``' two ways and vLLM, the head, the forks-only backward, and whole steps on random
weights in the shapes of Qwen3-0.6B, compared with TRL's where that is installed, and 8B, compared with the card's own
limits, measured first.
Each part is a process of its own with its own share of the time. What a part has written counts even if it fails or
runs over, which is recorded with its last words; the others go on, and the file is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._record import RESULTS, ROOT, describe_setting
from forkrl.store.atomic import write_text

TOTAL_S = 530


class Part(NamedTuple):
    """A module of ``benchmarks`` with its arguments, and the seconds it may take."""

    module: str
    arguments: str
    seconds: int

    @property
    def name(self) -> str:
        return f"{self.module} {self.arguments}".strip()


FULL = (
    Part("gpu.limits", "", 40),
    Part("gpu.steps", "--shape 0.6B --response 2048", 80),
    Part("gpu.peer", "--shape 0.6B --response 2048", 80),
    Part("head", "--hidden 1024 4096 --dtypes bfloat16", 100),
    Part(
        "decode",
        "--model 28x1024 --precision bf16 --prompts 16 --tokens 256 --repeats 1 --rounds 1 "
        "--ways forkrl generate 'generate, continuous batching'",
        110,
    ),
    Part("backward", "--shapes 2048:1024x28 8192:1024x28 16384:1024x28", 80),
    Part("gpu.steps", "--shape 8B --response 2048", 100),
    Part("gpu.steps", "--shape 0.6B --response 8192", 80),
    Part("gpu.steps", "--shape 8B --response 8192", 130),
    Part(  # last: where vLLM is installed, it takes a minute before it decodes
        "decode",
        "--model 28x1024 --precision bf16 --prompts 16 --tokens 256 --repeats 1 --rounds 1 --ways vLLM "
        "--name decode-vllm",
        130,
    ),
)
SMALL = (
    Part("gpu.limits", "--small", 180),
    Part("gpu.steps", "--shape tiny --response 16", 180),
    Part("gpu.peer", "--shape tiny --response 16", 180),
    Part("head", "--small", 180),
    Part(
        "decode",
        "--model 1x64 --prompts 2 --group 2 --tokens 4 --repeats 1 --rounds 1 "
        "--ways forkrl generate 'generate, continuous batching' vLLM",
        240,
    ),
    Part("backward", "--shapes 64:128x2", 180),
)


def main() -> None:
    options = parse_options()
    parts = SMALL if options.small else FULL
    chosen = [part for part in parts if options.only is None or part.module in options.only]
    began, outcomes = time.monotonic(), []
    options.out.mkdir(parents=True, exist_ok=True)
    setting = describe_setting()
    for part in chosen:
        left = TOTAL_S - (time.monotonic() - began)
        print(f"{left:4.0f} s left  {part.name}", flush=True)
        outcomes.append(run_part(part, options.device, min(part.seconds, left)))
        print(f"             {outcomes[-1]['failed'] or 'done'} in {outcomes[-1]['seconds']:.0f} s", flush=True)
        path = options.out / f"gpu{'-small' if options.small else ''}.json"
        result = {"setting": setting, "parts": outcomes, "peer": compare_with_peer(outcomes)}
        write_text(path, json.dumps(result, indent=2) + "\n")
    show(outcomes)
    print()
    show_rows(compare_with_peer(outcomes))
    print(f"written to {path}")
    sys.exit(any(outcome["failed"] for outcome in outcomes))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every measurement that wants an accelerator.")
    parser.add_argument("--device", help="by default the machine's accelerator")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, to see that everything runs")
    parser.add_argument("--only", nargs="+", metavar="MODULE", choices=sorted({part.module for part in FULL}))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    if options.device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            parser.error("no accelerator here; --device cpu --small runs the same code at sizes for a CPU")
        options.device = accelerator.type
    return options


def compare_with_peer(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our stages beside those of the peer on the same shape and length; ``ratio`` is how many times ours it takes."""
    results = {name: result["cases"] for outcome in outcomes for name, result in outcome["results"].items()}
    rows = []
    for name in [name for name in results if name.startswith("peer-")]:
        peer = {case["stage"]: case for case in results[name] if "seconds" in case}
        for case in results.get(name.replace("peer-", "steps-"), []):
            other = peer.get(case["stage"].partition(",")[0])
            if other and "seconds" in case:
                rows.append(
                    {
                        "of": name.removeprefix("peer-"),
                        "stage": case["stage"],
                        "seconds": case["seconds"],
                        "peer_seconds": other["seconds"],
                        "ratio": other["seconds"] / case["seconds"],
                        "peak_bytes": case["peak_bytes"],
                        "peer_peak_bytes": other["peak_bytes"],
                    }
                )
    return rows


def run_part(part: Part, device: str, seconds: float) -> dict[str, Any]:
    """What a part wrote, and how it ended: ``failed`` is empty, or says why."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        failed = run_within(part, device, seconds, Path(folder))
        results = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    return {"part": part.name, "failed": failed, "seconds": time.monotonic() - began, "results": results}


def run_within(part: Part, device: str, seconds: float, folder: Path) -> str:
    """Run a part with all its processes, and end them when its time is up; empty, or why it failed."""
    if seconds < 5:
        return "no time was left"
    command = [sys.executable, "-m", f"benchmarks.{part.module}", "--device", device, *shlex.split(part.arguments)]
    environment = os.environ | {"FORKRL_RESULTS": str(folder)}
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"ran over its {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        last_words = (output.read().strip() or f"exit status {code}").splitlines()[-1]
    return last_words if code else ""


def show(outcomes: list[dict[str, Any]]) -> None:
    """Every case on a line of its own, last: what is cut from a long output is its beginning."""
    for outcome in outcomes:
        print(f"\n{outcome['part']}{': ' if outcome['failed'] else ''}{outcome['failed']}")
        for result in outcome["results"].values():
            show_rows(result["cases"])


def show_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  " + "  ".join(f"{key} {short(value)}" for key, value in row.items()))


def short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
