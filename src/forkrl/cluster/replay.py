"""verl's replay buffers with limits: verl would draw prompts forever if no group has a gradient or sampling fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from forkrl.errors import NothingToLearn, TrainingHalted


class PromptsSpent(Exception):
    """A step has drawn its maximum number of prompts."""


class _Bounded(ReplayBuffer):  # type: ignore[misc]  # verl ships no types
    """Reports each group before it is deleted, and raises where verl would wait or draw forever."""

    on_drop: Callable[[Sequence[str]], None]
    """Called with the keys of trajectories that will not be trained on."""
    on_validation: Callable[[KVBatchMeta], None]
    """Called with a validation batch, before verl modifies it."""
    stall_timeout_s: float
    """Longest time without a sampled or scored response."""
    _progress: tuple[int, ...] = ()
    _since: float = 0.0
    _failed: int = 0
    _max_failed: int = 0

    @classmethod
    def replacing(cls, buffer: ReplayBuffer, **attributes: Any) -> Any:
        """A buffer of this class in place of verl's new and empty one."""
        own = cls.__new__(cls)
        for name, value in {**vars(buffer), **attributes}.items():
            setattr(own, name, value)
        return own

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        # The timeout starts here: the preceding update may have taken long.
        self._progress, self._failed, self._max_failed = (), 0, 2 * batch_size
        try:
            batch, metrics = super().sample(global_steps, partition_id, batch_size)
        except PromptsSpent as spent:
            num_ready = self._num_ready(global_steps, partition_id)
            if not num_ready:
                failed = f"; {self._failed} of the prompts could not be sampled or judged (see the log)"
                raise NothingToLearn(f"{spent}{failed if self._failed else ''}") from None
            batch, metrics = super().sample(global_steps, partition_id, min(num_ready, batch_size))
        if partition_id == "val":
            self.on_validation(batch)
        return batch, metrics

    def _num_ready(self, global_steps: int, partition_id: str) -> int:
        """The number of groups to train on after the last prompts were drawn."""
        return 0

    def _terminal_eviction_reasons(self, global_steps: int, partition_id: str) -> Any:
        """Like verl's, but in every trainer a group that lost a response has failed: its baseline is incomplete."""
        stale, same, failed, counts = super()._terminal_eviction_reasons(global_steps, partition_id)
        if partition_id == "train":
            failed = set(self.failure_keys[partition_id])
        return stale, same, failed, counts

    def _evict_terminal_groups(self, global_steps: int, partition_id: str, reasons: Any) -> Any:
        """Raises RuntimeError if too many groups of a step have failed."""
        self._failed += len(reasons[2])
        if self._failed > self._max_failed:
            raise RuntimeError(
                f"{self._failed} prompts of one step could not be sampled or judged; the log has the errors"
            )
        return super()._evict_terminal_groups(global_steps, partition_id, reasons)

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        if partition_id == "train" and uids:
            self.on_drop([key for key in self.partitions[partition_id] if key.split("_")[0] in uids])
        super()._clear_groups(partition_id, uids)

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        """Wait like verl; raises TrainingHalted if nothing changes for ``stall_timeout_s``."""
        keys = (self.pending_keys, self.running_keys, self.finished_keys, self.failure_keys, self.partitions)
        progress, now = tuple(len(each[partition_id]) for each in keys), time.monotonic()
        if progress != self._progress:
            self._progress, self._since = progress, now
        elif now - self._since > self.stall_timeout_s:
            raise TrainingHalted(
                f"no response has been sampled or judged for {self.stall_timeout_s:g} s, and "
                f"{progress[0] + progress[1]} prompts wait; a sampler or a reward worker hangs "
                f"(cluster.stall_timeout_s sets how long to wait)"
            )
        return float(super()._wait_for_next_poll(partition_id, last_debug_time))


class BoundedReplayBuffer(_Bounded):
    """For the synchronous trainer: after its last prompts, a step uses the groups it has."""

    def _num_ready(self, global_steps: int, partition_id: str) -> int:
        """Wait for all drawn prompts, and drop the groups that cannot be trained on."""
        last_debug_time = 0.0
        while True:
            self._sync_metadata_from_transfer_queue()
            reasons = self._terminal_eviction_reasons(global_steps, partition_id)
            self._evict_terminal_groups(global_steps, partition_id, reasons)
            if not self.pending_keys[partition_id] and not self.running_keys[partition_id]:
                return len(self._sampleable_terminal_keys(partition_id, reasons))
            last_debug_time = self._wait_for_next_poll(partition_id, last_debug_time)


class BoundedReplayBufferAsync(_Bounded, ReplayBufferAsync):  # type: ignore[misc]
    """For asynchronous trainers, which always have groups in flight: after the last prompts the run ends."""
