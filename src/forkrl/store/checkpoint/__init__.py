"""Checkpoints that survive a kill at any instant, resume to the bit, and cannot run code.

    checkpoints/step-20/                 loads with AutoModelForCausalLM.from_pretrained
        config.json, model.safetensors, tokenizer.json, ...
        trainer/optimizer.safetensors    AdamW moments and step counts, by parameter name
        trainer/optimizer.json           learning rate and the other numbers of every parameter group
        trainer/rng.safetensors          PyTorch's random states: CPU, every CUDA device, every named generator
        trainer/progress.json            what else the loop needs to resume
        manifest.json                    size and SHA-256 of all the above, written last

A save builds the whole folder under a hidden name, syncs it, and renames it; only then do older ones go. Hidden names
tell a later save what a killed one was doing: ``.saving-`` is unfinished, ``.removing-`` is half gone, and
``.replaced-`` is the older of two checkpoints of one step, whole, moved aside for the moment between two renames.

Saving is synchronous: when ``save_checkpoint`` returns, nothing on the disk refers to live weights any more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forkrl.errors import UserError
from forkrl.store.atomic import explained_write_errors, fsync
from forkrl.store.checkpoint.files import read_json, write_json
from forkrl.store.checkpoint.folders import REPLACED, SAVING, candidates, prune, settle, step_folders, swap_in
from forkrl.store.checkpoint.manifest import PROGRESS, RANDOM_STATES, verify_checkpoint, write_manifest
from forkrl.store.checkpoint.state import (
    no_progress_bars,
    random_states,
    read_optimizer,
    read_random_states,
    read_weights,
    restore_random_states,
    write_optimizer,
)

__all__ = [
    "adopt_weights",
    "all_checkpoints",
    "checkpoint_of_step",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
]

_log = logging.getLogger("forkrl")


def save_checkpoint(
    checkpoints: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    progress: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``checkpoints/step-N`` so that at every instant the newest whole checkpoint can be found.

    Args:
        checkpoints: Folder of all checkpoints of the run; one process at a time writes to it.
        step: Gradient steps done. An older checkpoint of the same step is replaced.
        optimizer: AdamW or any other whose state is tensors only, over parameters of ``model``.
        generators: The run's random generators by name; PyTorch's global ones are saved besides.
        progress: What else the loop needs to resume, as JSON.
        keep: Checkpoints to leave, the new one included. Older ones go once it is durable, and so do those of later
            steps: the run went back behind them, because they were damaged.

    Returns:
        The folder of the new checkpoint.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the new checkpoint has to stay")
    final, temporary = checkpoints / f"step-{step}", checkpoints / f"{SAVING}step-{step}"
    with explained_write_errors(final):
        checkpoints.mkdir(parents=True, exist_ok=True)
        fsync(checkpoints.parent)
        settle(checkpoints)
        try:
            temporary.mkdir()
            with no_progress_bars():
                model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "trainer").mkdir()
            write_optimizer(temporary, model, optimizer)
            save_file(random_states(generators), temporary / RANDOM_STATES)
            write_json(temporary / PROGRESS, dict(progress))
            write_manifest(temporary, step)
            swap_in(temporary, final)
        finally:
            settle(checkpoints)
        prune(checkpoints, step, keep)
    return final


def adopt_weights(checkpoints: Path, step: int, saved: Path) -> Path:
    """Make a folder with a model and its tokenizer, written by another program, the checkpoint of ``step``.

    It has weights only: it loads like any model, and training cannot resume from it.

    Args:
        checkpoints: Folder of all checkpoints of the run, on the same file system as ``saved``.
        step: Of the run. An older checkpoint of the same step is replaced.
        saved: The folder; it is gone afterwards.
    """
    final, temporary = checkpoints / f"step-{step}", checkpoints / f"{SAVING}step-{step}"
    if not (saved / "config.json").is_file():
        raise UserError(f"{saved}: no model was written there, it has no config.json")
    with explained_write_errors(final):
        checkpoints.mkdir(parents=True, exist_ok=True)
        settle(checkpoints)
        try:
            saved.rename(temporary)
            write_manifest(temporary, step, weights_only=True)
            swap_in(temporary, final)
        finally:
            settle(checkpoints)
    return final


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose every file is what its manifest says, or None if there is none at all.

    A damaged one is named in a warning, and the next older is tried. The step is told by what ``load_checkpoint``
    returns, not by the folder's name: after a kill between two renames, that is ``.replaced-step-N``.
    """
    faults: list[str] = []
    for folder in candidates(checkpoints):
        try:
            verify_checkpoint(folder)
        except UserError as error:
            _log.warning("%s; trying the checkpoint before it", error)
            faults.append(str(error))
        else:
            return folder
    if faults:
        raise UserError(
            f"{checkpoints}: no checkpoint is whole; restore one from a backup or start a new run: " + "; ".join(faults)
        )
    return None


def all_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Every checkpoint by its step, oldest first."""
    folders = _by_step(checkpoints)
    for folder in folders.values():
        verify_checkpoint(folder)
    return folders


def checkpoint_of_step(checkpoints: Path, step: int) -> Path:
    """The checkpoint of one step."""
    folders = _by_step(checkpoints)
    if step not in folders:
        available = ", ".join(f"step-{number}" for number in folders)
        raise UserError(f"{checkpoints}: no checkpoint of step {step}; available: {available or 'none'}")
    verify_checkpoint(folders[step])
    return folders[step]


def _by_step(checkpoints: Path) -> dict[int, Path]:
    """Checkpoint folders by step, oldest first."""
    # A kill between two renames leaves a checkpoint under the name of what it was about to replace.
    return dict(sorted((step_folders(checkpoints, REPLACED) | step_folders(checkpoints)).items()))


def load_checkpoint(
    path: Path,
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
) -> dict[str, Any]:
    """Restore weights, optimizer and random states, bit for bit, in place; return the saved progress.

    Everything is read and compared before anything is changed, so a refused checkpoint leaves the model as it was.
    """
    verify_checkpoint(path)
    weights = read_weights(path, model)
    optimizer_state = read_optimizer(path, model, optimizer)
    random_states = read_random_states(path, generators)
    progress = read_json(path / PROGRESS)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])
    optimizer.load_state_dict(optimizer_state)
    restore_random_states(path, random_states, generators)  # last: nothing after it may draw a number
    return progress
