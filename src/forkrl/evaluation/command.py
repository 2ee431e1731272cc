"""``forkrl eval``: a model on a prompt file or on held-out problems, or a run's newest checkpoint on its own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.atomic import write_text
from forkrl.checkpoint import latest_checkpoint
from forkrl.config import TrainConfig, load_recipe, parse_recipe
from forkrl.errors import UserError
from forkrl.evaluation.held_out import evaluation_generator, evaluation_sampling, sample_and_score, summarise
from forkrl.model import Policy, open_policy
from forkrl.progress import progress
from forkrl.replicas import open_replicas
from forkrl.rewards import open_verifier
from forkrl.rollout import open_engine
from forkrl.run_folder import read_recipe
from forkrl.tasks import open_evaluation_task, open_task
from forkrl.types import Prompt, RolloutGroup

# What an evaluation reads of a recipe; an override of anything else would silently do nothing.
_SETTINGS = {
    "seed", "model.revision", "model.precision", "rollout.max_prompt_tokens", "rollout.max_response_tokens",
    "rollout.stop", "rollout.max_sequences", "reward.workers", "reward.deadline_s", "reward.memory_mb",
    "eval.problems", "eval.samples", "eval.temperature", "runtime.device", "runtime.replicas", "runtime.threads",
}  # fmt: skip
_PROMPT_SOURCES = {"task.name", "task.data", "task.held_out_data", "task.subset", "task.split"}
# Limits of training that the response length of an evaluation need not agree with.
_UNBOUNDED = ("reward.overlong_cache=0", f"training.micro_batch_tokens={2**62}")


def evaluate_model(
    model: str,
    *,
    recipe: Path | None,
    overrides: Sequence[str],
    problems: int | None,
    samples: int | None,
    temperature: float | None,
    out: Path | None,
) -> dict[str, Any]:
    """Sample, score, summarise; returns the figures, and writes them to ``out`` as JSON.

    Which prompts: a *run folder* is evaluated on its own held-out split, of which the first ``eval.problems`` are those
    it was evaluated on while it trained, so that the two figures compare. Any *model* with ``task.name=dataset``, or a
    run with overrides that name other data, is evaluated on the whole of ``task.held_out_data``, or where that is
    empty on the whole of ``task.data``: no training split is needed, and none is taken. Countdown has one held-out set.

    Args:
        model: a model folder or hub id, or a run folder: its newest checkpoint, with the run's own settings.
        recipe: where task, rollout and reward settings come from otherwise.
        overrides: ``section.key=value``.
        problems: prompts, from the first. None: ``eval.problems``, or of a data set that is evaluated whole, all
            (there only an override sets ``eval.problems``: a recipe's bounds the time of training's evaluations).
        samples: responses to each; None: ``eval.samples``.
        temperature: of sampling, 0 is greedy; None: ``eval.temperature``. ``rollout.top_p`` and ``top_k`` never apply.
        out: JSON file, or None.

    Raises:
        UserError: the model, the data or a setting cannot be used, an override has no effect, or ``out`` cannot be
            written; all before the first response is sampled.
    """
    arguments = {"problems": problems, "samples": samples, "temperature": temperature}
    _check_arguments(arguments)
    if out is not None:
        _check_out(out)
    setup = _settings(
        model, recipe, overrides, {f"eval.{key}" for key, value in arguments.items() if value is not None}
    )
    config = setup.config
    num_samples = config.eval.samples if samples is None else samples
    temperature = config.eval.temperature if temperature is None else temperature
    policy = open_policy(config.model, config.runtime.device)
    task = (open_evaluation_task if setup.whole else open_task)(config.task, policy.tokenizer)
    prompts = task.held_out[: setup.limit if problems is None else problems]
    groups = _sample_all(config, policy, task.verifier, prompts, num_samples, temperature)
    figures = {
        "schema": "forkrl-eval/1",
        "model": model,
        "task": task.name,
        "prompts": "all" if setup.whole and config.task.name == "dataset" else "held-out",
        "problems_available": len(task.held_out),
        "data_fingerprint": task.fingerprint,
        "seed": config.seed,
        "temperature": temperature,
        **summarise(groups),
    }
    if out is not None:
        write_text(out, json.dumps(figures, indent=2) + "\n")
    return figures


def describe_figures(figures: dict[str, Any]) -> str:
    """The figures as a few lines for a person."""
    problems, samples, available = (int(figures[name]) for name in ("problems", "samples", "problems_available"))
    share = f"all {problems}" if problems == available else f"the first {problems} of {available}"
    kind = "held-out problems" if figures["prompts"] == "held-out" else "problems"
    lines = [
        f"{figures['model']} on {share} {kind} of {figures['task']}, {samples} response(s) each, "
        f"temperature {figures['temperature']:g}",
        f"accuracy (avg@{samples})  {_with_interval(figures, 'accuracy')}",
    ]
    names = (name for name in figures if name.startswith("pass@") and name.count("_") == 0)
    lines += [f"{name:18}  {_with_interval(figures, name)}" for name in names]
    lines.append(
        f"mean length {figures['length']:.1f} tokens, {figures['truncated_fraction']:.1%} cut at the limit, "
        f"mean entropy {figures['entropy']:.3f} nats"
    )
    if figures["verifier_failures"]:
        lines.append(f"{figures['verifier_failures']:.0f} responses could not be verified and count as wrong")
    return "\n".join(lines)


def _with_interval(figures: dict[str, Any], name: str) -> str:
    return f"{figures[name]:.3f}  95% [{figures[name + '_low']:.3f}, {figures[name + '_high']:.3f}]"


class _Setup(NamedTuple):
    """The settings of an evaluation. ``whole``: on all prompts of the data; ``limit``: at most so many of them."""

    config: TrainConfig
    whole: bool
    limit: int | None


def _sample_all(
    config: TrainConfig, policy: Policy, verifier: str, prompts: Sequence[Prompt], num_samples: int, temperature: float
) -> list[RolloutGroup]:
    """All responses with their verdicts; every prompt is checked before the first is sampled."""
    sampling = evaluation_sampling(config, temperature, policy)
    generator = evaluation_generator(config, policy.device)
    groups: list[RolloutGroup] = []
    with ExitStack() as stack:
        replicas = stack.enter_context(open_replicas(policy, None, config.runtime))
        engine = open_engine(replicas, config)
        engine.check_prompts(prompts)
        judge = stack.enter_context(open_verifier(verifier, config.reward))
        for wave in progress(_waves(prompts, engine.wave_sequences, num_samples), "evaluating"):
            groups += sample_and_score(
                engine, judge, wave, group_size=num_samples, sampling=sampling, generator=generator
            )
    return groups


def _waves(prompts: Sequence[Prompt], wave_sequences: int, num_samples: int) -> list[Sequence[Prompt]]:
    """Parts that fill whole batches of the engine: progress is seen, and responses are those of one call for all."""
    size = math.lcm(wave_sequences, num_samples) // num_samples
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def _check_arguments(arguments: dict[str, float | None]) -> None:
    for name, least in (("problems", 1), ("samples", 1), ("temperature", 0)):
        value = arguments[name]
        if value is not None and not (least <= value < math.inf):
            raise UserError(f"--{name} {value}: at least {least}")


def _check_out(out: Path) -> None:
    """Refuse before hours of sampling what could not be written after them."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: the folder {out.parent} may not be written; choose another")


def _settings(model: str, recipe: Path | None, overrides: Sequence[str], arguments: set[str]) -> _Setup:
    """The recipe to evaluate under, with the path of the weights in it. ``arguments``: settings that options give."""
    folder = Path(model)
    is_run = (folder / "config.toml").is_file()
    if is_run and recipe is not None:
        raise UserError(f"--recipe {recipe}: {folder} is a run and keeps its own recipe; change single settings of it")
    stored = parse_recipe(TrainConfig, read_recipe(folder), str(folder / "config.toml")) if is_run else None
    given = {override.partition("=")[0].strip(): override for override in overrides}
    config = load_recipe(TrainConfig, recipe, [*overrides, *_UNBOUNDED], base=stored)
    whole = not is_run or not _PROMPT_SOURCES.isdisjoint(given)
    for key, override in given.items():
        if reason := _why_without_effect(key, config, whole, arguments):
            raise UserError(f"{override}: {reason}")
    path, revision = model, config.model.revision
    if is_run:
        path, revision = _newest_checkpoint(folder), None
    elif "model.revision" not in given and model != config.model.path:
        revision = None  # the recipe's is one of another model
    whole_file = whole and config.task.name == "dataset"
    limit = None if whole_file and "eval.problems" not in given else config.eval.problems
    return _Setup(
        config.model_copy(update={"model": config.model.model_copy(update={"path": path, "revision": revision})}),
        whole,
        limit,
    )


def _newest_checkpoint(folder: Path) -> str:
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{folder}: this run has no checkpoint yet")
    return str(checkpoint)


def _why_without_effect(key: str, config: TrainConfig, whole: bool, arguments: set[str]) -> str:
    """Why an override would do nothing here; empty if it does something."""
    if "." not in key and key != "seed":
        return "write each setting as section.key=value"
    if key == "model.path":
        return "has no effect; the model to evaluate is the first argument of forkrl eval"
    if key in arguments:
        return f"has no effect along with --{key.partition('.')[2]}; leave one of the two away"
    if not key.startswith("task."):
        return "" if key in _SETTINGS else "has no effect on an evaluation; leave it away"
    if whole and key == "task.held_out_rows":
        return "has no effect; all rows are evaluated (--problems takes the first so many)"
    if whole and key == "task.data" and config.task.held_out_data:
        return f"has no effect; the prompts come from task.held_out_data = {config.task.held_out_data!r}; set that one"
    return ""
