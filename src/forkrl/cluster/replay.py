"""verl's replay buffers, with what they leave out: an end to drawing prompts, and an account of what was dropped.

verl draws further prompts as long as groups are all right or all wrong; with a model that can do nothing, or
everything, that is for ever. So it does, asynchronously, where sampling or judging always fails.
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
    """Mixed into a replay buffer: whoever listens hears of each group before it is forgotten.

    Attributes:
        on_drop: called with the keys of trajectories that will not be trained on.
        on_validation: called with a batch of validation, before verl takes it apart.
        patience_s: how long it may be that nothing is sampled or judged.
    """

    on_drop: Callable[[Sequence[str]], None]
    on_validation: Callable[[KVBatchMeta], None]
    patience_s: float
    _seen: tuple[int, ...] = ()
    _since: float = 0.0
    _failed: int = 0
    _most_failed: int = 0

    @classmethod
    def taking_over(cls, buffer: ReplayBuffer, **attributes: Any) -> Any:
        """A buffer of this class that stands where verl's own, just made and still empty, would."""
        own = cls.__new__(cls)
        vars(own).update(vars(buffer))
        vars(own).update(attributes)
        return own

    def _begin(self, batch_size: int) -> None:
        """A step, or an evaluation, waits on its own account: the update before it may have taken long."""
        self._seen, self._failed, self._most_failed = (), 0, 2 * batch_size

    def _terminal_eviction_reasons(self, global_steps: int, partition_id: str) -> Any:
        """As verl's, with every group that lost a response among the failed ones: what is left of it has no baseline.

        verl keeps such a group where it trains in step, and drops it where it samples ahead.
        """
        stale, same, failed, counts = super()._terminal_eviction_reasons(global_steps, partition_id)  # type: ignore[misc]
        if partition_id == "train":
            failed = set(self.failure_keys[partition_id])  # type: ignore[attr-defined]
        return stale, same, failed, counts

    def _evict_terminal_groups(self, global_steps: int, partition_id: str, reasons: Any) -> Any:
        """Raises RuntimeError where so many groups of a step have failed that no further one will do better."""
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
        """Wait as verl does, but not for ever: a sampler or a reward worker that hangs would never be noticed.

        Raises:
            TrainingHalted: nothing has changed for longer than ``patience_s``.
        """
        waiting: Any = self
        seen = (
            len(waiting.pending_keys[partition_id]),
            len(waiting.running_keys[partition_id]),
            len(waiting.finished_keys[partition_id]),
            len(waiting.failure_keys[partition_id]),
            len(waiting.partitions[partition_id]),
        )
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._since = seen, now
        elif now - self._since > self.patience_s:
            raise TrainingHalted(
                f"no response has been sampled or judged for {self.patience_s:g} s, and {seen[0] + seen[1]} prompts "
                f"wait; a sampler or a reward worker hangs (cluster.patience_s sets how long to wait)"
            )
        return float(super()._wait_for_next_poll(partition_id, last_debug_time))  # type: ignore[misc]


class BoundedReplayBuffer(_Accounting, ReplayBuffer):  # type: ignore[misc]
    """Of a synchronous trainer: once its prompts are spent, a step takes the groups at hand."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """A batch of ``batch_size`` groups, or of fewer where the step may draw no more prompts.

        Raises:
            NothingToLearn: it may draw no more, and not one group can teach anything.
        """
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
        """How many groups can be trained on when all that was drawn has ended; the others are dropped."""
        last_debug_time = 0.0
        while True:
            self._sync_metadata_from_transfer_queue()
            reasons = self._terminal_eviction_reasons(global_steps, partition_id)
            self._evict_terminal_groups(global_steps, partition_id, reasons)
            if not self.pending_keys[partition_id] and not self.running_keys[partition_id]:
                return len(self._sampleable_terminal_keys(partition_id, reasons))
            last_debug_time = self._wait_for_next_poll(partition_id, last_debug_time)


class AccountingReplayBufferAsync(_Accounting, ReplayBufferAsync):  # type: ignore[misc]
    """Of an asynchronous trainer, which always has a step's groups in flight: spent prompts end the run."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """A batch of ``batch_size`` groups.

        Raises:
            NothingToLearn: the step may draw no more prompts, and has too few groups that can teach something.
        """
        self._begin(batch_size)
        try:
            batch, metrics = super().sample(global_steps, partition_id, batch_size)
        except PromptsSpent as spent:
            raise NothingToLearn(f"{spent}{self._said_of_failures()}") from None
        if partition_id == "val":
            self.on_validation(batch)
        return batch, metrics
