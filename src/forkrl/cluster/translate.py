"""From a recipe to verl's command line, by the table in ``settings.py``. Imports neither verl, hydra nor torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from forkrl.cluster.hydra_text import overridden_key, override
from forkrl.cluster.settings import REFUSED, TABLE, UNSET, Run, Value, VerlPaths, setting
from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.parallel.even_shares import require_even_shares


def verl_command(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> list[str]:
    """The command to run, with ``verl_environment`` added to the environment."""
    overrides = verl_overrides(config, paths, stop_token_ids=stop_token_ids)
    return [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]


def verl_overrides(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> list[str]:
    """verl's settings for a recipe, followed by the user's own.

    Args:
        config: the recipe.
        paths: the files of this run.
        stop_token_ids: all that end a response (``stop_tokens.stop_token_ids``).
    """
    refuse_untranslatable(config)
    settings, own = verl_settings(config, paths, stop_token_ids=stop_token_ids), config.cluster.overrides
    names = [key.lstrip("+") for key in settings]
    for text in own:
        key = overridden_key(text)
        if taken := [name for name in names if f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.")]:
            raise UserError(
                f"cluster.overrides: {text!r} sets what ForkRL sets itself ({taken[0]}); drop it, and see "
                f"docs/cluster-settings.md for the recipe's own setting"
            )
    return [*(override(key, value) for key, value in settings.items()), *(text.strip() for text in own)]


def verl_settings(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> dict[str, Value]:
    """Every setting of verl that ForkRL sets."""
    run = Run(config, paths, stop_token_ids)
    values = {name: row.value(run) for row in TABLE for name in row.verl}
    return {name: value for name, value in values.items() if value is not UNSET}


def refuse_untranslatable(config: TrainConfig) -> None:
    """Check a recipe against what verl can honour."""
    for row in REFUSED:
        if row.refused is not None and row.refused(config):
            raise UserError(f"{row.recipe} = {json.dumps(setting(config, row.recipe))}: {row.why}")
    tasks = [("task.", config.task), *((f"task.parts ({part.label}): ", part) for part in config.task.parts)]
    for place, task in tasks:
        if task.curriculum.promote_above is not None:
            raise UserError(
                f"{place}curriculum.promote_above = {task.curriculum.promote_above} follows the accuracy, and verl "
                f'draws from all prompts alike; set difficulty instead, or use runtime.trainer = "local"'
            )
    require_even_shares(config)


def refuse_unsuitable_prompts(config: TrainConfig, prompts: Mapping[str, int]) -> None:
    """Check a task's prompts: verl draws from all rows alike, in epochs, whatever the weights of a mix.

    Args:
        config: the recipe.
        prompts: how many there are to train on, by ``Prompt.source``.
    """
    total, wanted = sum(prompts.values()), config.rollout.prompts_per_step
    if total < wanted:
        raise UserError(
            f"rollout.prompts_per_step = {wanted}, but the task has {total} prompts to train on, and verl needs enough "
            f"for one step; lower it, or add prompts"
        )
    weights = sum(part.weight for part in config.task.parts)
    for part in config.task.parts:
        share, asked = prompts.get(part.label, 0) / total, part.weight / weights
        if abs(share - asked) > 0.01:
            raise UserError(
                f"task.parts: {part.label} has weight {part.weight:g}, {asked:.1%} of the prompts, but "
                f"{prompts.get(part.label, 0)} of {total} rows, and verl draws from all rows alike; set the weights to "
                f'the parts\' numbers of rows, or use runtime.trainer = "local"'
            )
