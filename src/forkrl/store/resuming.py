"""What a resumed run may change: settings that affect no finished step. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from forkrl.config import CHANGEABLE, TrainConfig
from forkrl.config.recipe import parse_recipe, recipe_differences, without_removed
from forkrl.errors import UserError
from forkrl.method.schedule import EarlyEnd
from forkrl.store.run_folder import CONFIG, read_config, read_recipe

_PREFIXES = tuple(key.removesuffix("*") for key in CHANGEABLE)


def stored_config(folder: Path) -> TrainConfig:
    values = without_removed(read_recipe(folder))
    try:
        return parse_recipe(TrainConfig, values, str(folder / CONFIG))
    except UserError as error:  # read_recipe has checked that config.toml is unedited, so another version wrote it
        commit = read_config(folder)["provenance"].get("commit")
        version = f"another version of ForkRL{f' (commit {commit})' if commit else ''}"
        raise UserError(f"{error}; the run was made by {version}: use that, or start a new run") from error


def accepted_changes(folder: Path, config: TrainConfig, changed: Collection[str]) -> list[str]:
    """What a resumed run changes, each as ``key: old -> new``; UserError for differences outside ``changed``."""
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
    rule = f"only {', '.join(CHANGEABLE)} may change, each given as key=value"
    raise UserError(
        f"--resume {folder}: the recipe has changed since the run began: {'; '.join(refused)}; resume without a recipe "
        f"({'a run by verl keeps all its settings' if by_verl else rule}), or {_new_run(folder)}"
    )


def require_training_state(folder: Path) -> None:
    """Refuse to resume a run whose checkpoint.kind saves no training state; other checks would suggest resuming it."""
    kind = stored_config(folder).checkpoint.kind
    if kind != "full":
        raise UserError(
            f'--resume {folder}: with checkpoint.kind = "{kind}" the run saved no training state to resume from; '
            f"{_new_run(folder)}"
        )


def _new_run(folder: Path) -> str:
    from forkrl.store.checkpoint import latest_checkpoint  # imports torch

    newest = latest_checkpoint(folder / "checkpoints")
    weights = "" if newest is None else f", from these weights with model.path={newest}"
    return f"start a new run with another --out{weights}"


def require_progress(path: Path, progress: Mapping[str, Any], random_stream: int) -> None:
    """Refuse a checkpoint of another version."""
    missing = {"step", "gradient_steps", "prompts", "evaluated_step", "metrics_bytes"} - progress.keys()
    if missing or progress.get("random_stream") != random_stream:
        difference = f"its progress lacks {', '.join(sorted(missing))}" if missing else "seeds gave other responses"
        raise UserError(
            f"{path}: saved by another version of ForkRL ({difference}); start a new run from its weights: "
            f"model.path={path} and another --out"
        )


def describe_resume(
    folder: Path,
    done: int | None,
    config: TrainConfig,
    changes: Sequence[str],
    *,
    finished: bool,
    early: EarlyEnd | None = None,
) -> str:
    """The step a resumed run starts from and its changes, or that it is finished; ``done`` is the checkpoint's step."""
    last = config.training.steps
    if finished and early and done != last:
        return (
            f"{folder} has stopped early at step {done} of {last}: {early.reason}; to train it further, raise "
            f"{early.setting}, or turn it off: forkrl train --resume {folder} {early.setting}=0"
        )
    if finished:
        return (
            f"{folder} is finished (step {last} of {last}); to train it further: "
            f"forkrl train --resume {folder} training.steps={2 * last}"
        )
    start = "from the beginning (it has no checkpoint)" if done is None else f"after step {done} of {last}"
    changed = f", with {'; '.join(changes)}" if changes else ""
    return f"resuming {folder} {start}{changed}"
