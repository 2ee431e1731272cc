"""The folders of a run's checkpoints: their names, how one takes another's place, and which go."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from forkrl.store.atomic import fsync

SAVING, REPLACED, _REMOVING = ".saving-", ".replaced-", ".removing-"
STEP_FOLDER = re.compile(r"step-(\d+)")

_log = logging.getLogger("forkrl")


def step_folders(checkpoints: Path, prefix: str = "") -> dict[int, Path]:
    """The folders named after a step, with ``prefix`` before it, by their steps."""
    names = {path.name.removeprefix(prefix): path for path in checkpoints.glob(f"{prefix}step-*")}
    return {int(match[1]): path for name, path in names.items() if (match := STEP_FOLDER.fullmatch(name))}


def candidates(checkpoints: Path) -> list[Path]:
    """Whole checkpoints as far as names tell, newest first."""
    named, aside = step_folders(checkpoints), step_folders(checkpoints, REPLACED)
    ranked = [(step, 1, path) for step, path in named.items()] + [(step, 0, path) for step, path in aside.items()]
    return [path for *_, path in sorted(ranked, reverse=True)]


def settle(checkpoints: Path) -> None:
    """Clear away what a save left half-done, so that only whole checkpoints under their own names remain."""
    for folder in [*checkpoints.glob(f"{SAVING}*"), *checkpoints.glob(f"{_REMOVING}*")]:
        _delete(folder)
    for folder in checkpoints.glob(f"{REPLACED}*"):
        final = folder.with_name(folder.name.removeprefix(REPLACED))
        if final.exists():
            _remove(folder)
        else:
            folder.rename(final)
            fsync(checkpoints)


def swap_in(temporary: Path, final: Path) -> None:
    """Give a complete folder its name. A folder cannot be renamed over another, so an older one steps aside first."""
    if final.exists() or final.is_symlink():
        final.rename(final.with_name(REPLACED + final.name))
    temporary.rename(final)
    fsync(final.parent)


def prune(checkpoints: Path, step: int, keep: int) -> None:
    """Remove checkpoints of later steps than the one just saved, and all but ``keep`` of the others."""
    steps = step_folders(checkpoints)
    later = [folder for number, folder in steps.items() if number > step]
    older = [folder for number, folder in sorted(steps.items(), reverse=True) if number < step]
    for folder in later:
        _log.warning("%s: removed; the run went back behind it, to an older checkpoint", folder)
    for folder in later + older[keep - 1 :]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Take a checkpoint away: first its name, in one instant, then its files."""
    _delete(folder.rename(folder.with_name(_REMOVING + folder.name.removeprefix(REPLACED))))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
