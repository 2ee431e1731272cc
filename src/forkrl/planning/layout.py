"""How a recipe spreads over GPUs, and the divisions that must come out even."""

from __future__ import annotations

from typing import NamedTuple

from forkrl.config import TrainConfig
from forkrl.errors import UserError
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
        UserError: one of its sizes does not divide another.
    """
    if config.runtime.engine == "local":
        return Layout(1, 1, 1, 1, sharded=False)
    cluster = config.cluster
    layout = Layout(
        cluster.nodes, cluster.gpus_per_node, cluster.tensor_parallel, cluster.sequence_parallel, sharded=True
    )
    gpus = f"cluster.nodes x cluster.gpus_per_node = {layout.gpus}"
    _divide("cluster.tensor_parallel", layout.tensor_parallel, gpus, layout.gpus)
    _divide("cluster.tensor_parallel", layout.tensor_parallel, f"the {shape.heads} query heads", shape.heads)
    _divide("cluster.sequence_parallel", layout.sequence_parallel, gpus, layout.gpus)
    _divide("cluster.sequence_parallel", layout.sequence_parallel, f"the {shape.heads} query heads", shape.heads)
    if max(layout.tensor_parallel, layout.gpus_per_node) % min(layout.tensor_parallel, layout.gpus_per_node):
        raise UserError(
            f"cluster.tensor_parallel = {layout.tensor_parallel} does not fit nodes of cluster.gpus_per_node = "
            f"{layout.gpus_per_node}; take a divisor or a multiple of it"
        )
    _align("cluster.tensor_parallel", layout.tensor_parallel, shape)
    _align("cluster.sequence_parallel", layout.sequence_parallel, shape)
    _divide(
        "cluster.sequence_parallel", layout.sequence_parallel, "training.micro_batch_tokens",
        config.training.micro_batch_tokens,
    )  # fmt: skip
    sequences = config.training.mini_batch_prompts * config.rollout.group_size
    ranks = layout.gpus // layout.sequence_parallel
    if sequences % ranks:
        raise UserError(
            f"training.mini_batch_prompts x rollout.group_size = {sequences} sequences cannot be dealt evenly to "
            f"{ranks} ranks (cluster.nodes x cluster.gpus_per_node / cluster.sequence_parallel); change one of them"
        )
    if layout.sequence_parallel > 1 and config.model.precision != "bf16":
        raise UserError(
            f'cluster.sequence_parallel = {layout.sequence_parallel} needs model.precision = "bf16": FlashAttention '
            f"runs in 16 bits only"
        )
    return layout


def _divide(key: str, value: int, what: str, whole: int) -> None:
    if whole % value:
        raise UserError(f"{key} = {value} does not divide {what}; choose a divisor of {whole}")


def _align(key: str, value: int, shape: ModelShape) -> None:
    """Heads of keys and values are divided, or each is repeated equally often."""
    if shape.kv_heads % value and value % shape.kv_heads:
        raise UserError(f"{key} = {value} neither divides the {shape.kv_heads} heads of keys and values nor is a "
                        f"multiple of them; choose a divisor of {shape.kv_heads}")  # fmt: skip


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
