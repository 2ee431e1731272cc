"""verl's rollout server without a GPU, sampling with ForkRL's own embedded sampler.

It speaks the protocol of verl's vLLM server: token ids in, token ids and log-probs out, weights replaced between steps,
requests broken off with what they have so far. It is meant to be exact and to complain, not to be fast.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import ray
import torch
from torch import Tensor
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica

from tests.verl_cpu.register import ROLLOUT_NAME
from tests.verl_cpu.server import CpuServer


class CpuReplica(RolloutReplica):  # type: ignore[misc]  # verl ships no types
    """One server, a Ray actor, for the ranks of one replica."""

    async def launch_servers(self) -> None:
        name = f"{_server_name(self.replica_rank)}{self.name_suffix}"
        server = (
            ray.remote(num_cpus=0)(CpuServer)
            .options(name=name, max_concurrency=self.max_concurrency)
            .remote(
                self.model_config.path,
                seed=self.config.seed,
                replica_rank=self.replica_rank,
                response_length=self.config.response_length,
            )
        )
        await server.set_global_steps.remote(0)  # returns once the model is loaded, or raises why it is not
        self.servers = [server]
        self._server_handle, self._server_address = server, name


class CpuServerAdapter(BaseRollout):  # type: ignore[misc]  # verl ships no types
    """What a trainer rank holds of the server: hands it the weights, wakes it and puts it to sleep."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        rank = int(os.environ["RANK"])
        ranks = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        self._leads = rank % ranks == 0
        self._name = _server_name(rank // ranks if replica_rank == -1 else replica_rank)

    async def resume(self, tags: list[str]) -> None:
        if self._leads:
            await self._server().wake_up.remote(tags=tags)

    async def release(self) -> None:
        if self._leads:
            await self._server().sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Iterator[tuple[str, Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **ignored: Any,  # of adapters (LoRA), which the ranks merge
    ) -> None:
        if wire_format != "named_tensors":
            raise ValueError(f"{ROLLOUT_NAME} takes weights as named tensors, not as {wire_format}")
        # Every rank runs through them, since gathering a sharded one takes them all. Copies: the next may reuse the
        # memory of the last.
        named = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in weights}
        if self._leads:
            await self._server().load_weights.remote(named)
            if global_steps is not None:
                await self._server().set_global_steps.remote(global_steps)

    def _server(self) -> Any:
        return ray.get_actor(self._name)  # by name: the server is launched after the ranks


def _server_name(replica_rank: int) -> str:
    return f"{ROLLOUT_NAME}_server_{replica_rank}"
