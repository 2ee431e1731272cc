"""Opens a training run, new or resumed, and ends it in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forkrl.config import OptimizerConfig, TrainConfig
from forkrl.config.recipe import recipe_toml
from forkrl.errors import EngineLost, NothingToLearn, TrainingHalted, UserError, WorkerLost, notice
from forkrl.method.trial import try_methods
from forkrl.model.adapter import add_adapter
from forkrl.model.locations import EMBEDDED_PREFIX
from forkrl.model.policy import Policy, PolicyWithoutAdapter, open_policy
from forkrl.parallel.workers import Workers, open_workers
from forkrl.report.progress import TrainingDisplay, describe_selection
from forkrl.rewards import VerifierPool, open_verifier
from forkrl.rewards.code import with_sandbox
from forkrl.rewards.specs import term_specs
from forkrl.rollout import open_engine
from forkrl.rollout.embedded import EmbeddedEngine
from forkrl.rollout.environment import EnvironmentEngine
from forkrl.rollout.vllm_engine import VllmEngine, require_vllm
from forkrl.store.interruption import Interrupted, Interruption
from forkrl.store.provenance import changed_arithmetic, describe_provenance, new_run_id, refuse_other_data
from forkrl.store.resuming import (
    accepted_changes,
    describe_resume,
    require_training_state,
)
from forkrl.store.run_folder import RunFolder, refuse_occupied
from forkrl.tasks import open_stream, open_task, repeated_prompts
from forkrl.training.forks_only import require_forks_only
from forkrl.training.run import Run
from forkrl.training.tracking import TrackedRun, Tracker, Trackers, open_trackers, require_trackers
from forkrl.types import RolloutEngine, Task, Verifier


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
    try_methods(config.selection, config.weights, config.loss)
    if config.rollout.engine == "vllm" and plug_ins.engine is None:
        require_vllm()
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
    if unused := unused_gpus(policy.device):
        notice(unused)
    task = plug_ins.task or open_task(
        config.task, policy.tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens, environments=True
    )
    if repeated := repeated_prompts(task.train, config):
        notice(repeated)
    reference = _open_reference(policy) if config.loss.needs_reference else None
    workers = stack.enter_context(open_workers(policy, reference, config.runtime))
    engine: RolloutEngine = (plug_ins.engine or open_engine)(workers, config)
    if config.task.name == "environment" and isinstance(engine, EmbeddedEngine):
        engine = EnvironmentEngine(engine, config)
    engine.check_prompts([*task.train, *task.held_out], config.rollout.max_response_tokens)
    if plug_ins.verifier and config.reward.terms:
        raise UserError(
            f"reward.terms ({config.reward.terms[0].name}) are for verifiers of a recipe, and the one given from "
            "Python computes the whole reward; remove them, or that verifier"
        )
    verifier = plug_ins.verifier or (engine if isinstance(engine, EnvironmentEngine) else None)
    if verifier is None:
        specs = with_sandbox(task.verifiers, config.sandbox) | term_specs(config.reward)
        verifier = stack.enter_context(open_verifier(specs, config.reward))
    prompts = open_stream(task.train, config.task, config.seed)
    # Created after all input checks: a mistake leaves no folder.
    provenance = describe_provenance(task, workers) | _engine_facts(engine) | _model_source(config.model.path)
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


def _engine_facts(engine: RolloutEngine) -> dict[str, str]:
    if isinstance(engine, EnvironmentEngine):
        engine = engine.engine
    return {"vllm": engine.version} if isinstance(engine, VllmEngine) else {}


def _model_source(path: str) -> dict[str, str]:
    """Where the model is from; a path alone does not say so on another machine."""
    inside = path.startswith(EMBEDDED_PREFIX)
    return {"model_source": "package" if inside else "folder" if Path(path).is_dir() else "hub"}


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


def unused_gpus(device: torch.device) -> str:
    """A message if the run leaves GPUs of this machine unused, else empty."""
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count <= 1:
        return ""
    return (
        f"this run uses one of {count} GPUs (CUDA_VISIBLE_DEVICES chooses which); --trainer verl "
        f"cluster.gpus_per_node={count} uses all (docs/cluster.md)"
    )


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
    early = run.early_end
    run.display.message(
        describe_resume(run.folder.path, done, run.config, changes, finished=run.is_finished, early=early)
    )
    schedule, steps = run.config.optimizer.schedule, run.config.training.steps
    if schedule != "constant" and any(change.startswith("training.steps:") for change in changes):
        run.display.message(
            f'optimizer.schedule = "{schedule}" now ends at step {steps}: from here on the learning rate is that of '
            f"training.steps = {steps}; results differ from those of a run started with that"
        )
    if arithmetic := changed_arithmetic(run.folder.provenance, run.workers, _engine_facts(run.engine)):
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
    except (EngineLost, WorkerLost) as error:
        if isinstance(error, EngineLost):  # a worker may have died between the gradient steps of a batch
            run.stop()
        command = f"forkrl train --resume {run.folder.path}"
        remedy = f"continue with: {command}" if resumable else run.recovery_hint("continue")
        raise type(error)(f"step {run.step + 1}: {error}; {remedy}") from error
    except TrainingHalted as error:  # not saved: the weights may be the cause
        raise TrainingHalted(f"step {run.step + 1}: {error}; {run.recovery_hint()}") from error
