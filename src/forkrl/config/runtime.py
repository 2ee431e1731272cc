"""What a run computes on: this machine, or a cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forkrl.config.sections import FROM_LIST, Count, Fraction, PositiveInt, Section


class RuntimeConfig(Section):
    device: str = "auto"
    """"auto" takes an accelerator where there is one; else "cpu", "cuda:0", "mps"."""
    threads: Count = 0
    """CPU threads in all; 0 takes OMP_NUM_THREADS where it is set, else one per core (docs/threads.md)."""
    trainer: Literal["local", "verl"] = "local"
    """"local" trains in this process. "verl" spreads the same recipe over a Ray cluster (docs/cluster.md); so does
    --trainer verl."""
    workers: Count = 0
    """Processes on the CPU that share the weights, the work and the threads; 0: one a thread for a small model (up to
    50M parameters), which several threads at once would only slow down, else one. An accelerator takes one."""


class ClusterConfig(Section):
    """How `--trainer verl` spreads a run over GPUs and nodes (docs/cluster.md)."""

    address: str = ""
    """A running Ray cluster, "10.0.0.1:6379" or "auto". Empty: Ray is started on this machine for the run."""
    nodes: PositiveInt = 1
    """Machines that train."""
    gpus_per_node: PositiveInt = 1
    """GPUs of each."""
    trainer: Literal["sync", "colocate_async"] = "sync"
    """"sync" samples with the weights it then trains. "colocate_async" samples the next step meanwhile, with older
    weights."""
    rollout_engine: Literal["vllm", "sglang"] = "vllm"
    """What samples on GPUs."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one copy of the model while sampling."""
    sequence_parallel: PositiveInt = 1
    """GPUs that share each sequence while training (Ulysses)."""
    gpu_memory: Fraction = 0.6
    """Share of a GPU's memory that the sampling engine may take."""
    offload: bool = False
    """Keep weights and optimizer state in the host's memory while the GPU does something else."""
    reward_workers: PositiveInt = 1
    """Ray actors that judge, spread over the nodes, each with reward.workers verifier processes."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """The run ends if no response is sampled or judged for this many seconds: something hangs."""
    overrides: Annotated[tuple[str, ...], FROM_LIST] = ()
    """Further settings of verl, as its command line takes them: "actor_rollout_ref.rollout.max_num_seqs=512". A key
    that ForkRL sets itself is refused."""
