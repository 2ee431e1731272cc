"""``[cluster]``: how ``--trainer verl`` spreads a run."""

from __future__ import annotations

from typing import Annotated, Literal

from forkrl.config.sections import FROM_LIST, Fraction, Positive, PositiveInt, Section


class ClusterConfig(Section):
    """How `--trainer verl` spreads a run over GPUs and nodes (docs/cluster.md)."""

    address: str = ""
    """Address of a running Ray cluster, "10.0.0.1:6379" or "auto". Empty: start Ray on this machine for the run."""
    nodes: PositiveInt = 1
    """Number of machines."""
    gpus_per_node: PositiveInt = 1
    """GPUs per machine."""
    trainer: Literal["sync", "colocate_async"] = "sync"
    """"sync" samples with the weights that it then trains. "colocate_async" samples the next step while it trains, with
    older weights."""
    rollout_engine: Literal["vllm", "sglang"] = "vllm"
    """Inference engine on GPUs."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one copy of the model while sampling."""
    sequence_parallel: PositiveInt = 1
    """GPUs that share each sequence while training (Ulysses)."""
    gpu_memory: Fraction = 0.6
    """Fraction of a GPU's memory for the inference engine."""
    offload: bool = False
    """Keep weights and optimizer state in host memory while the GPU does not need them."""
    reward_workers: PositiveInt = 1
    """Ray actors that score responses, spread over the nodes, each with reward.workers verifier processes."""
    stall_timeout_s: Positive = 3600.0
    """End the run if no response is sampled or scored for this many seconds."""
    overrides: Annotated[tuple[str, ...], FROM_LIST] = ()
    """Additional settings in the syntax of verl's command line: "actor_rollout_ref.rollout.max_num_seqs=512". Keys that
    ForkRL sets itself are rejected."""
