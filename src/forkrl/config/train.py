"""A whole recipe for ``forkrl train``, and what its tables must agree on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from forkrl.config.responses import DynamicSamplingConfig, RewardConfig, RolloutConfig, SandboxConfig
from forkrl.config.runtime import ClusterConfig, RuntimeConfig
from forkrl.config.sections import FROM_LIST, Count, NonNegative, PositiveInt, Section, Seed, default_of
from forkrl.config.task import TaskConfig
from forkrl.config.update import ForksOnlyConfig, LossConfig, OptimizerConfig, SelectionConfig, TrainingConfig

CHANGEABLE = ("training.steps", "eval.*", "checkpoint.*", "log.*")
"""Settings that affect no finished step: a resumed run may change them."""


class ModelConfig(Section):
    path: str = "embedded:countdown-base"
    """A local folder, a hub id, or "embedded:countdown-base", the small base model inside the package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products (autocast). Weights and optimizer state are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class EvalConfig(Section):
    every: Count = 20
    """Steps between evaluations on held-out prompts; 0: only before and after."""
    problems: PositiveInt = 512
    """Held-out prompts, the same each time."""
    samples: PositiveInt = 1
    """Responses to each."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""


class CheckpointConfig(Section):
    every: PositiveInt = 20
    """Steps between checkpoints; the last step and an interruption always save."""
    keep: PositiveInt = 2
    """Newest checkpoints kept whole; older ones are removed after a newer one is safe."""


class LogConfig(Section):
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], FROM_LIST] = ()
    """Besides metrics.jsonl, which is always written. A tracker that fails is reported once and dropped."""
    rollouts_every: PositiveInt = 10
    """Steps between samples of training responses written to rollouts/."""
    rollouts_sampled: Count = 64
    """Responses per sample."""


class TrainConfig(Section):
    """A recipe for ``forkrl train``."""

    seed: Seed = 0
    """Of sampling, data order and evaluation: the same seed, machine, threads and workers give the same bits."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    sandbox: SandboxConfig = SandboxConfig()
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    selection: SelectionConfig = SelectionConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    forks_only: ForksOnlyConfig = ForksOnlyConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _sizes_agree(self) -> TrainConfig:
        per_step, per_mini = self.rollout.prompts_per_step, self.training.mini_batch_prompts
        if per_step % per_mini:
            raise ValueError(
                f"training.mini_batch_prompts = {per_mini} does not divide rollout.prompts_per_step = {per_step}; "
                f"every gradient step takes the same number of groups"
            )
        if self.reward.overlong_cache >= self.rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong_cache = {self.reward.overlong_cache} is not below rollout.max_response_tokens = "
                f"{self.rollout.max_response_tokens}; every response would be penalised (0 turns the penalty off)"
            )
        if self.task.verifier == "code" and self.sandbox.memory_mb + 256 > self.reward.memory_mb:
            raise ValueError(
                f"sandbox.memory_mb = {self.sandbox.memory_mb} does not fit in reward.memory_mb = "
                f"{self.reward.memory_mb} with 256 to spare; raise that, or lower it"
            )
        self._forks_only_fits()
        if self.runtime.trainer == "local" and self.cluster != ClusterConfig():
            changed = next(
                key
                for key in ClusterConfig.model_fields
                if getattr(self.cluster, key) != default_of(ClusterConfig, key)
            )
            raise ValueError(
                f'cluster.{changed} is read by runtime.trainer = "verl" alone; add --trainer verl, or leave it out'
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if self.training.micro_batch_tokens < longest:
            raise ValueError(
                f"training.micro_batch_tokens = {self.training.micro_batch_tokens} cannot hold one sequence of "
                f"max_prompt_tokens + max_response_tokens = {longest}; raise it, or shorten the responses"
            )
        return self

    def _forks_only_fits(self) -> None:
        if self.training.backward == "dense":
            if self.forks_only != ForksOnlyConfig():
                raise ValueError(
                    'forks_only.* is read by training.backward = "forks_only" alone; set that, or leave the section out'
                )
            return
        if self.loss.kl_coef or self.loss.entropy_coef:
            raise ValueError(
                'training.backward = "forks_only" gives gradients to selected tokens only, and loss.kl_coef and '
                'loss.entropy_coef are means over all; set both to 0, or training.backward to "dense"'
            )
        if self.model.gradient_checkpointing:
            raise ValueError(
                'training.backward = "forks_only" takes keys and values out of layers as they run, which recomputed '
                "layers would do twice; set model.gradient_checkpointing to false"
            )
        if self.forks_only.projections and self.forks_only.sampled:
            raise ValueError(
                f"forks_only.projections and forks_only.sampled = {self.forks_only.sampled} would count the same "
                f"gradients twice; set one of them"
            )
        selection, default = self.selection, ForksOnlyConfig().kept_mib
        ahead = selection.entropy == "current" and (
            selection.rule == "threshold"
            or (selection.scope == "mini_batch" and selection.rule in ("top_entropy", "bottom_entropy"))
        )
        if self.forks_only.kept_mib != default and (self.forks_only.projections or not ahead):
            raise ValueError(
                f"forks_only.kept_mib = {self.forks_only.kept_mib} is read only for a selection by current entropies "
                f"over the mini-batch, without forks_only.projections; leave it out"
            )
