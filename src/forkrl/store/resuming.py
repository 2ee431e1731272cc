"""Resuming a run: its settings stay, except those that affect no finished step. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from forkrl.config import CHANGEABLE, TrainConfig
from forkrl.config.recipe import parse_recipe, recipe_differences
from forkrl.errors import UserError
from forkrl.store.run_folder import CONFIG, read_recipe

_PREFIXES = tuple(key.removesuffix("*") for key in CHANGEABLE)


def stored_config(folder: Path) -> TrainConfig:
    """The settings of the run in ``folder``."""
    return parse_recipe(TrainConfig, read_recipe(folder), str(folder / CONFIG))


def accepted_changes(folder: Path, config: TrainConfig, changed: Collection[str]) -> list[str]:
    """What a resumed run changes: each as ``key: old -> new``.

    Args:
        folder: of the run.
        config: the settings to resume it with.
        changed: settings that differ on purpose, as on the command line; any other difference is an error.
    """
    by_verl = config.runtime.trainer == "verl"
    accepted: list[str] = []
    refused: list[str] = []
    for difference in recipe_differences(stored_config(folder), config):
        key = difference.partition(":")[0]
        on_purpose = any(key == name or key.startswith(f"{name}.") for name in changed)
        fits = on_purpose and key.startswith(_PREFIXES) and not by_verl
        (accepted if fits else refused).append(difference)
    if not refused:
        return accepted
    from forkrl.store.checkpoint import latest_checkpoint

    newest = latest_checkpoint(folder / "checkpoints")
    weights = "" if newest is None else f", from these weights with model.path={newest}"
    rule = "a run by verl keeps all its settings"
    if not by_verl:
        rule = f"only {', '.join(CHANGEABLE)} may change, each given as key=value"
    raise UserError(
        f"--resume {folder}: the recipe has changed since the run began: {'; '.join(refused)}; "
        f"resume without a recipe ({rule}), or start a new run with another --out{weights}"
    )


def describe_resume(
    folder: Path, done: int | None, config: TrainConfig, changes: Sequence[str], *, finished: bool
) -> str:
    """From which step a resumed run continues, with which changes; or that it is finished.

    Args:
        folder: of the run.
        done: the step of its newest checkpoint; None where there is none.
        config: the run's settings.
        changes: settings that it changes from here on.
        finished: whether it is at its last step, and evaluated there.
    """
    last = config.training.steps
    if finished:
        return (
            f"{folder} is finished (step {last} of {last}); to train it further: "
            f"forkrl train --resume {folder} training.steps={2 * last}"
        )
    start = "from the beginning (it has no checkpoint)" if done is None else f"after step {done} of {last}"
    changed = f", with {'; '.join(changes)}" if changes else ""
    return f"resuming {folder} {start}{changed}"
