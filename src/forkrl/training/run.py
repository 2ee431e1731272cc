"""A training run: opening, logging, checkpoints, resuming and stopping. ``loop.py`` is the step itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from forkrl.config import OptimizerConfig, TrainConfig
from forkrl.config.recipe import change_recipe, recipe_toml
from forkrl.errors import NothingToLearn, TrainingHalted, UserError, WorkerLost, notice
from forkrl.method.batches import cut_micro_batches
from forkrl.method.schedule import adaptive_bonus, share_of_lr
from forkrl.model.adapter import add_adapter
from forkrl.model.policy import Policy, PolicyWithoutAdapter, open_policy
from forkrl.parallel.workers import Workers, open_workers
from forkrl.report.progress import TrainingDisplay, describe_selection
from forkrl.rewards import VerifierPool, open_verifier
from forkrl.rewards.code import with_sandbox
from forkrl.rollout import open_engine, training_sampling
from forkrl.rollout.held_out import evaluation_generator, evaluation_sampling, sample_and_score, summarise
from forkrl.rollout.logprob_gap import logprob_gap, require_small_gap
from forkrl.rollout.sampling import RANDOM_STREAM
from forkrl.rollout.scoring import none_judged
from forkrl.store.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from forkrl.store.interruption import Interrupted, Interruption
from forkrl.store.provenance import changed_arithmetic, describe_provenance, new_run_id, refuse_other_data
from forkrl.store.resuming import (
    accepted_changes,
    describe_resume,
    require_progress,
    require_training_state,
    stored_config,
)
from forkrl.store.run_folder import RunFolder, refuse_occupied
from forkrl.tasks import PromptStream, open_stream, open_task, repeated_prompts
from forkrl.training.forks_only import require_forks_only
from forkrl.training.metrics import level_metrics
from forkrl.training.rollout_rows import evaluation_rows
from forkrl.training.tracking import TrackedRun, Tracker, Trackers, open_trackers, require_trackers
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
        return open_run(config, Path(out), plug_ins=PlugIns(**plug_ins))

    @staticmethod
    def resume(
        folder: str | Path, changes: Mapping[str, Any] | None = None, **plug_ins: Any
    ) -> AbstractContextManager[Run]:
        """The run in ``folder`` at its newest checkpoint, as a context manager.

        Args:
            folder: run folder.
            changes: new values for training.steps, eval.*, log.*, checkpoint.every, .keep or .keep_best, by key.
            plug_ins: fields of :class:`PlugIns`, as when the run was created.

        Raises:
            UserError: as ``create``, or for a change of another setting.
        """
        changes = dict(changes or {})
        config = change_recipe(stored_config(Path(folder)), changes)
        return open_run(config, resume=Path(folder), changed=changes, plug_ins=PlugIns(**plug_ins))

    def steps(self) -> Iterator[int]:
        """Numbers of the remaining steps; saves random state and data position before each, for ``stop``."""
        while self.step < self.config.training.steps:
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

    def check_logprobs(self, batch: TokenBatch) -> dict[str, float]:
        """Compare sampler and trainer log-probs on the first micro-batch after a start or resume.

        Raises TrainingHalted if they differ by more than rounding. Weights and random states are unchanged.
        """
        if self._gap_checked:
            return {}
        first = batch.rows(
            cut_micro_batches(batch, self.config.training.micro_batch_tokens, packed=self.policy.packs)[0]
        )
        gap = logprob_gap(self.policy, first.to(self.policy.device), self.config.rollout.temperature)
        require_small_gap(gap, self.policy.precision)
        self._gap_checked = True
        return {"rollout/logprob_gap_mean": gap.mean, "rollout/logprob_gap_max": gap.max}

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
        self._log({**metrics, **level_metrics(self.prompts.levels)})
        if self.step % self.config.checkpoint.every == 0 or self.step == self.config.training.steps:
            self.save()

    def should_sample(self) -> bool:
        """Whether the current step writes a sample of its responses."""
        return bool(self.config.log.rollouts_sampled) and (self.step + 1) % self.config.log.rollouts_every == 0

    def evaluate_if_due(self) -> None:
        """Measure held-out accuracy at the start, every ``eval.every`` steps and at the end, with a fixed seed."""
        every, last = self.config.eval.every, self.config.training.steps
        due = self.step in (0, last) or (every and self.step % every == 0)
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
        if self.step and self._best_step() == self.step:
            self.save()

    def _best_step(self) -> int | None:
        """With checkpoint.keep_best: the evaluated step with the highest held-out accuracy, the first of equals."""
        if not self.config.checkpoint.keep_best:
            return None
        accuracies = {row["step"]: row["eval/accuracy"] for row in self.folder.read_metrics() if "eval/accuracy" in row}
        return max(accuracies, key=accuracies.__getitem__, default=None)

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


@dataclass(frozen=True)
class PlugIns:
    """Replacements for parts of a run; None keeps the recipe's.

    ``engine`` is called with the workers and the settings once the model is open. The caller closes ``verifier``.
    """

    engine: Callable[[Workers, TrainConfig], RolloutEngine] | None = None
    task: Task | None = None
    verifier: Verifier | None = None
    tracker: Tracker | None = None


@contextmanager
def open_run(
    config: TrainConfig,
    out: Path | None = None,
    *,
    resume: Path | None = None,
    changed: Collection[str] = (),
    plug_ins: PlugIns = PlugIns(),
) -> Iterator[Run]:
    """Open a new run in ``out``, or the run in ``resume`` at its newest checkpoint.

    On a stop signal, finished steps are saved before ``Interrupted`` is raised. ``out`` is not created if the input is
    invalid. Only ``changed`` settings may differ from those a resumed run was started with; they are stored.
    """
    changes: list[str] = []
    if resume is not None:  # before loading a model of many gigabytes
        require_training_state(resume)
        changes = accepted_changes(resume, config, changed)
    else:
        assert out is not None
        refuse_occupied(out)
    require_trackers(config.log.trackers)
    with ExitStack() as stack:
        run = _open_parts(config, out, resume, plug_ins, stack)
        metrics_bytes = run.restore() if resume is not None else 0
        run.tracker = stack.enter_context(_open_tracker(run, plug_ins.tracker, remove_on_failure=resume is None))
        stack.enter_context(run.interruption)  # after the trackers: Ctrl-C must end one that waits for its server
        if resume is not None:
            run.folder.discard_after(run.first_unsaved_step - 1, metrics_bytes)
        if changes:
            run.folder.change_recipe(recipe_toml(config), run.step, changes)
        run.display = stack.enter_context(
            TrainingDisplay(
                config.training.steps,
                run.step,
                eval_every=config.eval.every,
                entropy_floor=config.log.entropy_floor,
                header=describe_selection(config),
            )
        )
        if isinstance(run.verifier, VerifierPool):
            run.verifier.announce = run.display.message
        if resume is not None:
            _announce_resume(run, changes)
        with _early_ends(run, new=resume is None):
            yield run


def _open_parts(config: TrainConfig, out: Path | None, resume: Path | None, plug_ins: PlugIns, stack: ExitStack) -> Run:
    """The run before it is restored, without trackers and display. ``stack`` closes its parts."""
    torch.manual_seed(config.seed)
    policy = _open_policy(config)
    task = plug_ins.task or open_task(config.task, policy.tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens)
    if repeated := repeated_prompts(task.train, config):
        notice(repeated)
    reference = _open_reference(policy) if config.loss.kl_coef else None
    workers = stack.enter_context(open_workers(policy, reference, config.runtime))
    engine = (plug_ins.engine or open_engine)(workers, config)
    engine.check_prompts([*task.train, *task.held_out], config.rollout.max_response_tokens)
    verifier = plug_ins.verifier or stack.enter_context(
        open_verifier(with_sandbox(task.verifiers, config.sandbox), config.reward)
    )
    prompts = open_stream(task.train, config.task, config.seed)
    # Created after all input checks: a mistake leaves no folder.
    provenance = describe_provenance(task, workers)
    folder = stack.enter_context(_open_folder(config, out, resume, provenance))
    return Run(
        config=config,
        folder=folder,
        workers=workers,
        optimizer=_open_optimizer(policy, config.optimizer),
        engine=engine,
        verifier=verifier,
        task=task,
        prompts=prompts,
        generator=torch.Generator(policy.device).manual_seed(config.seed),
        tracker=Trackers({}),
        display=TrainingDisplay(config.training.steps),
        interruption=Interruption(),
    )


def _open_policy(config: TrainConfig) -> Policy:
    """The model, checked to support the recipe."""
    policy = open_policy(config.model, config.runtime.device)
    if config.lora.rank:
        policy.adapter = add_adapter(policy.model, config.lora, config.model)
    if config.training.backward == "forks_only":
        require_forks_only(policy, projections=config.forks_only.projections)
    elif not policy.packs:
        notice(f"{type(policy.model).__name__}: updates pad sequences and repeat prompts ({policy.why_padded})")
    policy.stop_token_ids(config.rollout.stop)
    return policy


def _open_reference(policy: Policy) -> Policy:
    """The starting policy: a frozen copy, or the same weights without their new adapter."""
    if policy.adapter is not None:
        return PolicyWithoutAdapter(policy.model, policy.tokenizer, policy.precision, policy.head)
    frozen = copy.deepcopy(policy.model).requires_grad_(False)
    return Policy(frozen, policy.tokenizer, policy.precision, policy.head)


def _open_optimizer(policy: Policy, settings: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in policy.model.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over weights and state instead of ten
    )


def _open_folder(
    config: TrainConfig, out: Path | None, resume: Path | None, provenance: Mapping[str, Any]
) -> RunFolder:
    if resume is None:
        assert out is not None
        return RunFolder.create(out, recipe_toml(config), {**provenance, "run_id": new_run_id()})
    folder = RunFolder.open(resume)
    refuse_other_data(folder, config, provenance["data_fingerprint"])
    return folder


def _open_tracker(run: Run, own: Tracker | None, *, remove_on_failure: bool) -> Trackers:
    """The recipe's trackers and the caller's ``own``. If one fails to start, a new run's folder is removed."""
    try:
        run_id = run.folder.provenance["run_id"]
        tracked = TrackedRun(run.folder.path, recipe_toml(run.config), run_id, run.first_unsaved_step)
        return open_trackers(run.config.log.trackers, tracked, own=own)
    except BaseException:
        if remove_on_failure:
            run.folder.remove()
        raise


def _announce_resume(run: Run, changes: Sequence[str]) -> None:
    done = run.step if run.first_unsaved_step else None
    finished = run.step == run._evaluated_step == run.config.training.steps
    run.display.message(describe_resume(run.folder.path, done, run.config, changes, finished=finished))
    schedule, steps = run.config.optimizer.schedule, run.config.training.steps
    if schedule != "constant" and any(change.startswith("training.steps:") for change in changes):
        run.display.message(
            f'optimizer.schedule = "{schedule}" now ends at step {steps}: from here on the learning rate is that of '
            f"training.steps = {steps}, and no run that was so long from the start has the same results"
        )
    if arithmetic := changed_arithmetic(run.folder.provenance, run.workers):
        run.display.message(f"resuming with {arithmetic}: the run continues, but is no longer bit-identical")


@contextmanager
def _early_ends(run: Run, *, new: bool) -> Iterator[None]:
    """When a run ends early, save what is valid, and say where it ended and how to continue."""
    resumable = run.config.checkpoint.kind == "full"
    try:
        yield
    except UserError:
        if new and run.is_empty:  # the corrected command can use the same folder
            run.folder.remove()
        raise
    except Interrupted as stop:
        run.stop()
        if not resumable:
            stop.outcome, stop.remedy = f"after step {run.step}", run.recovery_hint("continue")
        raise
    except NothingToLearn as error:
        if run.step:
            run.stop()
        raise NothingToLearn(f"step {run.step + 1}: {error}; {run.recovery_hint()}") from error
    except WorkerLost as error:  # not saved: the worker may have died between the gradient steps of a batch
        command = f"forkrl train --resume {run.folder.path}"
        remedy = f"continue with: {command}" if resumable else run.recovery_hint("continue")
        raise WorkerLost(f"step {run.step + 1}: {error}; {remedy}") from error
    except TrainingHalted as error:  # not saved: the weights may be the cause
        raise TrainingHalted(f"step {run.step + 1}: {error}; {run.recovery_hint()}") from error
