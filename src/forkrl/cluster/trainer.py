"""verl's trainers with forking tokens (``trainer.v1.trainer_mode``): rollout-batch selection, metrics, run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_from_nested

# As modules: either may be importing verl, and thus this module, and then has no names yet.
from forkrl.cluster import replay, worker
from forkrl.cluster.groups import complete_groups, in_file_order, read_groups
from forkrl.cluster.options import read_options, refuse_unsupported
from forkrl.cluster.record import Record, StopRequested, note_end, step_metrics
from forkrl.config.train import check_schedule
from forkrl.errors import NothingToLearn, UserError
from forkrl.method.correction import weight_metrics
from forkrl.methods import objective_of, reads_current_policy
from forkrl.rollout.held_out import summarise
from forkrl.rollout.logprob_gap import LogprobGap
from forkrl.training.rollout_rows import rollout_rows
from forkrl.types import RolloutGroup


class ForkTrainer(PPOTrainer):  # type: ignore[misc]  # verl ships no types
    """Common to the three; mixed in before one of verl's trainers."""

    base_mode: ClassVar[str]

    def __init__(self, config: DictConfig) -> None:
        self.options = read_options(config)
        self.global_steps = 0
        try:
            refuse_unsupported(config, self.options)
            self._adopt(config)
            self.record: Record | None = None
            if folder := self.options.run_folder:
                every, sampled = self.options.rollouts_every, self.options.rollouts_sampled
                self.record = Record(Path(folder), every=every, sampled=sampled)
            super().__init__(config)
        except Exception as error:
            note_end(self.options.run_folder, error, 0)
            raise
        self._saved_step: int | None = None
        self._drawn = 0
        self._dropped: list[RolloutGroup] = []
        self._validated: list[RolloutGroup] = []
        self._details: dict[str, dict[str, Any]] = {}

    def _require_decay(self) -> None:
        """Raises UserError for a warm-up that leaves no gradient step for the decay, as a recipe does."""
        try:
            check_schedule(self.options, self._progress().gradient_steps)
        except ValueError as error:
            message = str(error).replace("optimizer.", "+forkrl.")
            raise UserError(message.replace("training.steps", "trainer.total_training_steps")) from None

    def _adopt(self, config: DictConfig) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.base_mode  # verl compares it with its own names
            config.trainer.v1.sampler.sync_refill_failed_groups = True  # see replay.py
            config.actor_rollout_ref.forkrl = self.options.model_dump(mode="json")  # all that a worker sees
            # Makes the update compute the entropies that a micro-batch or the objective reads.
            reads_current = reads_current_policy(self.options, self.options.weights)
            in_micro_batch = reads_current and self.options.scope in ("micro_batch", "sequence")
            if in_micro_batch or objective_of(self.options.objective).entropy:
                config.actor_rollout_ref.actor.calculate_entropy = True

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.options.stops(self.tokenizer)

    def fit(self, agent_loop_manager: Any) -> None:
        """Train like verl; save the finished steps if nothing is left to learn or a stop was requested."""
        try:
            self._require_decay()
            super().fit(agent_loop_manager)
        except (NothingToLearn, StopRequested) as error:
            note_end(self.options.run_folder, error, self.global_steps)
            self._save_finished()
            self._shutdown_dump_executor()
            if not isinstance(error, StopRequested):
                raise
        except Exception as error:
            note_end(self.options.run_folder, error, self.global_steps)
            raise

    def _save_finished(self) -> None:
        """Save the state before the current step, which has not changed the weights."""
        self.global_steps -= 1
        if self.global_steps > 0 and self._saved_step != self.global_steps and self.config.trainer.save_freq > 0:
            self.checkpoint_manager.sleep_replicas()  # a save needs the samplers' memory
            self._save_checkpoint()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        """One verl step; its metrics are recorded under ForkRL's names before a checkpoint refers to them."""
        if self.record is not None:
            self.record.begin_step()
        started = time.perf_counter()
        self._drawn, self._dropped, self._details = 0, [], {}
        batch = super().step(metrics, timing_raw)
        seconds = time.perf_counter() - started
        keys = [key for key in batch.keys if not key.startswith("pad")]
        rewards = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["rm_scores"])["rm_scores"]
        ours = step_metrics(
            metrics,
            timing_raw,
            self._groups(keys, "train"),
            self._dropped,
            num_batches=self._drawn / self.config.data.train_batch_size,
            reward=float(rewards.values().sum()) / len(keys),
            seconds=seconds,
        )
        metrics.update(ours)
        if self.record is not None:
            self.record.add_step(self.global_steps, ours, self._rows())
        return batch

    def _save_checkpoint(self) -> None:
        if self.record is not None:
            folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
            self.record.before_checkpoint(folder, self.global_steps)
        super()._save_checkpoint()
        self._saved_step = self.global_steps

    def _build_replay_buffer(self) -> Any:
        own = replay.BoundedReplayBuffer if self.base_mode == "sync" else replay.BoundedReplayBufferAsync
        return own.replacing(
            super()._build_replay_buffer(),
            poll_interval=self.options.poll_s,
            stall_timeout_s=self.options.stall_timeout_s,
            on_drop=self._note_dropped,
            on_validation=self._note_validated,
        )

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        limit = self.options.max_generation_batches * self.config.data.train_batch_size
        left = limit - self._drawn if limit else num_prompts
        if left <= 0:
            raise replay.PromptsSpent(
                f"nothing to learn: every group of {self._drawn} prompts in {self.options.max_generation_batches} "
                f"generation batches was all right or all wrong, or too few were not; take easier or harder prompts, a "
                f"larger rollout.group_size, or raise dynamic_sampling.max_generation_batches"
            )
        return int(super()._add_prompts_to_generate(min(num_prompts, left)))

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        self._drawn += len(batch)
        return int(super()._submit_batch_to_rollout(batch))

    def _note_dropped(self, keys: Sequence[str]) -> None:
        self._dropped += self._groups(keys, "train")

    def _groups(self, keys: Sequence[str], partition_id: str, **how: Any) -> list[RolloutGroup]:
        return read_groups(keys, partition_id, self.tokenizer, self.stop_ids, **how)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            if "actor" in str(role):
                self.role_worker_mapping[role] = ray.remote(worker.ForkWorker)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        metrics |= self._mismatch(batch)
        marked = self._marked_rows(batch)
        fields = {worker.ROW: torch.tensor(marked)[:, None]} | self._group_fields(batch)
        if self.options.scope == "rollout_batch":
            fields |= self._choose_in_batch(batch, fields)
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )

    def _mismatch(self, batch: KVBatchMeta) -> dict[str, float]:
        """How far the trainer's log-probs are from the sampler's, and the weights that correct for it."""
        correction = self.config.algorithm.get("rollout_correction") or {}
        if not self.config.actor_rollout_ref.rollout.calculate_log_probs:
            return {}
        weighted = bool(correction.get("rollout_is"))
        fields = ["rollout_log_probs", "old_log_probs", *(["rollout_is_weights"] if weighted else [])]
        keys = [key for key in batch.keys if not key.startswith("pad")]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=[*fields, "response_mask"])
        mask_N = data["response_mask"].values().bool()
        sampler_N, trainer_N, *weights = (data[name].values().float()[mask_N] for name in fields)
        found = LogprobGap.of(trainer_N - sampler_N).metrics()
        if not weights:
            return found
        return found | weight_metrics(weights[0], float(str(correction["rollout_is_threshold"]).split("_")[-1]))

    def _group_fields(self, batch: KVBatchMeta) -> dict[str, torch.Tensor]:
        """Number of the prompt and reward of each sequence, ``[B, 1]``."""
        own = [key.split("_")[0] for key in batch.keys]
        numbers = {uid: number for number, uid in enumerate(dict.fromkeys(own))}
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
        rewards = [float(values.sum()) for values in data["rm_scores"]]
        return {
            worker.GROUP: torch.tensor([numbers[uid] for uid in own])[:, None],
            worker.REWARD: torch.tensor(rewards)[:, None],
        }

    def _choose_in_batch(self, batch: KVBatchMeta, fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Mask and weights over the tokens of all ranks, nested ``[B, T]``."""
        names = ["response_mask", "old_log_probs", "advantages", "entropy"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        actor = self.config.actor_rollout_ref.actor
        padded = data.select(*names).to_padded_tensor()
        padded[worker.GROUP], padded[worker.REWARD] = fields[worker.GROUP], fields[worker.REWARD]
        signals = worker.read_signals(padded, (actor.clip_ratio_low, actor.clip_ratio_high))
        seed = f"{self.options.seed}/{self.global_steps}/{self.local_trigger_step}"
        choice = worker.choose_tokens(signals, self.options, seed)
        chosen = {worker.SELECTED: worker.nested(choice.selected_BT.to(torch.int8), data)}
        if choice.weights_BT is not None:
            chosen[worker.WEIGHTS] = worker.nested(choice.weights_BT, data)
        return chosen

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch.extra_info[worker.PROGRESS] = self._progress()
        batch = super()._update_actor(batch, metrics)
        for details in self.actor_rollout_wg.take_details():
            self._details |= {batch.keys[each["row"]]: each for each in details}
        return batch

    def _progress(self) -> worker.Progress:
        """Where the current batch is in the run, for the learning rate."""
        steps, per_step = self.total_training_steps, self.parameter_sync_step
        done, batches = (self.global_steps - 1) * per_step + self.local_trigger_step, steps * per_step
        groups = self.config.data.train_batch_size / self.config.actor_rollout_ref.actor.ppo_mini_batch_size
        return worker.Progress(done / batches, 1 / batches, math.ceil(steps * groups))

    def _marked_rows(self, batch: KVBatchMeta) -> list[int]:
        """Row index of each sequence that workers report details of (the first groups by name), else -1."""
        if self.record is None or not self.record.wants_rows(self.global_steps):
            return [-1] * len(batch)
        own = [key.split("_")[0] for key in batch.keys]
        wanted = -(-self.record.sampled // self.config.actor_rollout_ref.rollout.n)
        chosen = set(sorted({uid for uid in own if not uid.startswith("pad")})[:wanted])
        return [row if uid in chosen else -1 for row, uid in enumerate(own)]

    def _rows(self) -> list[dict[str, Any]]:
        """The sampled responses with the workers' details."""
        keys = sorted(self._details)  # keeps the responses of a group adjacent
        if not keys:
            return []
        groups = self._groups(keys, "train", per_token={"logprobs": "old_log_probs"}, with_text=True)
        selected: list[list[bool]] = [self._details[key]["selected"] for key in keys]
        entropies = iter([torch.tensor(self._details[key]["entropy"]) for key in keys])
        groups = [
            replace(group, rollouts=tuple(replace(rollout, entropy=next(entropies)) for rollout in group.rollouts))
            for group in groups
        ]
        data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["rm_scores", "advantages"])
        rewards = [float(values.sum()) for values in data["rm_scores"]]
        advantages = [float(values[0]) for values in data["advantages"]]
        return rollout_rows(self.global_steps, groups, self.tokenizer, selected, rewards, advantages)

    def _validate(self) -> dict[str, float]:
        self._validated = []
        metrics = dict(super()._validate())
        if self._validated:
            figures = summarise(self._validated)
            figures = {name: value for name, value in figures.items() if math.isfinite(value)}
            metrics |= {f"eval/{name}": value for name, value in figures.items()}
            if self.record is not None:
                self.record.add_evaluation(
                    self.global_steps, figures, self._validated, self.tokenizer, self.options, self.options.seed
                )
        return metrics

    def _note_validated(self, batch: KVBatchMeta) -> None:
        """Keep the responses of an evaluation, with entropies; raises RuntimeError if there are none."""
        if not batch.keys:
            raise RuntimeError("no response of the evaluation could be sampled or judged; the log has the errors")
        per_token = self._measure_validation(batch) if self.base_mode == "sync" else {}
        keys = in_file_order(batch.keys, batch.partition_id)  # the same prompts come first each time
        groups = self._groups(keys, batch.partition_id, per_token=per_token, with_text=True)
        self._validated += complete_groups(groups, self.config.actor_rollout_ref.rollout.val_kwargs.n)

    def _measure_validation(self, batch: KVBatchMeta) -> dict[str, str]:
        """Measure entropies of held-out responses at their sampling temperature; returns the field names."""
        rollout = self.config.actor_rollout_ref.rollout
        at_once = 1 if rollout.log_prob_use_dynamic_bsz else rollout.log_prob_micro_batch_size_per_gpu
        multiple = at_once * self.resource_pool_manager.get_n_gpus()
        alone = KVBatchMeta(partition_id=batch.partition_id, keys=list(batch.keys), tags=list(batch.tags))
        padded = upsample_batch_to_divisible_size(alone, multiple, self.tokenizer.eos_token_id)
        temperature = float(rollout.val_kwargs.temperature) or 1.0
        padded.extra_info.update(calculate_entropy=True, compute_loss=False, temperature=temperature)
        # As verl does for a reward model on the same GPUs: samplers free their memory, then reload the weights.
        self.checkpoint_manager.sleep_replicas()
        self.actor_rollout_wg.compute_log_prob(padded)
        self.checkpoint_manager.update_weights(self.global_steps)
        names = {"entropy": "entropy", "log_probs": "old_log_probs"}
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=[*names, "response_mask"]
        )
        fields = {new: response_from_nested(data[name], data["response_mask"]) for name, new in names.items()}
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )
        if added := [key for key in padded.keys if key not in set(batch.keys)]:  # a list of them
            tq.kv_clear(keys=added, partition_id=batch.partition_id)
        return {"entropy": "entropy", "logprobs": "old_log_probs"}


@register_trainer("forkrl")
class ForkTrainerSync(ForkTrainer, PPOTrainerSync):  # type: ignore[misc]
    """Samples with the weights that it trains next."""

    base_mode = "sync"


@register_trainer("forkrl_colocate_async")
class ForkTrainerColocateAsync(ForkTrainer, PPOTrainerColocateAsync):  # type: ignore[misc]
    """Samples ahead on the same GPUs, with weights as old as verl allows."""

    base_mode = "colocate_async"


@register_trainer("forkrl_separate_async")
class ForkTrainerSeparateAsync(ForkTrainer, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """Samples ahead on separate GPUs."""

    base_mode = "separate_async"
