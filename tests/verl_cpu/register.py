"""Imported by verl in every process: ``VERL_USE_EXTERNAL_MODULES=tests.verl_cpu.register``.

``VERL_PLATFORM=cpu`` and ``VERL_ENGINE_DEVICE=cuda`` select the platform. verl imports it at the end of
``import verl``, before ForkRL's plug-in, whose modules ask for the platform while they load; so this loads little.
"""

from __future__ import annotations

from verl.workers.rollout import base, replica

from tests.verl_cpu.platform import patch_process_group, register_platform

ROLLOUT_NAME = "forkrl_cpu"
"""``actor_rollout_ref.rollout.name`` of the sampler in ``rollout.py``."""


def _load_replica() -> type:
    from tests.verl_cpu.rollout import CpuReplica

    return CpuReplica


register_platform()
patch_process_group()
replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)
base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "tests.verl_cpu.rollout.CpuServerAdapter"
