"""How a recipe and a model spread over GPUs."""

from __future__ import annotations

from typing import NamedTuple

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.parallel.even_shares import require_even_shares
from forkrl.planning.activations import Arithmetic
from forkrl.planning.shapes import ModelShape


class Layout(NamedTuple):
    """GPUs of a run and what each has a part of. The local engine has one."""

    nodes: int
    gpus_per_node: int
    tensor_parallel: int
    sequence_parallel: int
    sharded: bool
    """Weights, gradients and optimizer state are spread over all GPUs (FSDP2, by verl)."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def replicas(self) -> int:
        """Copies of the model that sample."""
        return self.gpus // self.tensor_parallel


def find_layout(config: TrainConfig, shape: ModelShape) -> Layout:
    """The layout of a recipe.

    Raises:
        UserError: one of its sizes does not divide another, or the heads of the model.
    """
    if config.runtime.engine == "local":
        return Layout(1, 1, 1, 1, sharded=False)
    cluster = config.cluster
    layout = Layout(
        cluster.nodes, cluster.gpus_per_node, cluster.tensor_parallel, cluster.sequence_parallel, sharded=True
    )
    require_even_shares(config)
    for key, value in (
        ("cluster.tensor_parallel", layout.tensor_parallel),
        ("cluster.sequence_parallel", layout.sequence_parallel),
    ):
        _divide_heads(key, value, shape)
    return layout


def _divide_heads(key: str, value: int, shape: ModelShape) -> None:
    """Query heads are divided; heads of keys and values are too, or each is repeated equally often."""
    if shape.heads % value:
        raise UserError(
            f"{key} = {value} does not divide the {shape.heads} query heads; choose a divisor of {shape.heads}"
        )
    if shape.kv_heads % value and value % shape.kv_heads:
        raise UserError(
            f"{key} = {value} neither divides the {shape.kv_heads} heads of keys and values nor is a multiple of them; "
            f"choose a divisor of {shape.kv_heads}"
        )


def training_arithmetic(config: TrainConfig) -> Arithmetic:
    """In what precision the engine trains."""
    if config.model.precision == "fp32":
        return "fp32"
    return "bf16" if config.runtime.engine == "verl" else "autocast"


def share_with_gradients(config: TrainConfig) -> float:
    """The fraction of a micro-batch's tokens that ``training.backward = "forks_only"`` runs with gradients."""
    if config.training.backward == "dense":
        return 1.0
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    prompt = config.rollout.max_prompt_tokens / longest if config.forks_only.prompt else 0.0
    chosen = selected_share(config)
    return min(1.0, chosen + (1 - chosen) * config.forks_only.sampled + prompt)


def selected_share(config: TrainConfig) -> float:
    """rho, or all: how many a threshold selects is not known beforehand."""
    return 1.0 if config.selection.rule in ("all", "threshold") else config.selection.ratio
