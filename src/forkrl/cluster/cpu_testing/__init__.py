"""A testing aid: verl 0.9.1 without a GPU, so that the cluster engine can be tested on any machine. Not for training.

``VERL_PLATFORM=cpu`` and ``VERL_ENGINE_DEVICE=cuda`` switch it on: verl then runs its own trainer, Ray, FSDP2 on gloo
and weight synchronisation, with ``platform.py`` in place of an accelerator and ``rollout.py`` in place of vLLM. Ray
hands out "GPUs" that are only numbers: give ``ray.init`` as many as there are ranks.
"""

from __future__ import annotations

ROLLOUT_NAME = "forkrl_cpu"
"""``actor_rollout_ref.rollout.name`` of the sampler in ``rollout.py``."""


def install() -> None:
    """Register the platform and the sampler with verl. Called while verl is being imported, so it loads little."""
    from verl.workers.rollout import base, replica

    from forkrl.cluster.cpu_testing.platform import patch_process_group, register_platform

    register_platform()
    patch_process_group()
    replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)
    base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "forkrl.cluster.cpu_testing.rollout.CpuServerAdapter"


def _load_replica() -> type:
    from forkrl.cluster.cpu_testing.rollout import CpuReplica

    return CpuReplica
