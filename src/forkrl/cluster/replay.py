"""verl's replay buffers with a limit on drawing prompts, a timeout, and a report of dropped groups.

verl draws new prompts as long as groups are all right or all wrong, and its asynchronous trainers also where sampling
or judging fails: forever, if all do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from forkrl.errors import NothingToLearn, TrainingHalted


class PromptsSpent(Exception):
    """A step has drawn as many prompts as it may."""


class _Accounting:
    """Mixed into a replay buffer: reports each group before it is deleted."""

    on_drop: Callable[[Sequence[str]], None]
    """Called with the keys of trajectories that will not be trained on."""
    on_validation: Callable[[KVBatchMeta], None]
    """Called with a batch of validation, before verl modifies it."""
    stall_timeout_s: float
    """How long nothing may be sampled or judged."""
    _seen: tuple[int, ...] = ()
    _since: float = 0.0
    _failed: int = 0
    _most_failed: int = 0

    @classmethod
    def taking_over(cls, buffer: ReplayBuffer, **attributes: Any) -> Any:
        """A buffer of this class in place of verl's own new and empty one."""
        own = cls.__new__(cls)
        vars(own).update(vars(buffer))
        vars(own).update(attributes)
        return own

    def _begin(self, batch_size: int) -> None:
        """A step's or evaluation's timeout starts here: the update before it may have taken long."""
        self._seen, self._failed, self._most_failed = (), 0, 2 * batch_size

    def _terminal_eviction_reasons(self, global_steps: int, partition_id: str) -> Any:
        """As verl's, but every group that lost a response has failed, since its baseline is incomplete.

        verl keeps such a group in its synchronous trainer, and drops it in the asynchronous ones.
        """
        stale, same, failed, counts = super()._terminal_eviction_reasons(global_steps, partition_id)  # type: ignore[misc]
        if partition_id == "train":
            failed = set(self.failure_keys[partition_id])  # type: ignore[attr-defined]
        return stale, same, failed, counts

    def _evict_terminal_groups(self, global_steps: int, partition_id: str, reasons: Any) -> Any:
        """Raises RuntimeError where too many groups of a step have failed."""
        self._failed += len(reasons[2])
        if self._failed > self._most_failed:
            raise RuntimeError(
                f"{self._failed} prompts of one step could not be sampled or judged; the log has the errors"
            )
        return super()._evict_terminal_groups(global_steps, partition_id, reasons)  # type: ignore[misc]

    def _said_of_failures(self) -> str:
        return f"; {self._failed} of the prompts could not be sampled or judged (see the log)" if self._failed else ""

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        if partition_id == "train" and uids:
            self.on_drop([key for key in self.partitions[partition_id] if key.split("_")[0] in uids])  # type: ignore[attr-defined]
        super()._clear_groups(partition_id, uids)  # type: ignore[misc]

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        """Wait as verl does; raises TrainingHalted where nothing has changed for longer than ``stall_timeout_s``."""
        own: Any = self
        keys = (own.pending_keys, own.running_keys, own.finished_keys, own.failure_keys, own.partitions)
        seen = tuple(len(each[partition_id]) for each in keys)
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._since = seen, now
        elif now - self._since > self.stall_timeout_s:
            raise TrainingHalted(
                f"no response has been sampled or judged for {self.stall_timeout_s:g} s, and {seen[0] + seen[1]} "
                f"prompts wait; a sampler or a reward worker hangs (cluster.stall_timeout_s sets how long to wait)"
            )
        return float(super()._wait_for_next_poll(partition_id, last_debug_time))  # type: ignore[misc]


class BoundedReplayBuffer(_Accounting, ReplayBuffer):  # type: ignore[misc]
    """For the synchronous trainer: after its last prompts, a step takes the groups that it has."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """A batch of ``batch_size`` groups, or of fewer where the step may draw no more prompts."""
        self._begin(batch_size)
        try:
            batch, metrics = super().sample(global_steps, partition_id, batch_size)
        except PromptsSpent as spent:
            num_ready = self._wait_for_groups(global_steps, partition_id)
            if not num_ready:
                raise NothingToLearn(f"{spent}{self._said_of_failures()}") from None
            batch, metrics = super().sample(global_steps, partition_id, min(num_ready, batch_size))
        if partition_id == "val":
            self.on_validation(batch)
        return batch, metrics

    def _wait_for_groups(self, global_steps: int, partition_id: str) -> int:
        """Wait for all drawn prompts; the number of groups that can be trained on. The others are dropped."""
        last_debug_time = 0.0
        while True:
            self._sync_metadata_from_transfer_queue()
            reasons = self._terminal_eviction_reasons(global_steps, partition_id)
            self._evict_terminal_groups(global_steps, partition_id, reasons)
            if not self.pending_keys[partition_id] and not self.running_keys[partition_id]:
                return len(self._sampleable_terminal_keys(partition_id, reasons))
            last_debug_time = self._wait_for_next_poll(partition_id, last_debug_time)


class AccountingReplayBufferAsync(_Accounting, ReplayBufferAsync):  # type: ignore[misc]
    """For asynchronous trainers, which always have a step's groups in flight: after the last prompts the run ends."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """A batch of ``batch_size`` groups."""
        self._begin(batch_size)
        try:
            batch, metrics = super().sample(global_steps, partition_id, batch_size)
        except PromptsSpent as spent:
            raise NothingToLearn(f"{spent}{self._said_of_failures()}") from None
        if partition_id == "val":
            self.on_validation(batch)
        return batch, metrics
