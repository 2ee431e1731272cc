"""How a micro-batch runs: ``Dense`` or ``ForksOnly``. Axes: ``B`` sequences, ``T`` token positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from forkrl.method.batches import MicroBatch
from forkrl.method.loss import policy_loss_only
from forkrl.method.selection import Choice
from forkrl.model.forward import compute_token_stats
from forkrl.parallel.workers import Worker
from forkrl.training.forks_only import Prefill, compute_selected_stats, prefill, prefill_stats
from forkrl.types import TokenStats

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import ForksOnlyConfig, TrainConfig


class Forward(Protocol):
    """A way to run micro-batches; results are fp32 ``[B, T]``, 0 outside the response."""

    def measure(self, worker: Worker, micro: MicroBatch, *, keep: bool) -> TokenStats:
        """Statistics of all response tokens, detached. ``keep``: ``stats`` of this micro-batch may reuse the pass."""
        ...

    def stats(self, worker: Worker, micro: MicroBatch, at_BT: Tensor) -> TokenStats:
        """Statistics with gradients, at least at ``at_BT`` and where the loss has a term."""
        ...

    def stats_and_choice(
        self, worker: Worker, micro: MicroBatch, choose: Callable[[TokenStats], Choice]
    ) -> tuple[TokenStats, Tensor, Choice]:
        """The same where ``choose`` takes tokens of this micro-batch; also the entropies it read and its choice."""
        ...


def make_forward(config: TrainConfig) -> Forward:
    return ForksOnly(config) if config.training.backward == "forks_only" else Dense(config)


@dataclass(frozen=True)
class Dense:
    """Exact: every position runs with gradients; the head runs where the loss reads it."""

    config: TrainConfig

    def measure(self, worker: Worker, micro: MicroBatch, *, keep: bool) -> TokenStats:
        # One graph at a time: the gradient pass needs the memory of one anyway.
        kept = keep and not worker.kept
        with torch.set_grad_enabled(kept):
            stats = self._stats(worker, micro)
        if kept:
            worker.kept[micro.number] = stats
        return _detached(stats)

    def stats(self, worker: Worker, micro: MicroBatch, at_BT: Tensor) -> TokenStats:
        kept: TokenStats | None = worker.kept.pop(micro.number, None)
        if kept is not None:
            return kept
        return self._stats(worker, micro, at_BT if policy_loss_only(self.config.loss) else None)

    def stats_and_choice(
        self, worker: Worker, micro: MicroBatch, choose: Callable[[TokenStats], Choice]
    ) -> tuple[TokenStats, Tensor, Choice]:
        stats = self._stats(worker, micro)
        read = _detached(stats)
        return stats, read.entropy, choose(read)

    def _stats(self, worker: Worker, micro: MicroBatch, at_BT: Tensor | None = None) -> TokenStats:
        return compute_token_stats(
            worker.policy,
            micro.batch,
            temperature=self.config.rollout.temperature,
            entropy_grad=self.config.loss.entropy_coef != 0,
            at_BT=at_BT,
        )


@dataclass(frozen=True)
class ForksOnly:
    """Approximate (docs/forks-only.md): selected positions run with gradients after a prefill."""

    config: TrainConfig

    def measure(self, worker: Worker, micro: MicroBatch, *, keep: bool) -> TokenStats:
        cache = self._prefill(worker, micro)
        num_bytes = sum(each.num_bytes for each in [cache, *worker.kept.values()])
        # With projections the cache includes its autograd graph, many times the size of keys and values.
        if keep and not self.config.forks_only.projections and num_bytes <= self.config.forks_only.kept_mib * 2**20:
            worker.kept[micro.number] = cache._replace(hidden_ND=None)
        return self._measured(worker, micro, cache)

    def stats(self, worker: Worker, micro: MicroBatch, at_BT: Tensor) -> TokenStats:
        return self._stats(worker, micro, at_BT, worker.kept.pop(micro.number, None))

    def stats_and_choice(
        self, worker: Worker, micro: MicroBatch, choose: Callable[[TokenStats], Choice]
    ) -> tuple[TokenStats, Tensor, Choice]:
        cache = self._prefill(worker, micro)
        read = self._measured(worker, micro, cache)
        choice = choose(read)
        return self._stats(worker, micro, choice.selected_BT, cache), read.entropy, choice

    def _prefill(self, worker: Worker, micro: MicroBatch) -> Prefill:
        return prefill(worker.policy, micro.batch, to_the_end=True, projections=self.config.forks_only.projections)

    def _measured(self, worker: Worker, micro: MicroBatch, cache: Prefill) -> TokenStats:
        return prefill_stats(worker.policy, micro.batch, cache, temperature=self.config.rollout.temperature)

    def _stats(self, worker: Worker, micro: MicroBatch, at_BT: Tensor, cache: Prefill | None) -> TokenStats:
        return compute_selected_stats(
            worker.policy,
            micro.batch,
            at_BT,
            temperature=self.config.rollout.temperature,
            weight_BT=running_weights(micro, at_BT, self.config.forks_only),
            projections=self.config.forks_only.projections,
            cache=cache,
        )


def running_weights(micro: MicroBatch, selected_BT: Tensor, settings: ForksOnlyConfig) -> Tensor | None:
    """Weight ``[B, T]`` of each position that runs with gradients; None: only the selected ones."""
    if not settings.prompt and micro.sampled_BT is None:
        return None
    weight_BT = torch.zeros_like(micro.batch.old_logprobs)
    if micro.sampled_BT is not None:
        weight_BT[micro.sampled_BT] = 1 / settings.sampled
    if settings.prompt:
        weight_BT[micro.batch.attention_mask & ~micro.batch.response_mask] = 1.0
    return weight_BT.masked_fill_(selected_BT, 1.0)


def _detached(stats: TokenStats) -> TokenStats:
    return TokenStats(stats.logprobs.detach(), stats.entropy.detach())
