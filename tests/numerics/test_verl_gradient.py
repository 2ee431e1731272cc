"""For the same batch, verl with the plug-in has the gradient of ForkRL's own loop, on one rank and on two.

And the same figures, and the same selection; and padding, which verl appends to a batch that does not divide, adds to
none of them.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from forkrl.cluster.record import selection_metrics
from forkrl.cluster.settings import verl_environment
from forkrl.config import ModelConfig, TrainConfig
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.workers import Workers
from forkrl.training.metrics import update_metrics
from forkrl.training.update import Update, choose_in_rollout_batch, update_policy
from forkrl.types import TokenBatch
from tests.numerics.test_golden_trace import build_batch
from tests.once import once
from tests.signals import in_pairs

pytestmark = [
    pytest.mark.verl,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason='needs the extra "verl"'),
]
PREFIX = "forkrl/"
WEIGHTED = "importance weights"
"""verl's ``rollout_is``: weights of responses, by which the local loop would have other advantages."""
BASE: dict[str, Any] = {
    "rollout": {"max_response_tokens": 64, "max_prompt_tokens": 16, "prompts_per_step": 8, "group_size": 2},
    "reward": {"overlong_cache": 0},
    "training": {"mini_batch_prompts": 4, "micro_batch_tokens": 4096},
    "optimizer": {"max_grad_norm": 1e9},
    "runtime": {"device": "cpu"},
}
SMALL = {"mini_batch_prompts": 4, "micro_batch_tokens": 120}
CASES: dict[str, dict[str, Any]] = {
    "all tokens": {"selection": {"rule": "all", "scope": "mini_batch"}},
    "rollout batch": {"selection": {"scope": "rollout_batch", "entropy": "rollout"}},
    "rollout batch, all response tokens below": {
        "selection": {"scope": "rollout_batch", "entropy": "rollout"},
        "loss": {"denominator": "response"},
    },
    "mini-batch, rollout entropy": {"selection": {"scope": "mini_batch", "entropy": "rollout"}},
    "mini-batch, current entropy": {"selection": {"scope": "mini_batch"}},
    "mini-batch, current entropy, many micro-batches": {"selection": {"scope": "mini_batch"}, "training": SMALL},
    "micro-batch": {"selection": {"scope": "micro_batch"}},
    "micro-batch, many": {"selection": {"scope": "micro_batch"}, "training": SMALL},
    "sequence": {"selection": {"scope": "sequence"}, "training": SMALL},
    "sequence, rollout entropy": {"selection": {"scope": "sequence", "entropy": "rollout"}},
    "threshold": {"selection": {"rule": "threshold", "threshold": 0.4}},
    "bottom": {"selection": {"rule": "bottom_entropy", "ratio": 0.8, "scope": "mini_batch"}},
    "clip, dual clip, KL": {
        "selection": {"scope": "mini_batch"},
        "loss": {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": 1.1, "kl_coef": 0.1},
    },
    WEIGHTED: {"selection": {"scope": "mini_batch"}},
    "gmts": {"selection": {"rule": "gmts", "scope": "mini_batch"}, "training": SMALL},
    "gmts, sequence": {"selection": {"rule": "gmts", "scope": "sequence"}},
    "proximal entropy": {
        "selection": {"rule": "proximal_entropy", "scope": "mini_batch", "options": {"window": 9}},
    },
    "low probability": {"selection": {"rule": "low_probability", "scope": "rollout_batch", "entropy": "rollout"}},
    "surprisal": {"selection": {"rule": "rsi"}, "training": SMALL},
    "stapo": {"selection": {"rule": "stapo", "scope": "mini_batch", "options": {"probability": 0.3}}},
    "weights": {"selection": {"scope": "mini_batch"}, "weights": {"rule": "w_reinforce"}},
    "entropy advantage": {
        "selection": {"rule": "all", "scope": "mini_batch"},
        "weights": {"rule": "entropy_advantage"},
        "training": SMALL,
    },
    "steer": {"selection": {"scope": "mini_batch"}, "weights": {"rule": "steer"}, "training": SMALL},
    "stare": {
        "selection": {"rule": "all", "scope": "rollout_batch", "entropy": "rollout"},
        "weights": {"rule": "stare", "options": {"negative": 0.9, "target_entropy": 99.0}},
    },
    "proximal weights": {"selection": {"rule": "all", "scope": "mini_batch"}, "weights": {"rule": "proximal_entropy"}},
    "AR": {"selection": {"scope": "mini_batch"}, "weights": {"rule": "prob_reweight"}},
    "weights, sequence": {"selection": {"rule": "all", "scope": "sequence"}, "weights": {"rule": "w_reinforce"}},
    "cispo": {"selection": {"scope": "mini_batch"}, "loss": {"objective": "cispo"}, "training": SMALL},
    "gspo": {
        "selection": {"scope": "mini_batch"},
        "loss": {"objective": "gspo", "clip_low": 0.05, "clip_high": 0.05},
        "training": SMALL,
    },
    "gmpo": {"selection": {"rule": "all"}, "loss": {"objective": "gmpo"}, "training": SMALL},
    "sapo": {"selection": {"scope": "mini_batch"}, "loss": {"objective": "sapo"}},
    "dppo": {"selection": {"scope": "mini_batch"}, "loss": {"objective": "dppo_tv"}},
    "hapo": {"selection": {"scope": "mini_batch"}, "loss": {"objective": "hapo"}},
    "archer": {"selection": {"scope": "mini_batch"}, "loss": {"objective": "archer", "options": {"kl_coef": 0.1}}},
    "dr_grpo": {"selection": {"rule": "all"}, "loss": {"objective": "dr_grpo", "denominator": 500}},
    "KL-Cov": {"selection": {"rule": "all"}, "loss": {"objective": "kl_cov", "options": {"fraction": 0.2}}},
    "Clip-Cov": {"selection": {"rule": "all"}, "loss": {"objective": "clip_cov", "options": {"fraction": 0.2}}},
    "entropy bonus": {"selection": {"scope": "mini_batch"}, "loss": {"entropy_coef": 0.05}},
}
LAYOUTS = {"one rank": (1, 0), "two ranks": (2, 0), "a rank of padding": (2, 8)}
"""Ranks, and sequences of padding behind the batch."""
OTHER_CUTS = {("micro-batch", "two ranks"), *(("micro-batch, many", layout) for layout in LAYOUTS)}
"""Where verl has other micro-batches, so that other tokens are selected in them; the loss is then compared on those."""
ALONE = {("KL-Cov", "two ranks"), ("Clip-Cov", "two ranks")}
"""Objectives that compare the tokens of a micro-batch, of which two ranks have other ones: not compared."""
PAIRS = [(name, layout) for layout in LAYOUTS for name in CASES if (name, layout) not in ALONE]
Found = dict[str, dict[str, tuple[dict[str, Tensor], dict[str, float], dict[int, dict[str, Any]]]]]
"""Gradient, metrics, and what was told of each sequence, by layout and case."""


def recipe(sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {*BASE, *sections}}


@pytest.fixture(scope="module")
def policies() -> tuple[Policy, Policy]:
    """The policy that is trained, some way from the one that it started from."""
    start = open_policy(ModelConfig(path="embedded:countdown-base"), "cpu")
    trained = Policy(copy.deepcopy(start.model), start.tokenizer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return trained, start


@pytest.fixture(scope="module")
def batch(policies: tuple[Policy, Policy]) -> TokenBatch:
    """Sampled by a policy so near that most tokens are not clipped: a token selected wrongly shows in the gradient."""
    made, generator = in_pairs(build_batch()), torch.Generator().manual_seed(3)
    with torch.no_grad():
        logprobs_BT = compute_token_stats(policies[0], made, temperature=1.0).logprobs
    noise_BT = 0.2 * torch.randn(logprobs_BT.shape, generator=generator)
    advantages = made.advantages.clone()
    advantages[3] = 0.0  # a response that carries no gradient counts among the selected all the same
    return replace(made, old_logprobs=(logprobs_BT + noise_BT) * made.response_mask, advantages=advantages)


@pytest.fixture(scope="module")
def found(policies: tuple[Policy, Policy], batch: TokenBatch, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """verl's."""

    def run(folder: Path) -> None:
        trained, start = policies
        trained.model.save_pretrained(folder / "model")
        start.tokenizer.save_pretrained(folder / "model")
        with torch.no_grad():
            reference_BT = compute_token_stats(start, batch, temperature=1.0).logprobs
        (folder / "reference.json").write_text(json.dumps(reference_BT.tolist()))
        (folder / "old.json").write_text(json.dumps(batch.old_logprobs.tolist()))
        (folder / "advantages.json").write_text(json.dumps(batch.advantages.tolist()))
        (folder / "weights.json").write_text(json.dumps(importance(batch).tolist()))
        (folder / "recipe.json").write_text(json.dumps(recipe({"runtime": {"trainer": "verl"}})))
        (folder / "cases.json").write_text(json.dumps({name: recipe(sections) for name, sections in CASES.items()}))
        for size in (1, 2):  # importing verl takes longer than all cases: the same processes run every padding
            run_ranks(folder, size, [padding for ranks, padding in LAYOUTS.values() if ranks == size])

    folder, _ = once(tmp_path_factory, "verl-gradient", run)
    return {layout: {name: read(folder, name, *ranks) for name in CASES} for layout, ranks in LAYOUTS.items()}


def importance(batch: TokenBatch) -> Tensor:
    """A weight for each response, ``[B]``."""
    return torch.linspace(0.5, 2.0, len(batch))


def read(folder: Path, name: str, size: int, padding: int) -> Any:
    said = [json.loads((folder / f"{name}-{size}-{padding}-{rank}.json").read_text()) for rank in range(size)]
    told = {each["row"]: each for rank in said for each in rank["details"]}
    gradient = load_file(folder / f"{name}-{size}-{padding}-0.safetensors")
    return gradient, {key.removeprefix(PREFIX): value for key, value in said[0]["metrics"].items()}, told


def run_ranks(folder: Path, size: int, paddings: list[int]) -> None:
    config = TrainConfig.model_validate(recipe({}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **verl_environment(config), "PYTHONPATH": os.pathsep.join(["src", "."])}
    environment["VERL_USE_EXTERNAL_MODULES"] = "tests.verl_cpu.register,forkrl.cluster.plugin"
    environment |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_LOCAL_WORLD_SIZE": str(size)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.numerics.verl_rank", str(folder), *map(str, paddings)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(output[-4000:] for output in outputs)


def own_update(
    policies: tuple[Policy, Policy], batch: TokenBatch, name: str, told: dict[int, dict[str, Any]] | None
) -> tuple[dict[str, Tensor], dict[str, float], Update]:
    """Gradient, metrics and selection of the local loop; with the selection that was told, where one is given."""
    trained, start = policies
    working = Policy(copy.deepcopy(trained.model), trained.tokenizer)
    config = TrainConfig.model_validate(recipe(CASES[name]))
    generator = torch.Generator().manual_seed(1)
    chosen = batch
    if config.selection.scope == "rollout_batch":
        chosen = choose_in_rollout_batch(batch, config, generator)
    if told is not None:
        selected_BT = torch.zeros_like(batch.response_mask)
        for row, each in told.items():
            selected_BT[row, batch.response_mask[row]] = torch.tensor(each["selected"])
        chosen = replace(batch, selected=selected_BT)
    if name == WEIGHTED:
        chosen = replace(chosen, advantages=chosen.advantages * importance(batch))
    optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
    reference = start if config.loss.needs_reference else None
    update = update_policy(Workers(working, reference), optimizer, chosen, config, generator)
    found = {key: parameter.grad for key, parameter in working.model.named_parameters() if parameter.grad is not None}
    return found, update_metrics([batch], [update]), update


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_verl_has_the_gradient_of_the_local_loop(
    policies: tuple[Policy, Policy], batch: TokenBatch, found: Found, name: str, layout: str
) -> None:
    theirs, _, told = found[layout][name]
    own, _, _ = own_update(policies, batch, name, told if (name, layout) in OTHER_CUTS else None)
    assert own.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in own.values())
    assert largest > 1e-3
    difference = max(float((own[key] - theirs[key]).abs().max()) for key in own)
    assert difference < 1e-5 * largest, f"{difference:.2g} with a largest gradient of {largest:.2g}"


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_verl_has_the_figures_and_the_selection_of_the_local_loop(
    policies: tuple[Policy, Policy], batch: TokenBatch, found: Found, name: str, layout: str
) -> None:
    _, figures, told = found[layout][name]
    other = (name, layout) in OTHER_CUTS
    _, own, update = own_update(policies, batch, name, told if other else None)
    figures = selection_metrics(figures)
    names = [key for key in own if key.startswith(("selection/", "loss/", "entropy/"))]
    for key in set(names) - ({"entropy/threshold"} if other else set()):
        # An entropy near 0 is a difference of large numbers.
        absolute = 2e-4 if key == "entropy/threshold" else 1e-6
        assert figures[key] == pytest.approx(own[key], rel=1e-4, abs=absolute, nan_ok=True), key
    assert sorted(told) == list(range(len(batch)))
    for row in told:
        assert told[row]["selected"] == update.selected_BT[row][batch.response_mask[row]].tolist()
