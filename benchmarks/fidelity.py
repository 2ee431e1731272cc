"""How near the forks-only gradient comes to the exact one, and what each way to bring it nearer costs.

    python -m benchmarks.fidelity [--ratios 0.1 0.2 0.3 0.5 1.0] [--batches 4] [--model PATH]

On the policy's own rollouts, judged by the task's verifier, with the loss of the recipe: the gradient of one update of
every batch, by each way, beside that of the dense way with the same selected tokens. The cosine is of the whole
gradient, of that of the layers without the embedding (which is the head as well), and of each layer; "norm" is the
ratio of norms. What is random ("sampled") is drawn ``--draws`` times; the cosine is of single draws, and of their mean.
Cost is the update's processor time over that of dense, in the same process, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks._record import describe_setting, write_result
from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.method.advantages import group_advantages, informative_groups
from forkrl.method.batches import collate
from forkrl.model.policy import open_policy
from forkrl.parallel.workers import Workers
from forkrl.rewards import open_verifier
from forkrl.rollout import EmbeddedEngine
from forkrl.rollout.scoring import score_groups
from forkrl.tasks import open_task
from forkrl.training.update import update_policy
from forkrl.types import SamplingParams, TokenBatch

WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "forks-only": {},
    "projections": {"projections": True},
    "prompt": {"prompt": True},
    "projections and prompt": {"projections": True, "prompt": True},
    "sampled 0.05": {"sampled": 0.05},
    "sampled 0.2": {"sampled": 0.2},
    "sampled 0.5": {"sampled": 0.5},
}
FIGURES = ("cosine", "cosine_of_mean", "cosine_of_layers", "norm")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    setting = {**describe_setting(), "seed": options.seed}
    config = load_recipe(TrainConfig, Path("recipes/countdown.toml"), [f"model.path={options.model}"])
    policy = open_policy(config.model, "cpu")
    batches = [sample_batch(policy, config, options.seed + number) for number in range(options.batches)]
    cases: list[dict[str, Any]] = []
    for ratio in options.ratios:
        measured = [measure(policy, batch, config, ratio, options.draws) for batch in batches]
        for way in WAYS:
            cases.append({"ratio": ratio, "way": way, **average([batch[way] for batch in measured])})
            print(cases[-1], flush=True)
        path = write_result(options.name, setting, cases)
    show(cases)
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fidelity of the forks-only gradient, and its cost.")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 1.0])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--model", default="embedded:countdown-base")
    parser.add_argument("--name", default="fidelity", help="of the result")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def sample_batch(policy: Any, config: TrainConfig, seed: int) -> TokenBatch:
    """Groups that teach something, one mini-batch of the recipe, with their advantages."""
    task = open_task(config.task, policy.tokenizer)
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=64, max_sequences=512)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(task.train), generator=generator)[:32].tolist()
    groups = engine.generate(
        [task.train[place] for place in places],
        group_size=config.rollout.group_size,
        sampling=SamplingParams(config.rollout.max_response_tokens),
        generator=generator,
    )
    with open_verifier(task.verifiers, config.reward) as verifier:
        groups = score_groups(groups, verifier)
    useful = informative_groups(torch.tensor([group.scores for group in groups]))
    kept = [group for group, yes in zip(groups, useful, strict=True) if yes][: config.training.mini_batch_prompts]
    advantages = group_advantages(torch.tensor([group.scores for group in kept]))
    return collate(kept, advantages, pad_id=policy.tokenizer.eos_token_id)


def measure(policy: Any, batch: TokenBatch, config: TrainConfig, ratio: float, draws: int) -> dict[str, dict[str, Any]]:
    """Cosines, norm and seconds of every way on one batch."""
    exact: dict[str, Tensor] = {}
    figures = {}
    for way, settings in WAYS.items():
        runs = [
            gradient(policy, batch, config, ratio, way, settings, seed)
            for seed in range(draws if "sampled" in settings else 2)
        ]
        parts = {name: torch.stack([run[0][name] for run in runs]) for name in runs[0][0]}
        exact = exact or {name: part[0] for name, part in parts.items()}
        whole, truth = torch.cat(list(parts.values()), 1), torch.cat(list(exact.values()))
        layers, true_layers = (
            torch.cat([part for name, part in each.items() if name.startswith("layer")], -1) for each in (parts, exact)
        )
        figures[way] = {
            "cosine": float(cosine_similarity(whole, truth[None]).mean()),
            "cosine_of_mean": float(cosine_similarity(whole.mean(0), truth, dim=0)),
            "cosine_of_layers": float(cosine_similarity(layers, true_layers[None]).mean()),
            "norm": float(whole.norm(dim=1).mean() / truth.norm()),
            "layers": {name: float(cosine_similarity(part, exact[name][None]).mean()) for name, part in parts.items()},
            "seconds": min(run[1] for run in runs),
        }
    return figures


def gradient(
    policy: Any, batch: TokenBatch, config: TrainConfig, ratio: float, way: str, settings: dict[str, Any], seed: int
) -> tuple[dict[str, Tensor], float]:
    """The gradient of each part of the model, and the processor's seconds; the weights stay as they are."""
    changes = {
        "selection": config.selection.model_copy(update={"ratio": ratio}),
        "training": config.training.model_copy(update={"backward": "dense" if way == "dense" else "forks_only"}),
        "forks_only": config.forks_only.model_copy(update=settings),
        "optimizer": config.optimizer.model_copy(update={"max_grad_norm": 1e9}),
    }
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    update_policy(Workers(policy), optimizer, batch, config.model_copy(update=changes), generator, on_policy=True)
    seconds = time.process_time() - began
    decoder = policy.decoder
    modules = {"embedding": decoder.embed_tokens} | {f"layer {n}": m for n, m in enumerate(decoder.layers)}
    modules["last norm"] = decoder.norm
    return {
        name: torch.cat([p.grad.flatten() for p in module.parameters()]) for name, module in modules.items()
    }, seconds


def average(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Over batches; seconds are a sum."""
    means = {name: statistics.mean(each[name] for each in figures) for name in FIGURES}
    layers = {name: statistics.mean(each["layers"][name] for each in figures) for name in figures[0]["layers"]}
    return {**means, "layers": layers, "seconds": sum(each["seconds"] for each in figures)}


def show(cases: list[dict[str, Any]]) -> None:
    layers = list(cases[0]["layers"])
    table = Table("ratio", "way", "time / dense", "cosine", "of mean", "of layers", "norm", *layers, box=None)
    for case in cases:
        dense = next(other for other in cases if (other["ratio"], other["way"]) == (case["ratio"], "dense"))
        figures = [case["seconds"] / dense["seconds"], *(case[name] for name in FIGURES)]
        table.add_row(
            f"{case['ratio']:g}", case["way"], *(f"{each:.3f}" for each in figures + list(case["layers"].values()))
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
