"""Time, memory and operations of the update's backward pass: forks-only beside dense, with and without checkpointing.

    python -m benchmarks.backward [--shapes 1024:512x4 8192:512x4 ...] [--ratio 0.2] [--device cuda]

Random weights in a Qwen3 shape (grouped queries 2:1), given as POSITIONS:WIDTHxLAYERS; one sequence, every position a
response token, the given share of them selected at random; one gradient of the sum of the selected log-probs. Each case
runs in a process of its own, so that its peak memory is its own: what the process holds above the model itself. Seconds
are the processor's, of one thread, in fp32; on an accelerator the clock's, in bf16, and memory the allocator's, of the
second of two gradients. Forks-only counts its pass without gradients, as it is where entropies are known
(it then ends at the last layer's keys and values). Where the shape allows it in
reasonable time, operations are counted (of matrix products; in attention the half that a causal mask leaves) and the
cosine with the dense gradient is taken, of the whole and of the first and last layers. With random weights and random
places it says little of a trained model (benchmarks/fidelity.py does); how time and memory grow is what this measures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks._record import describe_setting, write_result
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy, set_gradient_checkpointing
from forkrl.training.forks_only import compute_selected_stats
from forkrl.types import TokenBatch

PARTS = ("", "_first_layer", "_last_layer")
WAYS = ("dense", "dense, checkpointing", "forks_only", "forks_only, projections")
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
SHAPES = [f"{length}:512x4" for length in LENGTHS] + ["2048:256x4", "2048:1024x4", "2048:1024x28"]
MOST_POSITIONS_REPEATED, MOST_LAYERS_REPEATED = 8192, 8


def main() -> None:
    options = parse_options()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    setting = describe_setting() | {"seed": options.seed}
    cases: list[dict[str, Any]] = []
    for shape, way in itertools.product(options.shapes, WAYS):
        length, hidden, layers = map(int, shape.replace("x", ":").split(":"))
        sizes = {"length": length, "hidden": hidden, "layers": layers, "ratio": options.ratio}
        case = {**sizes, "way": way, "seed": options.seed, "device": options.device}
        cases.append(case | (measure_apart(case) if options.device == "cpu" else measure(case)))
        print(json.dumps(cases[-1]), flush=True)
        path = write_result("backward", setting, cases)
    show(cases)
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The backward pass over the forks only, beside the dense one.")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="POSITIONS:WIDTHxLAYERS")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(case: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the peak of a process cannot be reset."""
    command = [sys.executable, "-m", "benchmarks.backward", "--case", json.dumps(case)]
    figures: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return figures


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Seconds, peak mebibytes above the model, and for forks-only the cosines with the dense gradient."""
    torch.manual_seed(case["seed"])
    device = torch.device(case["device"])
    policy = build_policy(case["hidden"], case["layers"], device, checkpointing="checkpointing" in case["way"])
    batch, selected = build_batch(case["length"], case["ratio"], device)
    if device.type == "cpu":
        torch.set_num_threads(1)
        gradient(policy, *build_batch(64, case["ratio"], device), case["way"])  # warm: code paths, gradients' memory
    else:
        gradient(policy, batch, selected, case["way"])
    memory_before, began = start_peak(device), seconds_now(device)
    parts = gradient(policy, batch, selected, case["way"])
    figures = {"seconds": seconds_now(device) - began, "peak_mib": (peak_bytes(device) - memory_before) / 2**20}
    if case["length"] > MOST_POSITIONS_REPEATED or case["layers"] > MOST_LAYERS_REPEATED:
        return figures
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as operations:  # it slows small operations
        gradient(policy, batch, selected, case["way"])
    figures["flops"] = float(operations.get_total_flops())
    if case["way"].startswith("forks_only"):
        exact = gradient(policy, batch, selected, "dense")
        ours = (torch.cat(parts), parts[1], parts[-2])
        theirs = (torch.cat(exact), exact[1], exact[-2])
        for name, one, other in zip(PARTS, ours, theirs, strict=True):
            figures[f"cosine{name}"] = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    return figures


def seconds_now(device: torch.device) -> float:
    """The processor's own time, which other work does not lengthen, or the clock's once the device has done all."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def start_peak(device: torch.device) -> int:
    """Bytes in use; the peak is counted from here."""
    if device.type == "cpu":
        return peak_bytes(device)
    torch.accelerator.reset_peak_memory_stats(device)
    return torch.accelerator.memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


def attention_flops(query: Any, key: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products over the half of the positions that a causal mask leaves."""
    num_sequences, num_heads, length, width = query
    return int(num_sequences * num_heads * length * length * width * 4 // 2)


def attention_backward_flops(grad: Any, query: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Five products: the scores again, and four gradients."""
    return attention_flops(query, None) * 5 // 2


_AS = torch.ops.aten
ATTENTION: dict[Any, Any] = {
    _AS._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    _AS._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
"""PyTorch's own counter leaves these out."""


def build_policy(hidden: int, layers: int, device: torch.device, *, checkpointing: bool) -> Policy:
    tokenizer: Any = SimpleNamespace(eos_token_id=None)  # no text is read here
    config = Qwen3Config(
        vocab_size=1024, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, tie_word_embeddings=True,
    )  # fmt: skip
    with device:
        model = Qwen3ForCausalLM(config)
    if checkpointing:
        set_gradient_checkpointing(model, True)
    torch.nn.Module.eval(model)
    return Policy(model, tokenizer, "fp32" if device.type == "cpu" else "bf16")


def build_batch(length: int, ratio: float, device: torch.device) -> tuple[TokenBatch, Tensor]:
    ids = torch.randint(1024, (1, length + 1))
    mask, nothing = torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length)
    selected = torch.zeros_like(mask)
    selected[0, torch.randperm(length)[: max(1, int(ratio * length))]] = True
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], mask, mask, nothing, nothing, nothing[:, 0])
    return batch.to(device), selected.to(device)


def gradient(policy: Policy, batch: TokenBatch, selected: Tensor, way: str) -> list[Tensor]:
    """The gradient as one vector for the embedding, for each layer and for the last norm."""
    policy.model.zero_grad(set_to_none=True)
    if way.startswith("forks_only"):
        projections = way.endswith("projections")
        stats = compute_selected_stats(policy, batch, selected, temperature=1.0, projections=projections)
    else:
        stats = compute_token_stats(policy, batch, temperature=1.0)
    stats.logprobs[selected].sum().backward()
    decoder: Any = policy.decoder
    modules = [decoder.embed_tokens, *decoder.layers, decoder.norm]
    return [torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]) for module in modules]


def show(cases: list[dict[str, Any]]) -> None:
    """A line for each case, in plain text: a foreign machine may lack what draws tables."""
    columns = ("shape", "way", "seconds", "of dense", "peak MiB", "of dense", "operations of dense")
    rows: list[tuple[str, ...]] = [(*columns, "cosine", "first", "last")]
    for case in cases:
        shape = tuple(case[key] for key in ("length", "hidden", "layers"))
        dense = next(c for c in cases if (c["length"], c["hidden"], c["layers"], c["way"]) == (*shape, "dense"))
        ratios = {
            key: case[key] / dense[key] if dense[key] else float("nan")  # a peak may be below what was in use before
            for key in ("seconds", "peak_mib", "flops")
            if key in case
        }
        cells = [f"{case['seconds']:.2f}", f"{ratios['seconds']:.2f}", f"{case['peak_mib']:.0f}"]
        cells += [f"{ratios['peak_mib']:.2f}", f"{ratios['flops']:.2f}" if "flops" in case else ""]
        cells += [f"{case[f'cosine{part}']:.3f}" for part in PARTS] if "cosine" in case else []
        rows.append(("{}:{}x{}".format(*shape), case["way"], *cells))
    for row in rows:
        print(f"{row[0]:14} {row[1]:24}" + "".join(f"{cell:>20}" for cell in row[2:]))


if __name__ == "__main__":
    main()
