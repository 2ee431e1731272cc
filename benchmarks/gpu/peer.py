"""A whole RL step of TRL, to stand beside ours: the shape, batch and lengths of ``benchmarks.gpu.steps``.

    python -m benchmarks.gpu.peer --shape 0.6B --response 2048 [--device cuda]

TRL's GRPOTrainer with the DAPO loss on the top 20% of tokens, weights in fp32 and products in bf16, and no layer
recomputed, as ours. Its optimizer (AdamW, fused) and its generation (``model.generate``, no server beside it) are its
defaults. Its micro-batches hold as many response tokens as ours hold tokens.

One step warms the update up, the next is measured. Of its rollout only the two windows are decoded in which ours is
measured, after which the responses are random, as ours are, and the update trains on all their tokens. The whole
rollout would take, by arithmetic, one to three minutes of the nine for everything: 2,048 tokens at 30 to 80 ms, where
30 is for launching the kernels of 28 layers, and 80 with the copying and converting of a full cache of 46 GB (keys in
fp32, as autocast leaves them, values in bf16). What TRL does to a response once it is written, turning it into text
above all, counts to the rollout.

A peer that is missing is no failure of ours: the result says so and the exit status is 0. One that is there and fails,
fails its part like any other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks._record import describe_setting, write_result
from benchmarks.gpu.limits import synchronize
from benchmarks.gpu.steps import (
    GROUP,
    PROMPT,
    RATIO,
    SHAPES,
    Shape,
    attempt,
    build_model,
    count_sequences,
    extrapolate_rollout,
    parse_options,
    peak_bytes,
    reset_peak,
)

PEER = "trl==1.16.0"
STEPS = 2  # one to warm up

Record = Callable[[dict[str, Any]], None]


def main() -> None:
    options = parse_options()
    # The trainer refuses several devices in sight; ours takes the first. Said before anything asks for a device.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    shape = SHAPES[options.shape]
    setting = describe_setting() | {"shape": options.shape, **shape._asdict(), "response": options.response}
    setting |= {"prompt": PROMPT, "sequences": count_sequences(shape, options.response), "ratio": RATIO}
    cases: list[dict[str, Any]] = []

    def record(case: dict[str, Any]) -> None:
        cases.append(case)
        print(case, flush=True)
        write_result(f"peer-{options.shape}-{options.response}", setting, cases)

    if missing := [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]:
        record({"stage": "step", "failed": f"{missing[0]} is not installed: pip install {PEER}"})
        return
    setting |= {"peer": f"trl {importlib.metadata.version('trl')}"}
    outcome = attempt(lambda: measure_step(shape, options, record), options.device)
    if "failed" in outcome:
        record({"stage": "step", **outcome})
        raise SystemExit(outcome["failed"])


def measure_step(shape: Shape, options: argparse.Namespace, record: Record) -> dict[str, Any]:
    """Record rollout, update and step of the last of ``STEPS``."""
    trl = importlib.import_module("trl")  # of the extra "bench"; a type checker need not find it
    datasets = importlib.import_module("datasets")
    torch.manual_seed(0)
    num_prompts = STEPS * count_sequences(shape, options.response) // GROUP
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer_class(trl, shape, options, record)(
            model=build_model(shape, options.device),
            reward_funcs=alternate,
            args=trl.GRPOConfig(output_dir=folder, **build_arguments(shape, options)),
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": " ".join(map(str, ids))} for ids in random_ids(shape, num_prompts, PROMPT)]
            ),
            processing_class=build_tokenizer(shape.vocabulary),
        )
        trainer.add_callback(build_clock(trainer, shape, options, record))
        trainer.train()
    return {}


def build_arguments(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """What makes the trainer's step the same work as ours."""
    num_sequences = count_sequences(shape, options.response)
    micro_batch = min(num_sequences, max(1, shape.micro_batch_tokens // options.response))
    return {
        "per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": num_sequences // micro_batch,
        "num_generations": GROUP, "max_completion_length": options.response, "max_steps": STEPS, "use_vllm": False,
        "loss_type": "dapo", "top_entropy_quantile": RATIO, "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28,
        "temperature": 1.0, "learning_rate": 1e-6, "max_grad_norm": 1.0, "bf16": True,
        "gradient_checkpointing": shape.recompute, "use_cpu": torch.device(options.device).type == "cpu",
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


def build_trainer_class(trl: Any, shape: Shape, options: argparse.Namespace, record: Record) -> Any:
    """TRL's trainer, but its responses are random, and in the last step its own generation is measured in windows."""
    device: str = options.device

    class WindowedTrainer(trl.GRPOTrainer):  # type: ignore[misc]
        generate_s = 0.0  # of the latest call of _generate, to its very end

        def _send_telemetry(self) -> None:
            """A benchmark reports to nobody."""

        def _generate(self, prompts: list[str]) -> Any:
            began = now(device)
            made = super()._generate(prompts)
            if self.state.global_step == STEPS - 1:
                self.rollout["seconds"] += now(device) - began - self.windows_s
                self.rollout["tokens_per_s"] = len(prompts) * options.response / self.rollout["seconds"]
                record({"stage": "rollout", **self.rollout})
            reset_peak(device)  # what follows is the update's
            self.generate_s = now(device) - began
            return made

        def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> Any:
            began = now(device)
            if self.state.global_step == STEPS - 1:
                self.rollout = self._measure_windows(len(prompt_ids), *rest)
            responses = random_ids(shape, len(prompt_ids), options.response)
            self.windows_s = now(device) - began
            return responses, None

        def _measure_windows(self, num_sequences: int, *rest: Any) -> dict[str, Any]:
            peaks: list[int] = []

            def seconds(prompt_tokens: int, tokens: int) -> float:
                distinct = random_ids(shape, num_sequences // GROUP, prompt_tokens)
                prompts = [ids for ids in distinct for _ in range(GROUP)]
                self.generation_config.max_new_tokens = tokens
                forget_reading(self.model, device)
                began = now(device)
                super(WindowedTrainer, self)._generate_single_turn(prompts, *rest)
                taken_s = now(device) - began
                peaks.append(peak_bytes(device))
                return taken_s

            times = extrapolate_rollout(seconds, options.response, shape.window)
            return times | {"peak_bytes": max(peaks)}

    return WindowedTrainer


def forget_reading(model: torch.nn.Module, device: str) -> None:
    """Count the peak from the end of the next forward: the late window reads at once what a rollout writes slowly."""

    def forget(*ignored: Any) -> None:
        reset_peak(device)
        once.remove()

    once = model.register_forward_hook(forget)


def build_clock(trainer: Any, shape: Shape, options: argparse.Namespace, record: Record) -> Any:
    """A callback of the trainer that records the last step."""
    callback: Any = importlib.import_module("transformers").TrainerCallback  # needs accelerate, which may be missing
    device, num_tokens = options.device, count_sequences(shape, options.response) * options.response

    class Clock(callback):  # type: ignore[misc]
        def on_step_begin(self, *ignored: Any, **named: Any) -> None:
            self.began = now(device)

        def on_step_end(self, settings: Any, state: Any, *ignored: Any, **named: Any) -> None:
            if state.global_step < STEPS:
                return
            seconds, peak = now(device) - self.began - trainer.generate_s, peak_bytes(device)
            record({"stage": "update", "peak_bytes": peak, "seconds": seconds, "tokens_per_s": num_tokens / seconds})
            seconds, peak = seconds + trainer.rollout["seconds"], max(peak, trainer.rollout["peak_bytes"])
            record({"stage": "step", "peak_bytes": peak, "seconds": seconds, "tokens_per_s": num_tokens / seconds})

    return Clock()


def build_tokenizer(vocabulary: int) -> Any:
    """Its texts are numbers, and its end is no token of the model's vocabulary: no response ends early."""
    words = {str(number): number for number in range(vocabulary)} | {"end": vocabulary}
    tokenizer = Tokenizer(WordLevel(words, unk_token="end"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="end")


def random_ids(shape: Shape, num_sequences: int, length: int) -> list[list[int]]:
    ids: list[list[int]] = torch.randint(shape.vocabulary, (num_sequences, length)).tolist()
    return ids


def alternate(completions: list[str], **ignored: Any) -> list[float]:
    """Rewards that give every group advantages of both signs."""
    return [float(place % 2) for place in range(len(completions))]


def now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
