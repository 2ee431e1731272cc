"""A training run between steps: logging, evaluation, checkpoints, stopping. ``loop.py`` is the step itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from forkrl.config import TrainConfig
from forkrl.config.recipe import change_recipe
from forkrl.errors import UserError
from forkrl.method.batches import cut_micro_batches
from forkrl.method.schedule import EarlyEnd, adaptive_bonus, early_end, share_of_lr
from forkrl.model.policy import Policy
from forkrl.parallel.workers import Workers
from forkrl.report.progress import TrainingDisplay
from forkrl.rollout import training_sampling
from forkrl.rollout.held_out import evaluation_generator, evaluation_sampling, sample_and_score, summarise
from forkrl.rollout.logprob_gap import logprob_gap, require_small_gap
from forkrl.rollout.sampling import RANDOM_STREAM
from forkrl.rollout.scoring import none_judged
from forkrl.store.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from forkrl.store.interruption import Interruption
from forkrl.store.resuming import (
    require_progress,
    stored_config,
)
from forkrl.store.run_folder import RunFolder, best_step
from forkrl.tasks import PromptStream
from forkrl.training.metrics import level_metrics
from forkrl.training.rollout_rows import evaluation_rows
from forkrl.training.tracking import Trackers
from forkrl.types import RolloutEngine, SamplingParams, Task, TokenBatch, Verifier


@dataclass(eq=False)
class Run:
    """The state of a run between steps. ``step`` counts finished steps."""

    config: TrainConfig
    folder: RunFolder
    workers: Workers
    optimizer: torch.optim.Optimizer
    engine: RolloutEngine
    verifier: Verifier
    task: Task
    prompts: PromptStream
    generator: torch.Generator
    tracker: Trackers
    display: TrainingDisplay
    interruption: Interruption
    step: int = 0
    gradient_steps: int = 0
    entropy_coef: float = 0.0
    """Of the adaptive entropy bonus in the next step."""
    step_config: TrainConfig = field(init=False)
    """The settings of the current step's updates."""
    _saved_step: int | None = None
    _evaluated_step: int | None = None
    _gap_checked: bool = False
    _step_start: tuple[dict[str, Any], torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.step_config = self.config
        self._mark()

    @staticmethod
    def create(config: TrainConfig, out: str | Path, **plug_ins: Any) -> AbstractContextManager[Run]:
        """A new run in folder ``out``, as a context manager; ``plug_ins`` are fields of :class:`PlugIns`.

        Raises:
            UserError: an error in the model, data, folder or recipe.
        """
        from forkrl.training.open_run import PlugIns, open_run  # it imports this module

        return open_run(config, Path(out), plug_ins=PlugIns(**plug_ins))

    @staticmethod
    def resume(
        folder: str | Path, changes: Mapping[str, Any] | None = None, **plug_ins: Any
    ) -> AbstractContextManager[Run]:
        """The run in ``folder`` at its newest checkpoint, as a context manager.

        Args:
            folder: run folder.
            changes: new values by key, for training.steps, .epochs, eval.*, log.*, checkpoint.every, .keep, .keep_best.
            plug_ins: fields of :class:`PlugIns`, as when the run was created.

        Raises:
            UserError: as ``create``, or for a change of another setting.
        """
        from forkrl.training.open_run import PlugIns, open_run

        changes = dict(changes or {})
        config = change_recipe(stored_config(Path(folder)), changes)
        return open_run(config, resume=Path(folder), changed=changes, plug_ins=PlugIns(**plug_ins))

    def steps(self) -> Iterator[int]:
        """Numbers of the remaining steps; saves random state and data position before each, for ``stop``."""
        while not self.is_over:
            self._mark()
            yield self.step + 1

    @contextmanager
    def phase(self, name: str, total: int = 0) -> Iterator[None]:
        """A part of a step that changes no weights and may be interrupted; samples ``total`` responses."""
        before = self.workers.sequences_finished
        self.display.phase(name, total, lambda: self.workers.sequences_finished - before)
        with self.interruption.allowed():
            yield

    @property
    def policy(self) -> Policy:
        return self.workers.policy

    @property
    def sampling(self) -> SamplingParams:
        """Sampling parameters of training responses."""
        return training_sampling(self.config, self.policy)

    def check_logprobs(self, batch: TokenBatch) -> None:
        """Compare sampler and trainer log-probs on the first micro-batch after a start or resume.

        Raises TrainingHalted if they differ by more than rounding. Weights and random states are unchanged.
        """
        if self._gap_checked:
            return
        first = batch.rows(
            cut_micro_batches(batch, self.config.training.micro_batch_tokens, packed=self.policy.packs)[0]
        )
        if not first.response_mask.any():  # an environment that failed before it asked the model
            return
        gap = logprob_gap(self.policy, first.to(self.policy.device), self.config.rollout.temperature)
        require_small_gap(gap, self.policy.precision)
        self._gap_checked = True

    def set_learning_rate(self, done: float) -> float:
        """Count the next gradient step and set its rate; ``done``: share of the batch's gradient steps before it."""
        self.gradient_steps += 1
        progress, settings = (self.step + done) / self.config.training.steps, self.config.optimizer
        lr = settings.lr * share_of_lr(settings, self.gradient_steps, progress, self.config.gradient_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def adapt_entropy_bonus(self, batch: TokenBatch) -> dict[str, float]:
        """With loss.entropy_target: set the bonus's weight in this step's updates, and the next ``entropy_coef``."""
        loss = self.config.loss
        if not loss.entropy_target:
            return {}
        entropy = float(batch.rollout_entropy[batch.response_mask].mean())
        weight, self.entropy_coef = adaptive_bonus(self.entropy_coef, entropy, loss.entropy_target, loss.entropy_delta)
        changed = loss.model_copy(update={"entropy_coef": weight})
        self.step_config = self.config.model_copy(update={"loss": changed})
        return {"loss/entropy_coef": weight}

    def finish_step(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """Count and log the step; save a checkpoint if due."""
        self.step += 1
        self._mark()
        if samples:
            self.folder.write_rollouts(f"train-{self.step:06d}", samples)
        self._log({**metrics, "sampling/epochs": self.prompts.epochs, **level_metrics(self.prompts.levels)})
        if self.step % self.config.checkpoint.every == 0 or self.is_over:
            self.save()

    def should_sample(self) -> bool:
        """Whether the current step writes a sample of its responses."""
        return bool(self.config.log.rollouts_sampled) and (self.step + 1) % self.config.log.rollouts_every == 0

    def evaluate_if_due(self) -> None:
        """Measure held-out accuracy at the start, every ``eval.every`` steps and at the end, with a fixed seed."""
        every = self.config.eval.every
        due = self.step == 0 or (every and self.step % every == 0) or self.is_over
        if not due or self.step == self._evaluated_step:
            return
        prompts = self.task.held_out[: self.config.eval.problems]
        with self.phase("eval", len(prompts) * self.config.eval.samples):
            groups = sample_and_score(
                self.engine,
                self.verifier,
                prompts,
                group_size=self.config.eval.samples,
                sampling=evaluation_sampling(self.config, self.config.eval.temperature, self.policy),
                generator=evaluation_generator(self.config.seed, self.policy.device),
            )
        results = [result for group in groups for result in group.results]
        failures = sum(bool(result.failure) for result in results)
        if reason := none_judged(failures, len(results), self.verifier.first_failures):
            self.display.message(f"evaluation at step {self.step}: {reason}; its accuracy of 0 measures nothing")
        written = groups[: max(1, self.config.log.rollouts_sampled // self.config.eval.samples)]
        rows = evaluation_rows(self.step, written, self.policy.tokenizer, self.config.selection, seed=self.config.seed)
        self.folder.write_rollouts(f"eval-{self.step:06d}", rows)
        self.folder.write_scores(self.step, {group.prompt.id: group.scores for group in groups})
        self._log({f"eval/{name}": value for name, value in summarise(groups).items()})
        self._evaluated_step = self.step
        early = self.early_end
        if early and self.step < self.config.training.steps:
            self.display.message(f"stopping at step {self.step}: {early.reason}")
        if self.step and (early or self._best_step() == self.step):
            self.save()

    @property
    def early_end(self) -> EarlyEnd | None:
        """Why the run has no further step although ``training.steps`` may not be done."""
        patience, epochs = self.config.eval.patience, self.config.training.epochs
        rows = self.folder.read_metrics() if patience or epochs else []
        return early_end(rows, patience=patience, epochs=epochs)

    @property
    def is_over(self) -> bool:
        """Whether no step is left; the last one may not be evaluated yet."""
        return self.step >= self.config.training.steps or self.early_end is not None

    @property
    def is_finished(self) -> bool:
        return self.step == self._evaluated_step and self.is_over

    def _best_step(self) -> int | None:
        """With checkpoint.keep_best: the best of the steps that have a checkpoint, this one, and the start."""
        if not self.config.checkpoint.keep_best:
            return None
        return best_step(self.folder.read_metrics(), self.folder.checkpoints, self.step)

    def save(self) -> None:
        """Write a checkpoint of the finished steps, unless there is one or the recipe wants none."""
        if self._saved_step == self.step or self.config.checkpoint.kind == "none":
            return
        self.display.phase("save")
        save_checkpoint(
            self.folder.checkpoints,
            self.step,
            model=self.policy.model,
            tokenizer=self.policy.tokenizer,
            optimizer=self.optimizer,
            generators={"sampling": self.generator},
            progress={
                "random_stream": RANDOM_STREAM,
                "step": self.step,
                "gradient_steps": self.gradient_steps,
                "entropy_coef": self.entropy_coef,
                "prompts": self.prompts.state(),
                "metrics_bytes": self.folder.metrics_bytes,
                "evaluated_step": self._evaluated_step,
            },
            keep=self.config.checkpoint.keep,
            spared=self._best_step(),
            weights_only=self.config.checkpoint.kind == "weights",
            adapter=self.policy.adapter,
            merged=self.config.checkpoint.merged,
        )
        self._saved_step = self.step

    def stop(self) -> None:
        """Abandon the current step and save the finished ones."""
        prompts_state, generator_state = self._step_start
        self.prompts.restore(prompts_state)
        self.generator.set_state(generator_state)
        self.save()

    def restore(self) -> int:
        """Restore the newest complete checkpoint, if any, and return the length of metrics.jsonl at that checkpoint.

        Raises UserError if it is beyond training.steps or of another version. The folder is not changed.
        """
        path = latest_checkpoint(self.folder.checkpoints)
        if path is None:
            return 0
        progress = load_checkpoint(
            path,
            model=self.policy.model,
            optimizer=self.optimizer,
            generators={"sampling": self.generator},
            adapter=self.policy.adapter,
        )
        require_progress(path, progress, RANDOM_STREAM)
        self.step, self.gradient_steps = progress["step"], progress["gradient_steps"]
        if self.config.loss.entropy_target:
            self.entropy_coef = progress["entropy_coef"]
        self.prompts.restore(progress["prompts"])
        evaluation_bytes = self.folder.evaluation_bytes(progress["metrics_bytes"], self.step)
        self._evaluated_step = self.step if evaluation_bytes else progress["evaluated_step"]
        if self.step > self.config.training.steps:
            raise UserError(
                f"training.steps = {self.config.training.steps}: {self.folder.path} is at step {self.step} already; "
                f"raise it"
            )
        self._saved_step = self.step
        self._mark()
        return int(progress["metrics_bytes"]) + evaluation_bytes

    @property
    def first_unsaved_step(self) -> int:
        """The first step that no checkpoint contains; 0 without checkpoints (step 0 is the untrained model)."""
        return 0 if self._saved_step is None else self._saved_step + 1

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been logged or saved."""
        return self._saved_step is None and not self.folder.read_metrics()

    def recovery_hint(self, purpose: str = "continue with other settings") -> str:
        """What the user can do with a run that cannot be resumed, or not with its recipe."""
        if self._saved_step is None:
            return "no checkpoint was saved; start a new run with another --out"
        return (
            f"the checkpoint of step {self._saved_step} is intact; to {purpose}, start a new run "
            f"from its weights: model.path={self.folder.checkpoints / f'step-{self._saved_step}'} and another --out"
        )

    def _mark(self) -> None:
        self._step_start = (self.prompts.state(), self.generator.get_state())

    def _log(self, metrics: Mapping[str, float]) -> None:
        record = {"step": self.step, **metrics}
        self.folder.append_metrics(record)
        self.tracker.log(self.step, metrics)
        self.display.update(record)
