"""Whole RL steps on random weights: rollout and update through ForkRL's own functions, in the shapes of Qwen3.

    python -m benchmarks.gpu.steps --shape 0.6B --response 2048 [--device cuda]

Weights and gradients are fp32 and products bf16, as ForkRL trains. The optimizer is AdamW, but for 8B: there its
averages would take the memory from 66 to 131 GB before anything is computed, so the step is plain SGD, which takes
hundredths of a second less of an update of many; and its dense update recomputes its layers, whose activations would
not fit.

Every response has the full length (no token ends one). A rollout is measured in two windows, of the first and of the
last tokens, and their mean stands for every token: the time of a token grows linearly with what the cache holds. The
update is of one batch, in both ways, the forks-only and the dense. Operations are those that a way needs: layers that
are recomputed count once. ``share`` is of the rate of a bf16 product measured here, ``bandwidth_share`` that of a copy,
where a token reads the bf16 weights and the cache once.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks._record import describe_setting, write_result
from benchmarks.gpu.limits import copy_rate, product_rate, synchronize
from forkrl.method.batches import cut_micro_batches
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy, set_gradient_checkpointing
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.training.update import update_policy
from forkrl.types import Prompt, SamplingParams, TokenBatch

PROMPT, GROUP, RATIO = 64, 8, 0.2


class Shape(NamedTuple):
    """A model, and the batch that fits beside it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    vocabulary: int = 151_936
    optimizer: str = "AdamW"
    recompute: bool = False
    tokens_per_step: int = 32 * 8192
    micro_batch_tokens: int = 16_512  # two responses of 8,192 with their prompts
    forks_only_tokens: int = 16_512
    window: int = 64


SHAPES = {
    "0.6B": Shape(1024, 3072, 28, 16, 8, 128, tied=True),
    "8B": Shape(
        4096, 12288, 36, 32, 8, 128, tied=False, optimizer="SGD", recompute=True, tokens_per_step=16 * 8192,
        forks_only_tokens=8_256,
    ),
    "tiny": Shape(
        64, 128, 2, 4, 2, 16, tied=True, vocabulary=512, tokens_per_step=256, micro_batch_tokens=256, window=4
    ),
}  # fmt: skip


def main() -> None:
    options = parse_options()
    shape = SHAPES[options.shape]
    torch.manual_seed(0)
    model = build_model(shape, options.device)
    batch = build_batch(shape, options)
    limits = measure_limits(options)
    setting = describe_setting() | {"shape": options.shape, **shape._asdict(), "sequences": len(batch)}
    setting |= {"response": options.response, "prompt": PROMPT, "ratio": RATIO, "parameters": model.num_parameters()}
    cases: list[dict[str, Any]] = []

    def record(stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        cases.append({"stage": stage, **attempt(work, options.device)})
        print(cases[-1], flush=True)
        write_result(f"steps-{options.shape}-{options.response}", setting, cases)
        return cases[-1]

    policy = Policy(model, Numerals(shape.vocabulary), "bf16")  # type: ignore[arg-type]
    rollout = record("rollout", lambda: measure_rollout(policy, shape, options, limits))
    batch = with_statistics(policy, batch, shape)
    optimizer = build_optimizer(model, shape)
    for way in ("dense", "forks_only"):
        update = record(f"update, {way}", lambda way=way: measure_update(model, optimizer, batch, shape, way, limits))  # type: ignore[misc]
        record(f"step, {way}", lambda update=update: whole_step(rollout, update, limits, batch.num_response_tokens))  # type: ignore[misc]
    if failed := [f"{case['stage']}: {case['failed']}" for case in cases if "failed" in case]:
        raise SystemExit("; ".join(failed))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="RL steps on random weights.")
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--response", type=int, default=2048, help="tokens of every response")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


class Numerals:
    """A tokenizer whose texts are numbers, and whose end no model writes: it is no token of the vocabulary."""

    bos_token_id = unk_token_id = None
    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def __init__(self, vocabulary: int) -> None:
        self.eos_token_id = vocabulary

    def encode(self, text: str, **ignored: Any) -> list[int]:
        return [int(numeral) for numeral in text.split()]

    def decode(self, ids: list[int], **ignored: Any) -> str:
        return " ".join(map(str, ids))


def build_model(shape: Shape, device: str) -> Qwen3ForCausalLM:
    with torch.device(device):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim, tie_word_embeddings=shape.tied, max_position_embeddings=40_960,
            )
        )  # fmt: skip
    torch.nn.Module.eval(model)
    return model


def build_optimizer(model: Qwen3ForCausalLM, shape: Shape) -> torch.optim.Optimizer:
    return getattr(torch.optim, shape.optimizer)(model.parameters(), lr=1e-6)  # type: ignore[no-any-return]


def count_sequences(shape: Shape, response: int) -> int:
    """Sequences of a step, whole groups of them."""
    return max(GROUP, shape.tokens_per_step // response)


def build_batch(shape: Shape, options: argparse.Namespace) -> TokenBatch:
    """Random responses of full length with advantages of both signs; statistics come later."""
    num_sequences, length = count_sequences(shape, options.response), PROMPT + options.response
    ids = torch.randint(shape.vocabulary, (num_sequences, length), device=options.device)
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    response_mask, nothing = mask.clone(), torch.zeros_like(mask, dtype=torch.float32)
    response_mask[:, : PROMPT - 1] = False
    signs = torch.tensor([1.0, -1.0], device=options.device).repeat(num_sequences)[:num_sequences]
    return TokenBatch(ids[:, :-1], ids[:, 1:], mask, response_mask, nothing, nothing, signs)


class Limits(NamedTuple):
    """Rates of this machine, a second: operations of bf16 products, and bytes of copies."""

    flops: float
    num_bytes: float


def measure_limits(options: argparse.Namespace) -> Limits:
    """On tensors that leave room beside the model."""
    on_cpu = torch.device(options.device).type == "cpu"
    size, num_bytes = (256, 2**20) if on_cpu else (8192, 2**31)
    return Limits(product_rate(options.device, "bf16", size), copy_rate(options.device, num_bytes))


def attempt(work: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """The figures of a stage with its peak memory, or why it failed."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)
    try:
        figures = work()
    except (RuntimeError, ValueError) as error:  # out of memory is one of these
        return {"failed": str(error).strip().splitlines()[0]}
    return {"peak_bytes": peak_bytes(device)} | figures


def reset_peak(device: str) -> None:
    """Count the peak from here; a CPU's is that of the process and cannot be reset."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """The most memory that was in use at once since the peak was reset."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_rollout(policy: Policy, shape: Shape, options: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """Seconds of a whole rollout, from reading the prompts and from two windows of decoding."""
    seconds = rollout_clock(policy, shape, options)
    times = extrapolate_rollout(seconds, options.response, shape.window)
    return times | rollout_rates(times["seconds"], shape, options.response, limits)


def rollout_clock(policy: Policy, shape: Shape, options: argparse.Namespace) -> Callable[[int, int], float]:
    """A function that decodes so many tokens after prompts of so many others, and tells the seconds."""
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=2**20, max_sequences=2**20)

    def seconds(prompt_tokens: int, tokens: int) -> float:
        ids = torch.randint(shape.vocabulary, (count_sequences(shape, options.response) // GROUP, prompt_tokens))
        prompts = [Prompt(str(place), " ".join(map(str, row)), "") for place, row in enumerate(ids.tolist())]
        generator = torch.Generator(options.device).manual_seed(0)
        synchronize(options.device)
        began = time.perf_counter()
        engine.generate(prompts, group_size=GROUP, sampling=SamplingParams(tokens), generator=generator)
        synchronize(options.device)
        return time.perf_counter() - began

    return seconds


def rollout_rates(rollout_s: float, shape: Shape, response: int, limits: Limits) -> dict[str, float]:
    num_sequences = count_sequences(shape, response)
    read = PROMPT / GROUP  # a group's prompt is read once
    flops = num_sequences * (response * head_flops(shape) + (read + response) * layer_flops(shape, response))
    bytes_per_token = 2 * matrix_weights(shape) + num_sequences * (PROMPT + response / 2) * cache_bytes(shape)
    return {
        "tokens_per_s": num_sequences * response / rollout_s,
        "flops": flops,
        "share": flops / rollout_s / limits.flops,
        "bandwidth_share": bytes_per_token * response / rollout_s / limits.num_bytes,
    }


def extrapolate_rollout(seconds: Callable[[int, int], float], response: int, window: int) -> dict[str, Any]:
    """Seconds of a rollout from its first and its last tokens.

    Args:
        seconds: what reading prompts of so many tokens and writing so many to each takes.
        response: tokens of every response.
        window: how many tokens are written at either end, at most half of them.
    """
    window = min(window, response // 2)

    def seconds_per_token(before: int) -> float:
        return (seconds(PROMPT + before, window + 1) - seconds(PROMPT + before, 1)) / window

    seconds(PROMPT, 3)  # warm
    early_s, late_s = seconds_per_token(0), seconds_per_token(response - window - 1)
    rollout_s = seconds(PROMPT, 1) + (response - 1) * (early_s + late_s) / 2
    return {"seconds": rollout_s, "seconds_per_token": {"early": early_s, "late": late_s}}


@torch.no_grad()
def with_statistics(policy: Policy, batch: TokenBatch, shape: Shape) -> TokenBatch:
    """The batch with the log-probs and entropies that the policy gives it, as a rollout would have."""
    logprobs, entropy = batch.old_logprobs.clone(), batch.rollout_entropy.clone()
    for rows in cut_micro_batches(batch, shape.micro_batch_tokens, packed=policy.packs):
        stats = compute_token_stats(policy, batch.rows(rows), temperature=1.0)
        logprobs[rows], entropy[rows] = stats
    return dataclasses.replace(batch, old_logprobs=logprobs, rollout_entropy=entropy)


def measure_update(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: TokenBatch,
    shape: Shape,
    way: str,
    limits: Limits,
) -> dict[str, Any]:
    """Seconds of one gradient step on the batch, after one on its first micro-batch."""
    recompute = shape.recompute and way == "dense"
    set_gradient_checkpointing(model, recompute)
    workers = Workers(Policy(model, Numerals(shape.vocabulary), "bf16"))  # type: ignore[arg-type]
    max_tokens = shape.micro_batch_tokens if way == "dense" else shape.forks_only_tokens
    settings: Any = build_settings(way, max_tokens)
    device = str(batch.input_ids.device)

    def seconds(part: TokenBatch) -> float:
        generator = torch.Generator(device).manual_seed(0)
        synchronize(device)
        began = time.perf_counter()
        update_policy(workers, optimizer, part, settings, generator, on_policy=True)
        synchronize(device)
        return time.perf_counter() - began

    seconds(batch.rows(cut_micro_batches(batch, max_tokens, packed=workers.policy.packs)[0]))  # warm
    update_s, flops = seconds(batch), update_flops(shape, batch, way)
    return {
        "seconds": update_s,
        "tokens_per_s": batch.num_response_tokens / update_s,
        "flops": flops,
        "share": flops / update_s / limits.flops,
    }


def build_settings(way: str, max_tokens: int) -> SimpleNamespace:
    """What an update reads of a recipe: its defaults, and tokens chosen over the batch. Recipes need pydantic."""
    return SimpleNamespace(
        rollout=SimpleNamespace(temperature=1.0),
        selection=SimpleNamespace(
            options={}, rule="top_entropy", ratio=RATIO, threshold=None, scope="mini_batch", entropy="current"
        ),
        weights=SimpleNamespace(rule="none"),
        loss=SimpleNamespace(
            objective="dapo",
            options={},
            needs_reference=False,
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=None,
            denominator="selected",
            kl_coef=0.0,
            entropy_coef=0.0,
        ),
        optimizer=SimpleNamespace(max_grad_norm=1.0),
        training=SimpleNamespace(micro_batch_tokens=max_tokens, backward=way),
        forks_only=SimpleNamespace(projections=False, prompt=False, sampled=0.0, kept_mib=1024),
    )


def whole_step(rollout: dict[str, Any], update: dict[str, Any], limits: Limits, num_tokens: int) -> dict[str, Any]:
    """Rollout and update together; no verifier is timed."""
    if "failed" in rollout or "failed" in update:
        return {"failed": "for want of a part"}
    seconds, flops = rollout["seconds"] + update["seconds"], rollout["flops"] + update["flops"]
    return {
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "share": flops / seconds / limits.flops,
        "peak_bytes": max(rollout["peak_bytes"], update["peak_bytes"]),
    }


def matrix_weights(shape: Shape) -> int:
    """Parameters of the matrix products that one token goes through, head included."""
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate) + shape.hidden * shape.vocabulary


def head_flops(shape: Shape) -> float:
    """Of one token, forward."""
    return 2.0 * shape.hidden * shape.vocabulary


def layer_flops(shape: Shape, length: int) -> float:
    """Of one token of a sequence, forward, attention to the half of it that on average stands before included."""
    weights = 2 * matrix_weights(shape) - head_flops(shape)
    return weights + 4 * shape.layers * shape.heads * shape.head_dim * (length / 2)


def update_flops(shape: Shape, batch: TokenBatch, way: str) -> float:
    """Of a gradient step that knows the entropies; the backward takes twice its forward, the head selected rows."""
    layers = batch.input_ids.numel() * layer_flops(shape, batch.input_ids.shape[1])
    head = RATIO * batch.num_response_tokens * head_flops(shape)
    return (3 if way == "dense" else 1 + 3 * RATIO) * layers + 3 * head


def cache_bytes(shape: Shape) -> int:
    """Of one token, in bf16."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim


if __name__ == "__main__":
    main()
