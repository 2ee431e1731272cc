"""The language-model head, forward and backward, beside peers: log-probs and entropies, a gradient on a share of rows.

    python -m benchmarks.head [--hidden 1024 2048 4096 5120] [--rows N] [--fraction 0.2] [--dtypes bfloat16 float32]

Everyone gets the same numbers and the same work: the log-prob of every row's target and, where they give it, the
entropy of every row; then the gradient of a weighted sum of the log-probs of a share of the rows, which are chosen at
random (0.2: forking tokens), in the hidden states and in the weight. Times are medians after one warm-up, in which
kernels are compiled. ``extra_share`` is the peak of memory above inputs and gradients, as a share of the logits' bytes.
Errors are relative, of some rows, against fp64; the naive head is the materialised one.

On a CPU each case is a process of its own, for a peak of its own; on CUDA each way is, and takes the sizes in turn.
What cannot run here is recorded with the reason. "materialised, selected rows" is nobody's product: two passes by
hand, the second one for the selected rows. It is shown beside the peers, and not counted as one.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._record import describe_setting, write_result
from forkrl.head import token_stats

ROWS, REPEATS = {"cuda": 8192, "cpu": 512}, {"cuda": 10, "cpu": 2}
NUM_CHECKED = 32
"""Rows compared with fp64."""


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    factors: Tensor
    """What each row's log-prob counts in the loss: 0 where it is not selected."""


Stats = tuple[Tensor, Tensor | None]


def main() -> None:
    options = parse_options()
    if options.case:
        for case in json.loads(options.case):
            print(json.dumps(measure(case)), flush=True)
        return
    setting = describe_setting() | {"seed": options.seed, "checked_rows": NUM_CHECKED}
    cases: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for hidden in options.hidden if options.device == "cpu" else [options.hidden]:
            cases += measure_ways(options, dtype, [hidden] if isinstance(hidden, int) else hidden)
            path = write_result("head", setting, cases)
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time, memory and error of the head, beside peers.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes and ways that take seconds, to see that it runs")
    parser.add_argument("--rows", type=int, help="token positions")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2048, 4096, 5120])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--fraction", type=float, default=0.2, help="share of the rows that carry gradient")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rows = options.rows or ROWS[options.device]
    options.repeats = options.repeats or REPEATS[options.device]
    if options.small:
        options.rows, options.hidden, options.vocabulary, options.repeats = 40, [64], 1000, 1
        options.ways, options.dtypes = ["ours, chunked", "materialised", "verl"], ["bfloat16"]
    return options


def measure_ways(options: argparse.Namespace, dtype: str, hidden_sizes: list[int]) -> list[dict[str, Any]]:
    """Every way, each in a process of its own, and how they compare at each size."""
    names = ("device", "rows", "vocabulary", "fraction", "threads", "repeats", "seed")
    work = {name: getattr(options, name) for name in names} | {"dtype": dtype}
    cases: list[dict[str, Any]] = []
    for way in options.ways:
        wanted = [{**work, "hidden": hidden, "way": way} for hidden in hidden_sizes]
        for case in measure_apart(wanted):
            cases.append(case)
            print(json.dumps(case), flush=True)
    for hidden in hidden_sizes:
        compare([case for case in cases if case["hidden"] == hidden])
    return cases


def measure_apart(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run cases in a fresh process; those that it does not reach carry its last words."""
    command = [sys.executable, "-m", "benchmarks.head", "--case", json.dumps(wanted)]
    ended = subprocess.run(command, capture_output=True, text=True)
    figures = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    words = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
    figures += [{"failed": words[-1]}] * (len(wanted) - len(figures))
    return [case | found for case, found in zip(wanted, figures, strict=True)]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds, memory and errors of one way at one size, or why it failed."""
    torch.set_num_threads(case["threads"])
    try:
        run = WAYS[case["way"]](case["device"])
        problem = make_problem(case)
        logprobs, entropy = step(run, problem)[:2]
        found = errors(problem, logprobs, entropy)
        problem.hidden.grad = problem.weight.grad = None
        before = current_memory(case["device"])
        times = [step(run, problem)[2:] for _ in range(case["repeats"])]
    except Exception as error:  # whatever a peer raises is its result
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]}
    forward, backward = (statistics.median(part) for part in zip(*times, strict=True))
    totals = sorted(map(sum, times))
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in (problem.hidden, problem.weight))
    extra = peak_memory(case["device"]) - before - gradients
    logits = case["rows"] * case["vocabulary"] * problem.weight.element_size()
    return {
        "forward_s": forward,
        "backward_s": backward,
        "total_s": statistics.median(totals),
        "total_range_s": [totals[0], totals[-1]],
        "entropy": entropy is not None,
        "extra_mib": extra / 2**20,
        "extra_share": extra / logits,
        "errors": found,
    }


def make_problem(case: dict[str, Any]) -> Problem:
    """Rows between almost decided and wide open. On the device, since a CPU takes a minute for the largest."""
    device, dtype = case["device"], getattr(torch, case["dtype"])
    generator = torch.Generator(device).manual_seed(case["seed"])
    rows, hidden, vocabulary = case["rows"], case["hidden"], case["vocabulary"]
    spread = torch.linspace(0.1, 1, rows, device=device)[:, None]
    hidden_ND = (torch.randn(rows, hidden, generator=generator, device=device) * spread).to(dtype)
    weight_VD = torch.empty(vocabulary, hidden, device=device, dtype=dtype)
    weight_VD.normal_(0, 4 / hidden**0.5, generator=generator)
    targets_N = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    selected = torch.randperm(rows, generator=generator, device=device)[: max(1, math.ceil(case["fraction"] * rows))]
    factors_N = torch.zeros(rows, device=device)
    factors_N[selected] = torch.linspace(-1, 2, len(selected), device=device)
    return Problem(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N, factors_N)


def step(run: Callable[[Problem], Stats], problem: Problem) -> tuple[Tensor, Tensor | None, float, float]:
    """Forward and backward once: what came out, and the seconds of each."""
    problem.hidden.grad = problem.weight.grad = None
    began = now(problem)
    logprobs, entropy = run(problem)
    between = now(problem)
    (logprobs * problem.factors).sum().backward()
    ended = now(problem)
    return logprobs.detach(), None if entropy is None else entropy.detach(), between - began, ended - between


def now(problem: Problem) -> float:
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def errors(problem: Problem, logprobs: Tensor, entropy: Tensor | None) -> dict[str, float]:
    """Relative errors of some rows against fp64, of this way and of the materialised head in the same dtype."""
    rows = problem.factors.nonzero().squeeze(1)[:NUM_CHECKED]
    hidden, weight, targets = problem.hidden.detach()[rows], problem.weight.detach(), problem.targets[rows]
    logits = torch.cat([hidden.double() @ some.double().T for some in weight.split(4096)], 1)
    true_logprobs, true_entropy, true_grad_logits = definition(logits, targets, problem.factors[rows].double())
    pieces = zip(true_grad_logits.split(4096, 1), weight.split(4096), strict=True)
    true_grad = sum(grad @ some.double() for grad, some in pieces)
    naive_logits = (hidden @ weight.T).float()
    naive_logprobs, naive_entropy, naive_grad_logits = definition(naive_logits, targets, problem.factors[rows])
    found = {"logprobs": (logprobs[rows], true_logprobs), "naive_logprobs": (naive_logprobs, true_logprobs)}
    if entropy is not None:
        found |= {"entropy": (entropy[rows], true_entropy), "naive_entropy": (naive_entropy, true_entropy)}
    if problem.hidden.grad is not None:
        naive_grad = naive_grad_logits.to(weight.dtype) @ weight
        found |= {"grad_hidden": (problem.hidden.grad[rows], true_grad), "naive_grad_hidden": (naive_grad, true_grad)}
    return {name: float((one.double() - true).norm() / true.norm()) for name, (one, true) in found.items()}


def definition(logits: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies as they are read, and the gradient of the weighted sum of the former."""
    log_p = logits.log_softmax(1)
    grad_logits = -factors[:, None] * log_p.exp()
    grad_logits.scatter_add_(1, targets[:, None], factors[:, None])
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1), grad_logits


def current_memory(device: str) -> int:
    """Bytes in use now, from where the peak is counted anew: of the device, or resident in this process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up has freed would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    """Linux keeps the resident size and its high-water mark per process, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def compare(cases: list[dict[str, Any]]) -> None:
    """Add to our cases the ratio of their time to the best peer's: of those with an entropy, and of all."""
    peers = [case for case in cases if case["way"] in PEERS and "total_s" in case]
    for case in cases:
        if case["way"].startswith("ours") and "total_s" in case:
            for name, rivals in (("with_entropy", [p for p in peers if p["entropy"]]), ("at_all", peers)):
                if rivals:
                    best = min(rivals, key=lambda peer: float(peer["total_s"]))
                    case[f"best_peer_{name}"] = best["way"]
                    case[f"ratio_to_best_{name}"] = case["total_s"] / best["total_s"]


def ours(backend: str) -> Callable[[str], Callable[[Problem], Stats]]:
    def run(problem: Problem) -> Stats:
        stats = token_stats(problem.hidden, problem.weight, problem.targets, backend=backend)
        return stats.logprobs, stats.entropy

    return lambda device: run


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer writes down: all logits in the model's dtype, their softmax in fp32."""
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


def load_materialised(device: str) -> Callable[[Problem], Stats]:
    return lambda problem: materialised(*problem[:3])


def load_compiled(device: str) -> Callable[[Problem], Stats]:
    compiled = torch.compile(materialised)
    return lambda problem: compiled(*problem[:3])


def load_selected_rows(device: str) -> Callable[[Problem], Stats]:
    def run(problem: Problem) -> Stats:
        with torch.no_grad():
            logprobs, entropy = materialised(*problem[:3])
        selected = problem.factors.nonzero().squeeze(1)
        some, _ = materialised(problem.hidden[selected], problem.weight, problem.targets[selected])
        return logprobs.index_copy(0, selected, some), entropy

    return run


def load_liger(device: str) -> Callable[[Problem], Stats]:
    function = importlib.import_module(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    ).LigerFusedLinearScaledCrossEntropyFunction

    def run(problem: Problem) -> Stats:
        loss, entropy = function.apply(*problem[:3], 1.0, -100, 1, True)
        return -loss, entropy

    return run


def load_cut_cross_entropy(device: str) -> Callable[[Problem], Stats]:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    implementation = "cce" if device == "cuda" else "torch_compile"
    return lambda problem: (-function(*problem[:3], reduction="none", impl=implementation), None)


def load_verl(device: str) -> Callable[[Problem], Stats]:
    """Its packages import Ray and more, which its kernels do not need: they are found without running those imports."""
    for name in ("verl", "verl.utils", "verl.utils.kernel"):
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError("No module named 'verl'")
            package = types.ModuleType(name)
            package.__path__ = list(spec.submodule_search_locations or [])
            sys.modules[name] = package
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda problem: function(*problem[:3], 1.0, "none", None)


PEERS: dict[str, Callable[[str], Callable[[Problem], Stats]]] = {
    "materialised": load_materialised,
    "materialised, compiled": load_compiled,
    "liger": load_liger,
    "cut-cross-entropy": load_cut_cross_entropy,
    "verl": load_verl,
}
WAYS: dict[str, Callable[[str], Callable[[Problem], Stats]]] = {
    "ours, chunked": ours("chunked"),
    "ours, triton": ours("triton"),
    **PEERS,
    "materialised, selected rows": load_selected_rows,
}


if __name__ == "__main__":
    main()
