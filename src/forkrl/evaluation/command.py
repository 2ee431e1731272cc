"""``forkrl eval``: a model, or a run's newest checkpoint, on prompts kept aside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from forkrl.atomic import write_text
from forkrl.checkpoint import latest_checkpoint
from forkrl.config import TrainConfig, load_recipe, parse_recipe
from forkrl.errors import UserError
from forkrl.evaluation.held_out import sample_and_score, summarise
from forkrl.model import open_policy
from forkrl.progress import progress
from forkrl.rewards import VerifierPool
from forkrl.rollout import EmbeddedEngine
from forkrl.run_folder import read_recipe
from forkrl.tasks import open_task
from forkrl.threads import configure_threads
from forkrl.types import Prompt, RolloutGroup, SamplingParams


def evaluate_model(
    model: str,
    *,
    recipe: Path | None,
    overrides: Sequence[str],
    problems: int,
    samples: int,
    temperature: float,
    out: Path | None,
) -> dict[str, Any]:
    """Sample, score, summarise; returns the figures, and writes them to ``out`` as JSON.

    Args:
        model: a model folder or hub id, or a run folder: its newest checkpoint, with the run's own task settings.
        recipe: where task, rollout and reward settings come from otherwise.
        overrides: ``section.key=value``.
        problems: held-out prompts, from the first.
        samples: responses to each.
        temperature: of sampling; 0 is greedy.
        out: JSON file, or None.

    Raises:
        UserError: the model, the data or a setting cannot be used.
    """
    if problems < 1 or samples < 1 or temperature < 0:
        raise UserError(
            f"--problems {problems} --samples {samples} --temperature {temperature}: at least one problem and one "
            f"sample, and a temperature of 0 or more"
        )
    config, path = _settings(model, recipe, overrides)
    configure_threads(config.runtime.threads)
    policy = open_policy(config.model.model_copy(update={"path": path}), config.runtime.device)
    task = open_task(config.task, policy.tokenizer)
    prompts = task.held_out[:problems]
    engine = EmbeddedEngine(
        policy,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_sequences=config.rollout.max_sequences,
        add_special_tokens=not config.task.chat_template,
    )
    sampling = SamplingParams(
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        stop_token_ids=policy.stop_token_ids(config.rollout.stop),
    )
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    groups: list[RolloutGroup] = []
    with ExitStack() as stack:
        verifier = stack.enter_context(
            VerifierPool(
                task.verifier,
                workers=config.reward.workers,
                deadline_s=config.reward.deadline_s,
                memory_mb=config.reward.memory_mb,
            )
        )
        for wave in progress(_waves(prompts, max(1, config.rollout.max_sequences // samples)), "evaluating"):
            groups += sample_and_score(
                engine, verifier, wave, group_size=samples, sampling=sampling, generator=generator
            )
    figures = {
        "schema": "forkrl-eval/1",
        "model": model,
        "task": task.name,
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
    problems, samples = int(figures["problems"]), int(figures["samples"])
    lines = [
        f"{figures['model']} on {problems} held-out problems of {figures['task']}, {samples} response(s) each, "
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


def _settings(model: str, recipe: Path | None, overrides: Sequence[str]) -> tuple[TrainConfig, str]:
    """The recipe to evaluate under, and the path of the weights."""
    folder = Path(model)
    if recipe is None and (folder / "config.toml").is_file():
        checkpoint = latest_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise UserError(f"{folder}: this run has no checkpoint yet")
        stored = parse_recipe(TrainConfig, read_recipe(folder), str(folder / "config.toml"))
        return load_recipe(TrainConfig, None, overrides, base=stored), str(checkpoint)
    return load_recipe(TrainConfig, recipe, overrides), model


def _waves(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    """What the engine decodes at once, so that progress is seen between."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
