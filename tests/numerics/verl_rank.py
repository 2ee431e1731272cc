"""One rank of verl's, without Ray: the gradients of its actor on a given batch, by ForkRL's loss.

Run by test_verl_gradient.py, one process per rank: ``python -m tests.numerics.verl_rank FOLDER PADDING...``.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import torch
import verl
from omegaconf import open_dict
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from forkrl.cluster.options import ForkOptions
from forkrl.cluster.settings import VerlPaths
from forkrl.cluster.translate import verl_overrides
from forkrl.cluster.worker import (
    GROUP,
    PREFIX,
    PROGRESS,
    REWARD,
    ROW,
    SELECTED,
    WEIGHTS,
    ForkLoss,
    ForkWorker,
    Progress,
    choose_tokens,
    loss_config,
    nested,
    read_signals,
)
from forkrl.config import TrainConfig
from forkrl.config.recipe import parse_recipe
from forkrl.methods import objective_of
from forkrl.types import TokenBatch
from tests.numerics.test_golden_trace import build_batch
from tests.signals import in_pairs


def main(folder: Path, paddings: list[int]) -> None:
    """Every case with each number of sequences of padding after the batch, as verl fills one up."""
    cases = json.loads((folder / "cases.json").read_text())
    worker = open_worker(folder)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batch = replace(
        in_pairs(build_batch()), old_logprobs=_read(folder / "old.json"), advantages=_read(folder / "advantages.json")
    )
    weights_B = _read(folder / "weights.json")
    reference_BT = _read(folder / "reference.json")
    for padding, (name, sections) in itertools.product(paddings, cases.items()):
        config = parse_recipe(TrainConfig, sections, name)
        data = as_verl_has_it(batch, reference_BT, config, padding)
        if name == "importance weights":
            lengths_B = data["response_mask"].offsets().diff()
            weights = [*weights_B.tolist(), *[1.0] * padding]
            rows = [torch.full((n,), w) for n, w in zip(lengths_B.tolist(), weights, strict=True)]
            data["rollout_is_weights"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        gradients, metrics, details = gradient(worker, config, data, rank, size)
        save_file(gradients, folder / f"{name}-{size}-{padding}-{rank}.safetensors")
        (folder / f"{name}-{size}-{padding}-{rank}.json").write_text(
            json.dumps({"metrics": metrics, "details": details})
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _read(path: Path) -> Tensor:
    return torch.tensor(json.loads(path.read_text()), dtype=torch.float32)


def open_worker(folder: Path) -> Any:
    """An actor as verl's trainer makes it, from a recipe."""
    config = parse_recipe(TrainConfig, json.loads((folder / "recipe.json").read_text()), "recipe")
    paths = VerlPaths(str(folder / "model"), *[folder / name for name in ("a", "b", "c", "d", "e")])
    configs = Path(verl.__file__).parent / "trainer" / "config"
    with hydra.initialize_config_dir(str(configs), version_base=None):
        composed = hydra.compose("ppo_trainer", verl_overrides(config, paths, stop_token_ids=()))
    with open_dict(composed):
        composed.actor_rollout_ref.forkrl = composed.forkrl
        composed.actor_rollout_ref.actor.optim.total_training_steps = 1
    worker = ForkWorker(config=composed.actor_rollout_ref, role="actor")
    worker.init_model()
    return worker


def gradient(
    worker: Any, config: TrainConfig, data: TensorDict, rank: int, size: int
) -> tuple[dict[str, Tensor], dict[str, float], list[dict[str, Any]]]:
    """What the optimizer would step by, whole; the metrics; what this rank tells of its sequences."""
    training, caught = worker.actor, {}
    options = _options(config)
    training.set_loss_fn(ForkLoss(options, loss_config(_loss_settings(config), options)))
    original = training.engine.optimizer_step

    def catch() -> float:
        for name, parameter in training.engine.module.named_parameters():
            whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            caught[name] = whole.detach().clone().contiguous()
        return 1.0  # the weights stay as they are

    training.engine.optimizer_step = catch
    try:
        own = tu.chunk_tensordict(data, size)[rank]
        tu.assign_non_tensor(
            own,
            mini_batch_size=len(data),
            **{PROGRESS: Progress(0.0, 1.0, 1)},
            epochs=1,
            seed=0,
            dataloader_kwargs={"shuffle": False},
            temperature=config.rollout.temperature,
            global_batch_size=len(data),
            calculate_entropy=_reads_own_entropies(config),
            max_token_len_per_gpu=config.training.micro_batch_tokens,
        )
        output = training.train_mini_batch(own)
    finally:
        training.engine.optimizer_step = original
    metrics = {key: float(values[0]) for key, values in tu.get(output, "metrics").items() if key.startswith(PREFIX)}
    return caught, metrics, training.loss_fn.details


def _options(config: TrainConfig) -> ForkOptions:
    selection = config.selection
    return ForkOptions(
        rule=selection.rule,
        ratio=selection.ratio,
        threshold=selection.threshold,
        scope=selection.scope,
        entropy=selection.entropy,
        options=selection.options,
        weights=config.weights,
        objective=config.loss.objective,
        objective_options=config.loss.options,
        denominator=config.loss.denominator,
    )


def _reads_own_entropies(config: TrainConfig) -> bool:
    selection = config.selection
    in_loss = selection.entropy == "current" and selection.scope in ("micro_batch", "sequence")
    return in_loss or config.loss.entropy_coef != 0 or objective_of(config.loss.objective).entropy


def _loss_settings(config: TrainConfig) -> SimpleNamespace:
    loss = config.loss
    return SimpleNamespace(
        clip_ratio_low=loss.clip_low,
        clip_ratio_high=loss.clip_high,
        clip_ratio_c=float("inf") if loss.dual_clip is None else loss.dual_clip,
        use_kl_loss=loss.needs_reference,
        kl_loss_coef=loss.kl_coef,
        entropy_coeff=loss.entropy_coef,
    )


def as_verl_has_it(batch: TokenBatch, reference_BT: Tensor, config: TrainConfig, padding: int) -> TensorDict:
    """The batch as it lies in the TransferQueue when a trainer calls for the update: nested, one row a response."""
    rows: list[dict[str, Tensor]] = []
    for row in range(len(batch)):
        length = int(batch.attention_mask[row].sum())
        ids = torch.cat([batch.input_ids[row, :length], batch.targets[row, length - 1 : length]])
        start = int(batch.response_mask[row].nonzero()[0])
        own = slice(start, length)
        ones = torch.ones(length - start, dtype=torch.int64)
        rows.append(
            {
                "input_ids": ids,
                "position_ids": torch.arange(len(ids)),
                "prompts": ids[: start + 1],
                "responses": ids[start + 1 :],
                "response_mask": ones,
                "loss_mask": ones,
                "old_log_probs": batch.old_logprobs[row, own],
                "ref_log_prob": reference_BT[row, own],
                "entropy": batch.rollout_entropy[row, own],
                "advantages": batch.advantages[row].expand(length - start).clone(),
            }
        )
    rows += [_padding(rows[0]) for _ in range(padding)]
    fields: dict[str, Any] = {
        name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged) for name in rows[0]
    }
    # What the trainer adds.
    assert batch.groups is not None and batch.rewards is not None
    fields[GROUP] = torch.cat([batch.groups, -1 - torch.arange(padding)])[:, None]
    fields[REWARD] = torch.cat([batch.rewards, torch.zeros(padding)])[:, None]
    if config.selection.scope == "rollout_batch":
        data = TensorDict(fields, batch_size=len(rows))
        signals = read_signals(data.to_padded_tensor(), (config.loss.clip_low, config.loss.clip_high))
        choice = choose_tokens(signals, _options(config), "any")
        fields[SELECTED] = nested(choice.selected_BT.to(torch.int8), data)
        if choice.weights_BT is not None:
            fields[WEIGHTS] = nested(choice.weights_BT, data)
    fields[ROW] = torch.tensor([*range(len(batch)), *[-1] * padding])[:, None]
    return TensorDict(fields, batch_size=len(rows))


def _padding(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sequence that verl appends to a batch which does not divide: one token of response, and that masked."""
    ids, none = torch.ones(16, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    whole = {"input_ids": ids, "position_ids": torch.arange(len(ids)), "prompts": ids[:-1], "responses": ids[-1:]}
    masks = {"response_mask": none, "loss_mask": none}
    # Log-probs and entropies are measured of it as of any other; its advantage is 0.
    measured = {name: torch.full((1,), 9.0) for name in ("old_log_probs", "ref_log_prob", "entropy")}
    return {**like, **whole, **masks, **measured, "advantages": torch.zeros(1)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(padding) for padding in sys.argv[2:]])
