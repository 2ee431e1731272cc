"""Seconds of a whole training step, rollout and update, beside a peer that does the same work.

    python -m benchmarks.step_time [--peer trl] [--steps 3] [--rounds 3] [--prompts 32]
    python -m benchmarks.step_time --model models/smollm2 --prompts 8
    .venv-vllm/bin/python -m benchmarks.step_time --vllm    # after pip install 'trl==1.16.*' there; + reasoning-gym

The work, in both: 32 prompts x 8 responses, of at most 128 tokens for the embedded base model on Countdown, of at most
24 for SmolLM2 on sums; one gradient step of the DAPO loss on the top 20% of tokens, no filtering of groups. The
learning rate is so small that the lengths of the responses stay what they are. Each turn is a fresh process that takes
one step to warm up and then ``--steps`` that count; the settings of ForkRL and of the peer take turns, round after
round, on the same cores. The ratios are of the medians over all counted steps, with the range over rounds, to each
setting of ForkRL on as many threads; the peer's fastest setting is the one to compare with.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._record import describe_setting, write_result
from forkrl.parallel.threads import available_cores

GROUP, LR = 8, 1e-7
OUR_SETTINGS = {name: [f"model.precision={name}"] for name in ("fp32", "bf16")}
VLLM_SETTINGS = {f"{name}, vLLM": [*settings, "rollout.engine=vllm"] for name, settings in OUR_SETTINGS.items()}
# What the peer's users would try on a CPU. Its defaults besides: AdamW fused, no KL.
PEER_SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "fp32": {"bf16": False},
    "bf16, 4 micro-batches": {"bf16": True, "gradient_accumulation_steps": 4},
    "fp32, 4 micro-batches": {"bf16": False, "gradient_accumulation_steps": 4},
}
EMBEDDED = "embedded:countdown-base"


def main() -> None:
    options = parse_options()
    if options.work:
        ours = options.work == "forkrl"
        steps = run_forkrl(options) if ours else run_trl(options, PEER_SETTINGS[options.setting])
        print(json.dumps(steps[1:]))
        return
    setting = {**describe_setting(), "model": options.model, "prompts": options.prompts, "seed": options.seed}
    counts = sorted({1, options.threads})
    ours = list(OUR_SETTINGS | (VLLM_SETTINGS if options.vllm else {}))
    settings = {"forkrl": ours, options.peer: options.peer_settings}
    ways = [(who, name, count) for who, names in settings.items() for name in names for count in counts]
    cases: list[dict[str, Any]] = []
    for number in range(1, options.rounds + 1):
        for who, name, threads in ways:
            steps = measure_apart(options, who, name, threads)
            cases += [{"who": who, "setting": name, "threads": threads, "round": number, **step} for step in steps]
            print(json.dumps(cases[-1]), flush=True)
            path = write_result(options.name, setting, cases)
    show(cases, options)
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A training step beside a peer's.")
    parser.add_argument("--peer", choices=["trl"], default="trl")
    parser.add_argument("--model", default=EMBEDDED, help="or the folder of SmolLM2 (forkrl model smollm2)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--name", default="step_time", help="of the result")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--peer-settings", nargs="+", choices=list(PEER_SETTINGS), default=list(PEER_SETTINGS))
    parser.add_argument("--vllm", action="store_true", help="also measure ForkRL with vLLM as its sampler")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=available_cores(), help="cores that each may use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(options: argparse.Namespace, who: str, name: str, threads: int) -> list[dict[str, float]]:
    """One turn, in a process of its own with its own defaults for waiting threads."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-m", "benchmarks.step_time", "--work", who, "--setting", name]
    command += ["--threads", str(threads), "--steps", str(options.steps), "--seed", str(options.seed)]
    command += ["--model", options.model, "--prompts", str(options.prompts)]
    environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    steps: list[dict[str, float]] = json.loads(output.splitlines()[-1])
    return steps


def run_forkrl(options: argparse.Namespace) -> list[dict[str, float]]:
    """The steps of ``forkrl train`` itself, as its metrics tell them."""
    from forkrl.parallel.threads import configure_environment

    configure_environment()
    from forkrl.training.loop import train
    from forkrl.training.open_run import open_run

    config = load_config(options, *(OUR_SETTINGS | VLLM_SETTINGS)[options.setting])
    with tempfile.TemporaryDirectory() as folder:
        with open_run(config, Path(folder) / "run") as run:
            train(run)
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    return [
        {
            "rollout_s": record["time/rollout_s"],
            "update_s": record["time/update_s"],
            "step_s": record["time/step_s"],
            "length": record["response/length"],
        }
        for record in map(json.loads, lines)
        if "time/step_s" in record
    ]


def load_config(options: argparse.Namespace, *overrides: str) -> Any:
    from forkrl.config import TrainConfig
    from forkrl.config.recipe import load_recipe

    embedded = options.model == EMBEDDED
    overrides = (
        f"model.path={options.model}", f"rollout.max_response_tokens={128 if embedded else 24}",
        f"seed={options.seed}", f"rollout.prompts_per_step={options.prompts}", f"rollout.group_size={GROUP}",
        "dynamic_sampling.enabled=false", "reward.overlong_cache=0",
        f"training.mini_batch_prompts={options.prompts}", f"training.steps={options.steps + 1}", f"optimizer.lr={LR}",
        "eval.every=0", "eval.problems=1", "log.rollouts_sampled=0", f"checkpoint.every={options.steps + 1}",
        f"runtime.threads={options.threads}", "model.gradient_checkpointing=false", *overrides,
    )  # fmt: skip
    return load_recipe(
        TrainConfig, Path("recipes") / ("countdown.toml" if embedded else "smollm2-sums.toml"), overrides
    )


def run_trl(options: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, float]]:
    """TRL's GRPOTrainer; the rollout is its generation, the update the rest of its step."""
    import time

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from forkrl.model.locations import model_location
    from forkrl.rewards.countdown import verify_countdown
    from forkrl.tasks import open_task

    trl: Any = importlib.import_module("trl")  # of the extra "bench"; a type checker need not find it
    torch.set_num_threads(options.threads)
    path, ours = model_location(options.model), load_config(options)
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = open_task(ours.task, tokenizer, max_prompt_tokens=ours.rollout.max_prompt_tokens)
    steps: list[dict[str, float]] = []

    class Timed(trl.GRPOTrainer):  # type: ignore[misc]
        rollout_s = 0.0

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            made = super()._generate(*args, **kwargs)
            self.rollout_s = time.perf_counter() - began
            return made

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step_s = time.perf_counter() - self.began
            steps.append({"rollout_s": trainer.rollout_s, "update_s": step_s - trainer.rollout_s, "step_s": step_s})

    def reward(completions: list[str], answer: list[str], **ignored: Any) -> list[float]:
        if options.model == EMBEDDED:
            return [verify_countdown(*pair) for pair in zip(answer, completions, strict=True)]
        return [
            float(text.strip().endswith(json.loads(right)["answer"]))
            for text, right in zip(completions, answer, strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        batch_size = options.prompts * GROUP // settings.get("gradient_accumulation_steps", 1)
        config = {
            "output_dir": folder, "per_device_train_batch_size": batch_size, "num_generations": GROUP,
            "max_completion_length": ours.rollout.max_response_tokens, "temperature": ours.rollout.temperature,
            "top_entropy_quantile": 0.2, "loss_type": "dapo",
            "beta": 0.0, "epsilon_high": 0.28, "learning_rate": LR, "max_steps": options.steps + 1, "logging_steps": 1,
            "report_to": "none", "save_strategy": "no", "use_cpu": True, "gradient_checkpointing": False,
            "disable_tqdm": True, "seed": options.seed, "lr_scheduler_type": "constant",
        }  # fmt: skip
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            reward_funcs=reward,
            args=trl.GRPOConfig(**config | settings),
            train_dataset=Dataset.from_list([{"prompt": p.text, "answer": str(p.answer)} for p in task.train]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        sys.stdout, printed = sys.stderr, sys.stdout
        trainer.train()
        sys.stdout = printed
    lengths = [line["completions/mean_length"] for line in trainer.state.log_history if "reward" in line]
    return [{**step, "length": length} for step, length in zip(steps, lengths, strict=True)]


def show(cases: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A row for each way, and how much longer than ForkRL it takes."""
    ways = list(dict.fromkeys((case["who"], case["setting"], case["threads"]) for case in cases))
    ours = list(dict.fromkeys(setting for who, setting, _ in ways if who == "forkrl"))

    def figures(way: tuple[str, str, int], name: str, number: int | None = None) -> list[float]:
        return [
            case[name]
            for case in cases
            if (case["who"], case["setting"], case["threads"]) == way and number in (None, case["round"])
        ]

    columns = ("who", "setting", "threads", "rollout s", "update s", "step s", "mean length")
    table = Table(*columns, *(f"times ForkRL's, {name}" for name in ours), box=None)
    for way in ways:
        cells = [
            f"{statistics.median(figures(way, name)):.2f}" for name in ("rollout_s", "update_s", "step_s", "length")
        ]
        for base in (("forkrl", name, way[2]) for name in ours):
            ratios = [
                statistics.median(figures(way, "step_s", number)) / statistics.median(figures(base, "step_s", number))
                for number in range(1, options.rounds + 1)
            ]
            ratio = statistics.median(figures(way, "step_s")) / statistics.median(figures(base, "step_s"))
            cells.append(f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        table.add_row(*map(str, way), *cells)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
