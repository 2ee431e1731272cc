"""A command's subject: weights, settings, prompts. Imports no torch; ``session.open_session`` loads the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.commands.options import DriftOptions, ModelOptions, flag_of
from forkrl.commands.reference import BASE, ModelReference, parse_reference
from forkrl.config import ModelConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.store.resuming import stored_config

# Recipe settings that these commands read; overriding anything else would silently do nothing.
_SETTINGS = {
    "seed", "model.revision", "model.precision", "rollout.max_prompt_tokens", "rollout.max_response_tokens",
    "rollout.stop", "rollout.engine", "rollout.max_sequences", "rollout.kv_cache_gib",
    "reward.workers", "reward.timeout_s", "reward.memory_mb", "eval.problems", "eval.samples", "eval.temperature",
    "runtime.device", "runtime.workers", "runtime.threads",
}  # fmt: skip
_PROMPT_SOURCES = {"task.name", "task.data", "task.held_out_data", "task.subset", "task.split"}
ALLOW_UNKNOWN = "task.allow_unknown_tokens"
# Training limits that the response length of these commands need not satisfy, and adapters: they open merged models.
_UNTRAINED = (
    "reward.overlong_cache=0", f"training.micro_batch_tokens={2**62}",
    "lora.rank=", "lora.alpha=", "lora.targets=", "checkpoint.merged=",
)  # fmt: skip


class Subject(NamedTuple):
    """A model as the user named it, with the settings of the command.

    ``checkpoint``: "step-N" or "base" of the run. ``whole``: use all prompts of the data, without a held-out split.
    ``limit``: maximum number of prompts. ``bounded``: the user set ``rollout.max_response_tokens``. ``given``: settings
    changed by overrides or options.
    """

    name: str
    config: TrainConfig
    run: Path | None
    checkpoint: str
    whole: bool
    limit: int | None
    bounded: bool
    given: frozenset[str] = frozenset()


class Settings(NamedTuple):
    """The resolved options of a command. ``stored``: the run's recipe, if it is a run; others as in ``Subject``."""

    reference: ModelReference
    stored: TrainConfig | None
    config: TrainConfig
    given: frozenset[str]
    whole: bool


def read_settings(options: ModelOptions | DriftOptions) -> Settings:
    reference = parse_reference(options.model)
    run = reference.run
    if run is not None and options.recipe is not None:
        raise UserError(
            f"--recipe {options.recipe}: {run} is a run and keeps its own recipe; change single settings of it"
        )
    stored = None if run is None else stored_config(run)
    overrides = options.all_overrides
    given = {override.partition("=")[0].strip(): override for override in overrides}
    if options.data is not None:
        given |= dict.fromkeys(("task.name", "task.data"), f"--data {options.data}")
    for key, override in given.items():
        if reason := _why_unused(key, options.unused_settings):
            raise UserError(f"{override}: {reason}")
    chosen = _chosen(options)
    replaced = [f"{key}={value}" for key, (_, value) in chosen.items()]
    if options.engine == "torch" and "rollout.kv_cache_gib" not in given:  # a run with vLLM may have set it
        replaced.append("rollout.kv_cache_gib=")
    config = load_recipe(TrainConfig, options.recipe, [*overrides, *replaced, *_UNTRAINED], base=stored)
    whole = run is None or not _PROMPT_SOURCES.isdisjoint(given)
    for key, override in given.items():
        if key in chosen:
            raise UserError(f"{override}: {chosen[key][0]}")
        if key.partition(".")[0] not in options.used_sections and (
            reason := _why_without_effect(key, config, whole, options.activity)
        ):
            raise UserError(f"{override}: {reason}")
    return Settings(reference, stored, config, frozenset(given.keys() | chosen.keys()), whole)


def open_subject(options: ModelOptions | DriftOptions) -> Subject:
    """Resolve the subject without loading anything.

    A *run*, at any step, uses its own recipe and held-out split. A *model* with ``task.name=dataset``, or a run whose
    overrides name other data, uses all of ``task.held_out_data``, or if that is empty all of ``task.data``. Countdown
    has one held-out set.
    """
    reference, stored, config, given, whole = read_settings(options)
    if stored is not None:
        located = locate_weights(reference, stored.model)
    else:  # a revision in the recipe belongs to the recipe's model
        keep = "model.revision" in given or options.model == config.model.path
        located = Weights(options.model, config.model.revision if keep else None, "")
    placed = config.model.model_copy(update={"path": located.path, "revision": located.revision})
    whole_file = whole and config.task.name == "dataset"
    return Subject(
        name=reference.name,
        config=config.model_copy(update={"model": placed}),
        run=reference.run,
        checkpoint=located.checkpoint,
        whole=whole,
        limit=None if whole_file and "eval.problems" not in given else config.eval.problems,
        bounded=reference.run is not None or options.recipe is not None or "rollout.max_response_tokens" in given,
        given=given,
    )


class Weights(NamedTuple):
    """Location of the weights. ``checkpoint``: "step-N" or "base" of a run; empty without a run."""

    path: str
    revision: str | None
    checkpoint: str


def locate_weights(reference: ModelReference, trained: ModelConfig) -> Weights:
    """The weights that a run reference names; ``trained``: the run's model settings."""
    from forkrl.store.checkpoint import checkpoint_of_step, latest_checkpoint  # imports torch

    assert reference.run is not None
    if reference.at == BASE:
        return Weights(trained.path, trained.revision, BASE)
    checkpoints = reference.run / "checkpoints"
    if reference.at:
        path: Path | None = checkpoint_of_step(checkpoints, int(reference.at.removeprefix("step-")))
    else:
        path = latest_checkpoint(checkpoints)
    if path is None:
        raise UserError(f"{why_no_weights(reference.run)}; {reference.run}@{BASE} is its starting model")
    return Weights(str(path), None, path.name)


def why_no_weights(run: Path) -> str:
    none = stored_config(run).checkpoint.kind == "none"
    reason = 'with checkpoint.kind = "none" this run saved no weights' if none else "this run has no checkpoint yet"
    return f"{run}: {reason}"


def _chosen(options: ModelOptions | DriftOptions) -> dict[str, tuple[str, Any]]:
    """Settings replaced by options: why overriding each has no effect, and the option's value."""
    found = {}
    for each in fields(options):
        declared, value = each.metadata["option"], getattr(options, each.name)
        if declared.setting and value is not None:
            flag = flag_of(each.name)
            reason = f"has no effect along with {flag}; drop one of the two"
            if each.default is not None:
                reason = f"has no effect on {options.activity}; give {flag}"
            found[declared.setting] = (reason, value)
    return found


def _why_unused(key: str, unused: Mapping[str, str]) -> str:
    section = key.partition(".")[0] + "."
    if key == ALLOW_UNKNOWN and section in unused:
        return ""  # applies to prompts from any source
    return next((f"has no effect {unused[name]}; drop it" for name in (key, section) if name in unused), "")


def _why_without_effect(key: str, config: TrainConfig, whole: bool, activity: str) -> str:
    """Why an override would have no effect; empty if it has one."""
    if "." not in key and key != "seed":
        return "write each setting as section.key=value"
    if key == "model.path":
        return "has no effect; the model is the first argument of the command"
    if not key.startswith("task."):
        return "" if key in _SETTINGS else f"has no effect on {activity}; drop it"
    if whole and key == "task.held_out_rows":
        return "has no effect; all rows are taken (--problems limits them)"
    if whole and key == "task.data" and config.task.held_out_data:
        return f"has no effect; the prompts come from task.held_out_data = {config.task.held_out_data!r}; set that one"
    return ""
