"""What a recipe may ask of ForkRL's own loop and verl cannot do. Each is refused by name, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.parallel.even_shares import require_even_shares

_LARGEST_SEED = 2**31
"""Samplers add the number of their replica to it, and keep it in 32 bits."""


def refuse_untranslatable(config: TrainConfig) -> None:
    """Check a recipe against what verl can honour.

    Raises:
        UserError: one line that names the key, its value and the remedy.
    """
    _refuse_what_is_of_one_machine(config)
    _refuse_of_the_task(config)
    _refuse_uneven_sampling(config)
    require_even_shares(config)
    _refuse_of_the_cluster(config)
    if config.runtime.device == "cpu":
        _refuse_on_cpu(config)


def refuse_unsuitable_prompts(config: TrainConfig, prompts: Mapping[str, int]) -> None:
    """Check the prompts that a task came to.

    verl draws from all rows alike, in epochs; the parts of a mix keep their weights only where those are their shares
    of the rows.

    Args:
        config: the recipe.
        prompts: how many there are to train on, by ``Prompt.source``.

    Raises:
        UserError: too few, or a mix that would come out in other proportions than its weights.
    """
    total, wanted = sum(prompts.values()), config.rollout.prompts_per_step
    if total < wanted:
        raise UserError(
            f"rollout.prompts_per_step = {wanted}, but the task has {total} prompts to train on, and verl needs one "
            f"step's worth at least; lower it, or bring more prompts"
        )
    weights = sum(part.weight for part in config.task.parts)
    for part in config.task.parts:
        share, asked = prompts.get(part.label, 0) / total, part.weight / weights
        if abs(share - asked) > 0.01:
            raise UserError(
                f"task.parts: {part.label} has weight {part.weight:g}, {asked:.1%} of the prompts, but "
                f"{prompts.get(part.label, 0)} of {total} rows, and verl draws from all rows alike; make the weights "
                f'the parts\' numbers of rows, or use runtime.engine = "local"'
            )


def _refuse_what_is_of_one_machine(config: TrainConfig) -> None:
    if config.seed >= _LARGEST_SEED:
        raise UserError(f"seed = {config.seed} is too large for verl's samplers; take one below {_LARGEST_SEED}")
    if config.model.revision is not None:
        raise UserError(
            f"model.revision = {config.model.revision!r} cannot be handed to verl; download that revision to a folder, "
            f"and set model.path to the folder"
        )
    if config.training.backward != "dense":
        raise UserError(
            f'training.backward = "{config.training.backward}" is of ForkRL\'s own loop; set it to "dense" for '
            f'runtime.engine = "verl"'
        )
    if config.rollout.cuda_graphs:
        raise UserError(
            "rollout.cuda_graphs = true is of ForkRL's own sampler; verl's decode by graphs of their own: set it to "
            'false for runtime.engine = "verl"'
        )
    runtime = config.runtime
    if runtime.device not in ("auto", "cuda", "cpu"):
        raise UserError(
            f'runtime.device = "{runtime.device}" is not for runtime.engine = "verl", which takes GPUs by '
            f'cluster.gpus_per_node; set it to "auto"'
        )
    if runtime.threads:
        raise UserError(
            f'runtime.threads = {runtime.threads} is of ForkRL\'s own loop; for runtime.engine = "verl" leave it out, '
            f"and set OMP_NUM_THREADS on each node if need be"
        )
    if runtime.replicas:
        raise UserError(
            f'runtime.replicas = {runtime.replicas} is of ForkRL\'s own loop; for runtime.engine = "verl" set '
            f"cluster.nodes and cluster.gpus_per_node"
        )


def _refuse_of_the_task(config: TrainConfig) -> None:
    tasks = [("task.", config.task), *((f"task.parts ({part.label}): ", part) for part in config.task.parts)]
    for place, task in tasks:
        if task.curriculum.raise_above is not None:
            raise UserError(
                f"{place}curriculum.raise_above = {task.curriculum.raise_above} follows the run, and verl draws from "
                f'all prompts alike; set difficulty instead, or use runtime.engine = "local"'
            )


def _refuse_uneven_sampling(config: TrainConfig) -> None:
    at_a_time, per_step = config.dynamic_sampling.generation_prompts, config.rollout.prompts_per_step
    if at_a_time % per_step:
        raise UserError(
            f"dynamic_sampling.generation_prompts = {at_a_time} is not a multiple of rollout.prompts_per_step = "
            f"{per_step}, and verl counts in those; set it to 0 or to a multiple"
        )
    if at_a_time > per_step and config.cluster.trainer != "sync":
        raise UserError(
            f'dynamic_sampling.generation_prompts = {at_a_time} is for cluster.trainer = "sync"; with '
            f'"{config.cluster.trainer}" set it to 0, one step is sampled ahead'
        )


def _refuse_of_the_cluster(config: TrainConfig) -> None:
    cluster = config.cluster
    if cluster.nodes > 1 and not cluster.address:
        raise UserError(
            f"cluster.nodes = {cluster.nodes}, but cluster.address is empty, which starts Ray on this machine alone; "
            f'start Ray on every node and set the address, "auto" on the head node'
        )


def _refuse_on_cpu(config: TrainConfig) -> None:
    """verl without a GPU is there for tests, and does what they need."""
    cluster = config.cluster
    allowed = {
        "cluster.nodes": (cluster.nodes, 1),
        "cluster.tensor_parallel": (cluster.tensor_parallel, 1),
        "cluster.sequence_parallel": (cluster.sequence_parallel, 1),
        "cluster.rollout_engine": (cluster.rollout_engine, "vllm"),
        "cluster.offload": (cluster.offload, False),
        "model.precision": (config.model.precision, "fp32"),
        "loss.kl_coef": (config.loss.kl_coef, 0.0),
    }
    for key, (value, only) in allowed.items():
        if value != only:
            raise UserError(
                f'{key} = {value!r} is for GPUs, but runtime.device = "cpu", verl\'s testing platform; set it to '
                f"{only!r}, or leave runtime.device out"
            )
