"""Time, memory and fidelity of the update's backward pass: forks-only beside dense, with and without checkpointing.

    python -m benchmarks.backward [--lengths 1024 2048 4096 8192] [--hidden 512] [--layers 8] [--ratio 0.2]

Random weights in a Qwen3 shape (grouped queries 2:1), one sequence, every position a response token, the given share of
them selected at random; one gradient of the sum of the selected log-probs. Each case runs in a process of its own, so
that its peak memory is its own: what the process holds above the model itself. Forks-only counts its pass without
gradients. The cosine is that of the whole gradient with the dense one, and of its first and last layers. With random
weights and random places it says little of a trained model; how time and memory grow is what this measures.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks._record import describe_setting, write_result
from forkrl.backward import compute_selected_stats, compute_token_stats
from forkrl.model import Policy
from forkrl.sft import build_character_tokenizer
from forkrl.types import TokenBatch

PARTS = ("", "_first_layer", "_last_layer")
WAYS = ("dense", "dense, checkpointing", "forks_only")


def main() -> None:
    options = parse_options()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    setting = describe_setting() | {"seed": options.seed}
    cases: list[dict[str, Any]] = []
    for length in options.lengths:
        for way in WAYS:
            sizes = {"length": length, "hidden": options.hidden, "layers": options.layers, "ratio": options.ratio}
            case = {**sizes, "way": way, "threads": options.threads, "seed": options.seed}
            command = [sys.executable, "-m", "benchmarks.backward", "--case", json.dumps(case)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            cases.append(case | json.loads(output))
            print(json.dumps(cases[-1]), flush=True)
            path = write_result("backward", setting, cases)
    show(cases)
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The backward pass over the forks only, beside the dense one.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Seconds, peak mebibytes above the model, and for forks-only the cosines with the dense gradient."""
    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    policy = build_policy(case["hidden"], case["layers"], checkpointing="checkpointing" in case["way"])
    batch, selected = build_batch(case["length"], case["ratio"])
    gradient(policy, *build_batch(64, case["ratio"]), case["way"])  # warm: code paths, and memory for the gradients
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    parts = gradient(policy, batch, selected, case["way"])
    seconds = time.perf_counter() - began
    figures = {"seconds": seconds, "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}
    if case["way"] == "forks_only":
        exact = gradient(policy, batch, selected, "dense")
        ours = (torch.cat(parts), parts[1], parts[-2])
        theirs = (torch.cat(exact), exact[1], exact[-2])
        for name, one, other in zip(PARTS, ours, theirs, strict=True):
            figures[f"cosine{name}"] = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    return figures


def build_policy(hidden: int, layers: int, *, checkpointing: bool) -> Policy:
    tokenizer = build_character_tokenizer("0123456789+-*/=,:;!?[] ")
    config = Qwen3Config(
        vocab_size=1024, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.nn.Module.eval(model)
    return Policy(model, tokenizer)


def build_batch(length: int, ratio: float) -> tuple[TokenBatch, Tensor]:
    ids = torch.randint(1024, (1, length + 1))
    mask, nothing = torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length)
    selected = torch.zeros_like(mask)
    selected[0, torch.randperm(length)[: max(1, int(ratio * length))]] = True
    return TokenBatch(ids[:, :-1], ids[:, 1:], mask, mask, nothing, nothing, nothing[:, 0]), selected


def gradient(policy: Policy, batch: TokenBatch, selected: Tensor, way: str) -> list[Tensor]:
    """The gradient as one vector for the embedding, for each layer and for the last norm."""
    policy.model.zero_grad(set_to_none=True)
    if way == "forks_only":
        stats = compute_selected_stats(policy, batch, selected, temperature=1.0)
    else:
        stats = compute_token_stats(policy, batch, temperature=1.0)
    stats.logprobs[selected].sum().backward()
    decoder: Any = policy.decoder
    modules = [decoder.embed_tokens, *decoder.layers, decoder.norm]
    return [torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]) for module in modules]


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("length", "way", "seconds", "of dense", "peak MiB", "of dense", "cosine", "first", "last", box=None)
    for case in cases:
        dense = next(other for other in cases if (other["length"], other["way"]) == (case["length"], "dense"))
        cosines = [f"{case[f'cosine{part}']:.3f}" for part in PARTS] if "cosine" in case else []
        times, memory = case["seconds"] / dense["seconds"], case["peak_mib"] / dense["peak_mib"]
        row = (str(case["length"]), case["way"], f"{case['seconds']:.2f}", f"{times:.2f}", f"{case['peak_mib']:.0f}")
        table.add_row(*row, f"{memory:.2f}", *cosines)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
