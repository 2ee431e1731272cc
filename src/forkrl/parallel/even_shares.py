"""Recipe sizes that the GPUs of a cluster must divide evenly; planning and launching check them."""

from __future__ import annotations

from forkrl.config import TrainConfig
from forkrl.errors import UserError


def require_even_shares(config: TrainConfig) -> None:
    cluster = config.cluster
    gpus = cluster.nodes * cluster.gpus_per_node
    for key in ("tensor_parallel", "sequence_parallel"):
        if gpus % getattr(cluster, key):
            raise UserError(
                f"cluster.{key} = {getattr(cluster, key)} does not divide the {gpus} GPUs of cluster.nodes x "
                f"gpus_per_node; take a divisor"
            )
    if max(cluster.tensor_parallel, cluster.gpus_per_node) % min(cluster.tensor_parallel, cluster.gpus_per_node):
        raise UserError(
            f"cluster.tensor_parallel = {cluster.tensor_parallel} does not fit nodes of cluster.gpus_per_node = "
            f"{cluster.gpus_per_node}; take a divisor or a multiple of it"
        )
    ranks = gpus // cluster.sequence_parallel
    responses = config.training.mini_batch_prompts * config.rollout.group_size
    if responses % ranks:
        raise UserError(
            f"training.mini_batch_prompts x rollout.group_size = {responses} responses of a gradient step cannot be "
            f"split evenly over {ranks} ranks (cluster.nodes x gpus_per_node / sequence_parallel); change one of them"
        )
    if config.training.micro_batch_tokens % cluster.sequence_parallel:
        raise UserError(
            f"training.micro_batch_tokens = {config.training.micro_batch_tokens} cannot be split evenly over "
            f"cluster.sequence_parallel = {cluster.sequence_parallel} GPUs; take a multiple"
        )
    if cluster.sequence_parallel > 1 and config.model.precision != "bf16":
        raise UserError(
            f"cluster.sequence_parallel = {cluster.sequence_parallel} needs sequences without padding, which "
            f'FlashAttention runs in 16 bits only; set model.precision = "bf16", or sequence_parallel to 1'
        )
