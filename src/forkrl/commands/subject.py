"""What a command looks at: a model or a run, under which settings, on which prompts, and what it then works with.

``open_subject`` reads settings and refuses those without effect; ``open_session`` loads weights and starts processes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from forkrl.commands.reference import BASE, ModelReference, parse_reference
from forkrl.config import ModelConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.replicas import Replicas, open_replicas
from forkrl.rewards import open_verifier
from forkrl.rewards.code import with_sandbox
from forkrl.rewards.pool import VerifierPool
from forkrl.rollout import open_engine
from forkrl.rollout.embedded import EmbeddedEngine
from forkrl.store.checkpoint import checkpoint_of_step, latest_checkpoint
from forkrl.store.resuming import stored_config
from forkrl.tasks import open_evaluation_task, open_task
from forkrl.types import Prompt, Task

# What these commands read of a recipe; an override of anything else would silently do nothing.
_SETTINGS = {
    "seed", "model.revision", "model.precision", "rollout.max_prompt_tokens", "rollout.max_response_tokens",
    "rollout.stop", "rollout.max_sequences", "rollout.cuda_graphs", "reward.workers", "reward.deadline_s",
    "reward.memory_mb", "eval.problems", "eval.samples", "eval.temperature", "runtime.device", "runtime.replicas",
    "runtime.threads",
}  # fmt: skip
_PROMPT_SOURCES = {"task.name", "task.data", "task.held_out_data", "task.subset", "task.split"}
ALLOW_UNKNOWN = "task.allow_unknown_tokens"
# Limits of training that the response length of these commands need not agree with.
_UNBOUNDED = ("reward.overlong_cache=0", f"training.micro_batch_tokens={2**62}")
# Options of the command line, the setting that each stands for, and its least value.
_OPTIONS = {
    "problems": ("eval.problems", 1),
    "samples": ("eval.samples", 1),
    "temperature": ("eval.temperature", 0),
    "max_tokens": ("rollout.max_response_tokens", 1),
}


class Subject(NamedTuple):
    """A model as the user named it, with the settings to look at it under.

    ``checkpoint``: of the run, "step-N" or "base"; ``whole``: on all prompts of the data, nothing split off; ``limit``:
    at most so many of them; ``bounded``: the user set ``rollout.max_response_tokens``; ``given``: the settings that
    were given as overrides.
    """

    name: str
    config: TrainConfig
    run: Path | None
    checkpoint: str
    whole: bool
    limit: int | None
    bounded: bool
    given: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Session:
    """An open model with its prompts, and what samples and judges."""

    config: TrainConfig
    replicas: Replicas
    engine: EmbeddedEngine
    task: Task
    prompts: Sequence[Prompt]
    verifier: VerifierPool | None
    """None where the prompts have no answers: nothing can be judged."""

    @property
    def policy(self) -> Policy:
        return self.replicas.policy

    def waves(self, group_size: int) -> list[Sequence[Prompt]]:
        """The prompts in parts that fill whole batches of the engine: progress is seen, and no batch is left half
        empty."""
        size = math.lcm(self.engine.wave_sequences, group_size) // group_size
        return [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]


def open_subject(
    model: str,
    *,
    recipe: Path | None,
    overrides: Sequence[str],
    arguments: Mapping[str, float | None],
    activity: str,
    unused: Mapping[str, str] = MappingProxyType({}),
    used: Collection[str] = (),
) -> Subject:
    """Settings for looking at ``model``; nothing is loaded yet.

    Which prompts: a *run*, at whichever step, brings its own recipe and its own held-out split. Any
    *model* with ``task.name=dataset``, or a run with overrides that name other data, takes the whole of
    ``task.held_out_data``, or where that is empty the whole of ``task.data``. Countdown has one held-out set.

    Args:
        model: a model folder or hub id; or a run (its newest checkpoint), RUN@step-N or RUN@base.
        recipe: where task, rollout and reward settings come from otherwise.
        overrides: ``section.key=value``.
        arguments: options of the command line that stand for a setting: problems, samples, temperature, max_tokens;
            None where not given.
        activity: what an override without effect has none on, such as "an evaluation".
        unused: settings, or sections with a dot after them, without effect here, each with what else to say of it.
        used: further sections that have an effect here.

    Raises:
        UserError: the run, the recipe or a setting cannot be used, or an override has no effect.
    """
    chosen = _chosen(arguments)
    reference = parse_reference(model)
    run = reference.run
    if run is not None and recipe is not None:
        raise UserError(f"--recipe {recipe}: {run} is a run and keeps its own recipe; change single settings of it")
    stored = None if run is None else stored_config(run)
    given = {override.partition("=")[0].strip(): override for override in overrides}
    for key, override in given.items():
        if reason := _why_unused(key, unused):
            raise UserError(f"{override}: {reason}")
    limits = [f"{key}={value}" for key, value in chosen.items() if key == "rollout.max_response_tokens"]
    config = load_recipe(TrainConfig, recipe, [*overrides, *limits, *_UNBOUNDED], base=stored)
    whole = run is None or not _PROMPT_SOURCES.isdisjoint(given)
    for key, override in given.items():
        if key.partition(".")[0] not in used and (
            reason := _why_without_effect(key, config, whole, set(chosen), activity)
        ):
            raise UserError(f"{override}: {reason}")
    whole_file = whole and config.task.name == "dataset"
    if stored is not None:
        located = locate_weights(reference, stored.model)
    else:
        keep = "model.revision" in given or model == config.model.path  # else the recipe's is one of another model
        located = Weights(model, config.model.revision if keep else None, "")
    placed = config.model.model_copy(update={"path": located.path, "revision": located.revision})
    return Subject(
        name=reference.name,
        config=config.model_copy(update={"model": placed}),
        run=run,
        checkpoint=located.checkpoint,
        whole=whole,
        limit=None if whole_file and "eval.problems" not in given else config.eval.problems,
        bounded=run is not None or recipe is not None or "rollout.max_response_tokens" in given.keys() | chosen.keys(),
        given=frozenset(given),
    )


class Weights(NamedTuple):
    """Where weights are. ``checkpoint``: which of a run's they are, "step-N" or "base"; empty without a run."""

    path: str
    revision: str | None
    checkpoint: str


def locate_weights(reference: ModelReference, trained: ModelConfig) -> Weights:
    """The weights that a reference to a run stands for; ``trained``: the model settings of that run.

    Raises:
        UserError: the run has no such checkpoint, or none at all; the message lists those it has.
    """
    assert reference.run is not None
    if reference.at == BASE:
        return Weights(trained.path, trained.revision, BASE)
    checkpoints = reference.run / "checkpoints"
    if reference.at:
        path: Path | None = checkpoint_of_step(checkpoints, int(reference.at.removeprefix("step-")))
    else:
        path = latest_checkpoint(checkpoints)
    if path is None:
        raise UserError(
            f"{reference.run}: this run has no checkpoint yet; {reference.run}@{BASE} is its starting model"
        )
    return Weights(str(path), None, path.name)


def open_task_of(subject: Subject, policy: Policy) -> Task:
    """The task whose held-out prompts are those to look at."""
    open_it = open_evaluation_task if subject.whole else open_task
    return open_it(subject.config.task, policy.tokenizer, max_prompt_tokens=subject.config.rollout.max_prompt_tokens)


@contextmanager
def open_model(subject: Subject) -> Iterator[Replicas]:
    """Load the model and start its replicas.

    Raises:
        UserError: it cannot be used.
    """
    policy = open_policy(subject.config.model, subject.config.runtime.device)
    with open_replicas(policy, None, subject.config.runtime) as replicas:
        yield replicas


@contextmanager
def open_session(subject: Subject, problems: int | None = None) -> Iterator[Session]:
    """Load the model and its prompts, check every prompt, and start replicas and verifiers.

    Args:
        subject: what to look at.
        problems: so many prompts, from the first; None: what the subject's settings say.

    Raises:
        UserError: model, data or verifier cannot be used, or a prompt that the model cannot read.
    """
    with ExitStack() as stack:
        replicas = stack.enter_context(open_model(subject))
        task = open_task_of(subject, replicas.policy)
        prompts = task.held_out[: subject.limit if problems is None else problems]
        engine = open_engine(replicas, subject.config)
        config = checked_config(subject, engine, prompts)
        verifiers = with_sandbox(task.verifiers, config.sandbox)
        verifier = stack.enter_context(open_verifier(verifiers, config.reward)) if verifiers else None
        yield Session(config, replicas, engine, task, prompts, verifier)


def graphs_fact(config: TrainConfig) -> dict[str, bool]:
    """For a command's question, which names the setting only where it is on: it is younger than the questions are."""
    return {"rollout.cuda_graphs": True} if config.rollout.cuda_graphs else {}


def checked_config(subject: Subject, engine: EmbeddedEngine, prompts: Sequence[Prompt]) -> TrainConfig:
    """The subject's settings, once every prompt is found to fit; with the length of responses that the model's
    positions leave, where nobody chose one.

    Raises:
        UserError: a prompt is empty or too long, or leaves too few positions for a response.
    """
    if not subject.bounded:
        return _bounded_by_positions(subject.config, engine, prompts)
    engine.check_prompts(prompts, subject.config.rollout.max_response_tokens)
    return subject.config


def _bounded_by_positions(config: TrainConfig, engine: EmbeddedEngine, prompts: Sequence[Prompt]) -> TrainConfig:
    """Nobody chose a length of responses: the default, or as much as the model has positions for."""
    longest = max((engine.count_tokens(prompt) for prompt in prompts), default=0)
    positions = getattr(engine.policy.model.config, "max_position_embeddings", None)
    if positions is None or longest + config.rollout.max_response_tokens <= positions:
        return config
    limit = {"max_response_tokens": max(positions - longest, 1)}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=limit)})


def _chosen(arguments: Mapping[str, float | None]) -> dict[str, float]:
    """The settings that options of the command line stand for, with their values."""
    chosen = {}
    for name, value in arguments.items():
        key, least = _OPTIONS[name]
        if value is None:
            continue
        if not least <= value < math.inf:
            raise UserError(f"{_option(name)} {value}: at least {least}")
        chosen[key] = value
    return chosen


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _why_unused(key: str, unused: Mapping[str, str]) -> str:
    section = key.partition(".")[0] + "."
    if key == ALLOW_UNKNOWN and section in unused:
        return ""  # of all prompts, whatever they come from
    return next((f"has no effect {unused[name]}; leave it away" for name in (key, section) if name in unused), "")


def _why_without_effect(key: str, config: TrainConfig, whole: bool, taken: set[str], activity: str) -> str:
    """Why an override would do nothing here; empty if it does something."""
    if "." not in key and key != "seed":
        return "write each setting as section.key=value"
    if key == "model.path":
        return "has no effect; the model is the first argument of the command"
    if key in taken:
        option = next(_option(name) for name, (setting, _) in _OPTIONS.items() if setting == key)
        return f"has no effect along with {option}; leave one of the two away"
    if not key.startswith("task."):
        return "" if key in _SETTINGS else f"has no effect on {activity}; leave it away"
    if whole and key == "task.held_out_rows":
        return "has no effect; all rows are taken (--problems takes the first so many)"
    if whole and key == "task.data" and config.task.held_out_data:
        return f"has no effect; the prompts come from task.held_out_data = {config.task.held_out_data!r}; set that one"
    return ""
