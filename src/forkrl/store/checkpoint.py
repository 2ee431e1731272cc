"""Checkpoints that survive a kill at any instant, resume bit for bit, and cannot run code.

    checkpoints/step-20/               loads with AutoModelForCausalLM.from_pretrained
      config.json, model.safetensors, tokenizer.json, ...
      trainer/optimizer.safetensors    AdamW moments and step counts, by parameter name
      trainer/optimizer.json           learning rate and other numbers of each parameter group
      trainer/rng.safetensors          PyTorch's random states: CPU, CUDA devices, named generators
      trainer/progress.json            other state of the training loop
      manifest.json                    size and SHA-256 of all the above, written last

With LoRA ``adapter_model.safetensors``, ``adapter_config.json`` and ``base_model.json`` replace the model's files
(``model/adapter.py``); ``merged/`` is the whole model if asked for.
A checkpoint of weights only has no ``trainer/`` (``training_state.py``). A save builds and syncs the folder under a
hidden name, renames it, and then removes older ones. Hidden names tell the next save what a killed one left:
``.saving-`` is incomplete, ``.removing-`` half deleted, ``.replaced-`` a complete older checkpoint of the same step,
moved aside between two renames.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from forkrl.errors import UserError, first_line
from forkrl.model.adapter import AdapterBase, merged_state, read_adapter, require_base, write_adapter
from forkrl.model.locations import ADAPTER_CONFIG
from forkrl.store.atomic import explained_write_errors, fsync
from forkrl.store.training_state import (
    PROGRESS,
    TRAINING_FILES,
    described,
    read_json,
    read_optimizer,
    read_random_states,
    restore_random_states,
    write_exactly,
    write_training_state,
)

MANIFEST = "manifest.json"
MERGED = "merged"
FORMAT = 1

_SAVING, _REPLACED, _REMOVING = ".saving-", ".replaced-", ".removing-"
_STEP_FOLDER = re.compile(r"step-(\d+)")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_LOADABLE = {".safetensors", ".json", ".py"}  # a loader might read these; other files are the user's notes
# Entries of config.json that do not affect the model's outputs.
_NOT_THE_FUNCTION = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"
}  # fmt: skip

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
    spared: int | None = None,
    weights_only: bool = False,
    adapter: AdapterBase | None = None,
    merged: bool = False,
) -> Path:
    """Write ``checkpoints/step-N`` so that a complete checkpoint exists at every instant; only one process may write.

    Args:
        step: gradient steps done. An older checkpoint of the same step is replaced.
        optimizer: any whose state is tensors only, over parameters of ``model``.
        generators: the run's random generators by name; PyTorch's global ones are saved too.
        progress: other state of the training loop, as JSON.
        keep: checkpoints to keep, including the new one. Checkpoints of later steps are removed too.
        spared: an older step whose checkpoint, if there is one, is kept in addition.
        weights_only: write only model and tokenizer, which cannot be resumed from.
        adapter: the base model of the adapter, which alone is saved; None for a model without one.
        merged: also write the model with its adapter merged.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the new checkpoint has to stay")
    final = checkpoints / f"step-{step}"
    with explained_write_errors(final):
        with _new_folder(final) as folder:
            folder.mkdir()
            with _no_progress_bars():
                if adapter is None:
                    model.save_pretrained(folder)
                else:
                    write_adapter(folder, model, adapter)
                if merged:
                    model.save_pretrained(folder / MERGED, state_dict=merged_state(model))
                    tokenizer.save_pretrained(folder / MERGED)
            tokenizer.save_pretrained(folder)
            if not weights_only:
                write_training_state(folder, model, optimizer, generators, progress)
            _write_manifest(folder, step, weights_only=weights_only)
        _prune(checkpoints, step, keep, spared)
    return final


def adopt_weights(checkpoints: Path, step: int, saved: Path) -> Path:
    """Move a model and tokenizer to the checkpoint of ``step``, without training state; same file system required."""
    final = checkpoints / f"step-{step}"
    if not (saved / "config.json").is_file():
        raise UserError(f"{saved}: no model was written there, it has no config.json")
    with explained_write_errors(final), _new_folder(final) as folder:
        saved.rename(folder)
        _write_manifest(folder, step, weights_only=True)
    return final


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that matches its manifest (warns about others), or None; may be ``.replaced-step-N``."""
    faults: list[str] = []
    for folder in itertools.chain.from_iterable(reversed(_folders(checkpoints).values())):
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
    """Checkpoints by step, oldest first."""
    folders = {step: folder for step, (folder, *_) in _folders(checkpoints).items()}
    for folder in folders.values():
        verify_checkpoint(folder)
    return folders


def model_files(path: Path) -> list[str]:
    """The files of a checkpoint, relative to it, without its training state."""
    return [name for name in _read_manifest(path) if name not in TRAINING_FILES]


def checkpoint_of_step(checkpoints: Path, step: int) -> Path:
    folders = _folders(checkpoints)
    if step not in folders:
        available = ", ".join(f"step-{number}" for number in folders)
        raise UserError(f"{checkpoints}: no checkpoint of step {step}; available: {available or 'none'}")
    verify_checkpoint(folders[step][0])
    return folders[step][0]


def load_checkpoint(
    path: Path,
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    adapter: AdapterBase | None = None,
) -> dict[str, Any]:
    """Restore a verified checkpoint in place, bit for bit; validate everything before changing anything."""
    if adapter is None:
        weights = _read_weights(path, model)
    else:
        require_base(path, adapter.sha256)
        weights = read_adapter(path, model)
    optimizer_state = read_optimizer(path, model, optimizer)
    states = read_random_states(path, generators)
    progress = read_json(path / PROGRESS)
    here = model.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            here[name].copy_(tensor)
    optimizer.load_state_dict(optimizer_state)
    restore_random_states(path, states, generators)  # last: nothing after it may draw a random number
    return progress


def verify_checkpoint(path: Path) -> None:
    """Check that files match the manifest in name, size and SHA-256, with no others and no pickles."""
    try:
        present = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
        for name in sorted(present):
            if PurePosixPath(name).suffix in _PICKLES:
                raise UserError(
                    f"{path / name}: a pickle, which could run code; ForkRL loads only safetensors and JSON"
                )
        listed = _read_manifest(path)
        for name in sorted(present - listed.keys() - {MANIFEST}):
            if PurePosixPath(name).suffix in _LOADABLE:
                raise UserError(
                    f"{path / name}: not part of the checkpoint, its {MANIFEST} does not list it; remove it"
                )
        for name, (size, digest) in listed.items():
            _verify_file(path / name, size, digest)
    except OSError as error:
        raise UserError(f"{error.filename or path}: damaged checkpoint: cannot be read ({error.strerror})") from error


def _folders(checkpoints: Path) -> dict[int, list[Path]]:
    """Checkpoint folders by step, oldest first; ``step-N`` precedes ``.replaced-step-N``."""
    found: defaultdict[int, list[Path]] = defaultdict(list)
    for prefix in ("", _REPLACED):
        for path in checkpoints.glob(f"{prefix}step-*"):
            if match := _STEP_FOLDER.fullmatch(path.name.removeprefix(prefix)):
                found[int(match[1])].append(path)
    return dict(sorted(found.items()))


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A hidden path to build a folder at; renamed to ``final`` at the end, removed on failure."""
    checkpoints = final.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    fsync(checkpoints.parent)
    _settle(checkpoints)
    temporary = checkpoints / f"{_SAVING}{final.name}"
    try:
        yield temporary
        _swap_in(temporary, final)
    finally:
        _settle(checkpoints)


def _swap_in(temporary: Path, final: Path) -> None:
    """Rename a complete folder. A rename cannot replace a folder, so an older one is moved aside first."""
    if final.exists() or final.is_symlink():
        final.rename(final.with_name(_REPLACED + final.name))
    temporary.rename(final)
    fsync(final.parent)


def _settle(checkpoints: Path) -> None:
    """Clean up after a killed save, leaving only complete checkpoints under their own names."""
    for folder in [*checkpoints.glob(f"{_SAVING}*"), *checkpoints.glob(f"{_REMOVING}*")]:
        _delete(folder)
    for folder in checkpoints.glob(f"{_REPLACED}*"):
        final = folder.with_name(folder.name.removeprefix(_REPLACED))
        if final.exists():
            _remove(folder)
        else:
            folder.rename(final)
            fsync(checkpoints)


def _prune(checkpoints: Path, step: int, keep: int, spared: int | None) -> None:
    """Remove checkpoints of later steps, and all but ``keep`` of the others and the ``spared`` step."""
    folders = {number: folder for number, (folder, *_) in _folders(checkpoints).items()}
    later = [folder for number, folder in folders.items() if number > step]
    older = [folder for number, folder in folders.items() if number < step]
    for folder in later:
        _log.warning("%s: removed; the run went back behind it, to an older checkpoint", folder)
    kept = folders.get(spared) if spared is not None else None
    for folder in later + older[: max(0, len(older) - keep + 1)]:
        if folder != kept:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Rename first, atomically, then delete the files."""
    _delete(folder.rename(folder.with_name(_REMOVING + folder.name.removeprefix(_REPLACED))))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_manifest(folder: Path, step: int, *, weights_only: bool = False) -> None:
    """Sync every file to disk, then the manifest."""
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        fsync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "step": step, "files": files} | ({"weights_only": True} if weights_only else {})
    write_exactly(folder / MANIFEST, manifest)
    fsync(folder / MANIFEST)
    fsync(folder)


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file, by relative path."""
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(f"{path}: no checkpoint of ForkRL, or not a whole one: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_bytes())
        found, step, weights_only = manifest["format"], manifest["step"], bool(manifest.get("weights_only"))
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged checkpoint: not a manifest ({type(error).__name__}: {error})") from error
    if found != FORMAT:
        raise UserError(f"{file}: checkpoint format {found!r}, this version of ForkRL reads {FORMAT}")
    if path.name.removeprefix(_REPLACED) != f"step-{step}" and _STEP_FOLDER.fullmatch(path.name):
        raise UserError(f"{file}: damaged checkpoint: it says step {step!r} in a folder named {path.name}")
    for name in listed:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise UserError(f"{file}: damaged checkpoint: it lists {name!r}, outside the checkpoint")
    training = set() if weights_only else TRAINING_FILES
    model = {ADAPTER_CONFIG if ADAPTER_CONFIG in listed else "config.json"}
    for name in sorted((model | training) - listed.keys()):
        raise UserError(f"{file}: damaged checkpoint: it does not list {name}")
    return listed


def _verify_file(file: Path, size: int, digest: str) -> None:
    try:
        status = file.stat()
    except FileNotFoundError:
        raise UserError(f"{file}: damaged checkpoint: the file is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: damaged checkpoint: not a regular file")
    if status.st_size != size:
        raise UserError(f"{file}: damaged checkpoint: {status.st_size} bytes, the manifest says {size}")
    if (actual := _sha256(file)) != digest:
        raise UserError(f"{file}: damaged checkpoint: sha256 {actual[:12]}…, the manifest says {digest[:12]}…")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_weights(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Saved weights by ``state_dict`` name, read by ``from_pretrained`` since tied and fused weights differ on disk."""
    config, dtype = read_json(path / "config.json"), str(model.dtype).removeprefix("torch.")
    kind, here_kind = f"{config.get('model_type')} in {config.get('dtype')}", f"{model.config.model_type} in {dtype}"
    if kind != here_kind:
        raise UserError(f"{path}: checkpoint of another model: {kind}, this run trains {here_kind}")
    try:
        with _no_progress_bars():
            opened: Any = type(model).from_pretrained(
                path, dtype=model.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # a hand-made file can raise anything inside the libraries
        raise UserError(f"{path}: its weights cannot be read ({type(error).__name__}: {first_line(error)})") from error
    loaded, report = opened
    here, saved = model.state_dict(), loaded.state_dict()
    for name, tensor in here.items():
        if name not in saved or name in report["missing_keys"]:
            raise UserError(f"{path}: checkpoint of another model: it has no {name}")
        if saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            there = described(saved[name])
            raise UserError(f"{path}: checkpoint of another model: {name} is {there}, here {described(tensor)}")
    for name in sorted({*report["unexpected_keys"], *saved.keys() - here.keys()}):
        raise UserError(f"{path}: checkpoint of another model: it holds {name}, which this model lacks")
    # Weights of equal shapes can belong to another model: other heads, rotary base or tying.
    was, now = loaded.config.to_dict(), model.config.to_dict()
    for key in sorted((was.keys() | now.keys()) - _NOT_THE_FUNCTION):
        if not key.startswith("_") and was.get(key) != now.get(key):
            difference = f"its config.json has {key} = {was.get(key)!r}, here {now.get(key)!r}"
            raise UserError(f"{path}: checkpoint of another model: {difference}")
    return dict(saved)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' progress bars: the terminal shows the run's own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
