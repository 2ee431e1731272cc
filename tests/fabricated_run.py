"""A run folder made up for tests of its readers: plausible figures, honest format, no training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CONFIG = """
seed = 0
[model]
path = "embedded:countdown-base"
precision = "fp32"
[rollout]
prompts_per_step = 32
group_size = 8
temperature = 1.0
max_response_tokens = 160
[selection]
rule = "{rule}"
ratio = 0.2
scope = "micro_batch"
[loss]
denominator = "selected"
[optimizer]
lr = 0.0005
max_grad_norm = 1.0
[training]
steps = {planned_steps}
[provenance]
forkrl = "0.1.0"
torch = "2.13.0"
python = "3.11.7"
commit = "0123abc"
threads = 1
"""
PROBLEMS = 512
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("logprobs", pa.list_(pa.float32())),
        ("entropy", pa.list_(pa.float32())),
        ("selected", pa.list_(pa.bool_())),
        ("score", pa.float32()),
        ("reward", pa.float32()),
        ("advantage", pa.float32()),
        ("finished", pa.bool_()),
    ]
)


def write_run(
    folder: Path, *, steps: int = 60, planned_steps: int = 60, rule: str = "top_entropy", problems: int = 96
) -> Path:
    """A whole run: config, metrics with evaluations at 0, 20, …, rollouts of those and of training steps 1, 10, …"""
    rng = random.Random(0)
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(planned_steps=planned_steps, rule=rule), encoding="utf-8")
    lines = [_metrics(step, steps, rng) for step in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for line in (line for line in (lines[0], lines[-1]) if "eval/accuracy" in line):
        right = round(line["eval/accuracy"] * PROBLEMS)
        scores = {str(problem): [float(problem < right)] for problem in range(PROBLEMS)}
        (folder / f"rollouts/scores-{line['step']:06.0f}.json").write_text(json.dumps(scores), encoding="utf-8")
    asked = [_prompt(random.Random(i)) for i in range(problems)]
    for step in range(0, steps + 1, 20):
        write_rollouts(
            folder / f"rollouts/eval-{step:06d}.parquet",
            [_row(step, i, p, step / 60, rng, None) for i, p in enumerate(asked)],
        )
    for step in sorted({min(1, steps), *range(10, steps + 1, 10)} - {0}):
        rows = [
            _row(step, i // 8, _prompt(random.Random(1000 * step + i // 8)), step / 60, rng, 0.5) for i in range(32)
        ]
        write_rollouts(folder / f"rollouts/train-{step:06d}.parquet", rows)
    return folder


def write_rollouts(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def response_row(
    tokens: list[str], entropy: list[float], *, prompt_id: str = "0", prompt: str = "?", score: float = 0.0
) -> dict[str, Any]:
    """One row of rollouts/ with the top fifth selected."""
    kept = sorted(range(len(tokens)), key=lambda i: -entropy[i])[: max(1, math.ceil(0.2 * len(tokens)))]
    return {
        "step": 0,
        "prompt_id": prompt_id,
        "prompt": prompt,
        "response": "".join(tokens),
        "token_ids": list(range(len(tokens))),
        "tokens": tokens,
        "logprobs": [-value for value in entropy],
        "entropy": entropy,
        "selected": [i in kept for i in range(len(tokens))],
        "score": score,
        "reward": score,
        "advantage": None,
        "finished": True,
    }


def _metrics(step: int, steps: int, rng: random.Random) -> dict[str, float]:
    done = step / max(steps, 1)
    noise = rng.gauss(0, 0.02)
    accuracy = 0.17 + 0.3 * (1 - math.exp(-3 * done))
    line: dict[str, float] = {"step": step}
    if step:
        line |= {
            "reward/accuracy": accuracy + noise,
            "reward/mean": accuracy + noise,
            "response/length": 52 + 14 * done + 40 * noise,
            "response/truncated_fraction": max(0.0, 0.02 + noise / 4),
            "entropy/mean": 0.21 - 0.05 * done + noise / 8,
            "entropy/threshold": 0.61 - 0.08 * done + noise / 4,
            "entropy/selected_mean": 0.98 - 0.2 * done + noise / 2,
            "entropy/unselected_mean": 0.03 - 0.01 * done + noise / 30,
            "selection/kept_fraction": 0.2 + noise / 300,
            "selection/kept_fraction_positive": 0.185 + noise / 8,
            "selection/kept_fraction_negative": 0.21 - noise / 8,
            "loss/policy": noise,
            "loss/clip_fraction": 0.004 + abs(noise) / 10,
            "grad/norm": 0.6 + 10 * abs(noise),
            "optimizer/lr": 3e-4 * (1 - done),
            "rollout/logprob_gap_mean": 0.02 + abs(noise) / 10,
            "rollout/logprob_gap_beyond_2x": abs(noise) / 50,
            "rollout/tokens_per_s": 9000 + 20000 * noise,
            "time/step_s": 4.1 + 5 * abs(noise),
        }
    if step % 20 == 0:
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / PROBLEMS)
        line |= {
            "eval/accuracy": accuracy,
            "eval/accuracy_low": accuracy - half,
            "eval/accuracy_high": accuracy + half,
            "eval/length": 50 + 16 * done,
            "eval/truncated_fraction": 0.02,
            "eval/problems": PROBLEMS,
        }
    return line


def _prompt(rng: random.Random) -> str:
    numbers = [rng.randint(1, 9) for _ in range(3)]
    return f"{numbers[0]} {numbers[1]} {numbers[2]}:{rng.randint(10, 99)}?"


def _row(step: int, index: int, prompt: str, done: float, rng: random.Random, baseline: float | None) -> dict[str, Any]:
    numbers, target = [int(n) for n in prompt.partition(":")[0].split()], prompt.partition(":")[2].rstrip("?")
    tokens: list[str] = []
    entropy: list[float] = []

    def write(text: str, *forks: int) -> None:
        for position, character in enumerate(text):
            tokens.append(character)
            fork = position in forks
            entropy.append(
                max(0.0, rng.gauss(1.15 - 0.4 * done, 0.35))
                if fork
                else abs(rng.gauss(0, 0.004)) + (rng.random() < 0.05) * 0.2
            )

    right = rng.random() < 0.17 + 0.3 * done
    for attempt in range(rng.randint(1, 3)):
        if attempt:
            write("; " + " ".join(map(str, numbers)) + ": ", 0)
        pool = numbers[:]
        while len(pool) > 1:
            a, b = pool.pop(rng.randrange(len(pool))), pool.pop(rng.randrange(len(pool)))
            operation = rng.choice("+*-")
            value = {"+": a + b, "*": a * b, "-": abs(a - b)}[operation]
            pool.insert(0, value)
            write(
                f"{max(a, b)}{operation}{min(a, b)}={value} [{' '.join(map(str, pool))}]"
                + (", " if len(pool) > 1 else " "),
                0,
                1,
                2,
            )
        write(f"{pool[0]}:{target} ")
    write("!" if right else "?", 0)
    tokens.append("<eos>")
    entropy.append(0.0001)
    row = response_row(
        tokens, entropy, prompt_id=f"{step if baseline else 'held-out'}-{index}", prompt=prompt, score=float(right)
    )
    return row | {"step": step, "advantage": None if baseline is None else (1.3 if right else -0.7)}
