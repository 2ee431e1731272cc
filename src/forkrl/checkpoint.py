"""Checkpoints that survive a kill at any instant, resume to the bit, and cannot run code.

    checkpoints/step-20/                 loads with AutoModelForCausalLM.from_pretrained
        config.json, model.safetensors, tokenizer.json, ...
        trainer/optimizer.safetensors    AdamW moments and step counts, by parameter name
        trainer/optimizer.json           learning rate and the other numbers of every parameter group
        trainer/rng.safetensors          PyTorch's random states: CPU, every CUDA device, every named generator
        trainer/progress.json            whatever the loop needs to go on
        manifest.json                    size and SHA-256 of all the above, written last

A save builds the whole folder under a hidden name, syncs it, and renames it; only then do older ones go. Hidden names
tell a later save what a killed one was doing: ``.saving-`` is unfinished, ``.removing-`` is half gone, and
``.replaced-`` is the older of two checkpoints of one step, whole, moved aside for the moment between two renames.

Saving is synchronous: when ``save_checkpoint`` returns, nothing on the disk refers to live weights any more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from forkrl.atomic import explained_write_errors, fsync
from forkrl.errors import UserError

MANIFEST = "manifest.json"
OPTIMIZER_TENSORS = "trainer/optimizer.safetensors"
OPTIMIZER_GROUPS = "trainer/optimizer.json"
RANDOM_STATES = "trainer/rng.safetensors"
PROGRESS = "trainer/progress.json"
FORMAT = 1

_SAVING, _REPLACED, _REMOVING = ".saving-", ".replaced-", ".removing-"
_STEP_FOLDER = re.compile(r"step-(\d+)")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_LOADABLE = {".safetensors", ".json", ".py"}  # what a loader might pick up unasked; anything else is a note
# Entries of config.json that leave the model's function alone.
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
) -> Path:
    """Write ``checkpoints/step-N`` so that at every instant the newest whole checkpoint can be found.

    Args:
        checkpoints: Folder of all checkpoints of the run; one process at a time writes to it.
        step: Gradient steps done. An older checkpoint of the same step is replaced.
        optimizer: AdamW or any other whose state is tensors only, over parameters of ``model``.
        generators: The run's random generators by name; PyTorch's global ones are saved besides.
        progress: What else the loop needs to go on, as JSON can hold it.
        keep: Checkpoints to leave, the new one included. Older ones go once it is durable, and so do those of later
            steps: the run went back behind them, because they were damaged.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: the disk is full or refuses. Every older checkpoint is intact, and nothing half-written stays.
        ValueError: ``keep`` below 1, or a number in ``progress`` that is not finite.
        TypeError: an optimizer state or ``progress`` that safetensors and JSON cannot hold.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the new checkpoint has to stay")
    final, temporary = checkpoints / f"step-{step}", checkpoints / f"{_SAVING}step-{step}"
    with explained_write_errors(final):
        checkpoints.mkdir(parents=True, exist_ok=True)
        fsync(checkpoints.parent)
        _settle(checkpoints)
        try:
            temporary.mkdir()
            with _no_progress_bars():
                model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "trainer").mkdir()
            _write_optimizer(temporary, model, optimizer)
            save_file(_random_states(generators), temporary / RANDOM_STATES)
            _write_json(temporary / PROGRESS, dict(progress))
            _write_manifest(temporary, step)
            _swap_in(temporary, final)
        finally:
            _settle(checkpoints)
        _prune(checkpoints, step, keep)
    return final


def adopt_weights(checkpoints: Path, step: int, saved: Path) -> Path:
    """Make a folder with a model and its tokenizer, written by another program, the checkpoint of ``step``.

    It has weights alone: it loads as any model, and training cannot go on from it.

    Args:
        checkpoints: Folder of all checkpoints of the run, on the same file system as ``saved``.
        step: Of the run. An older checkpoint of the same step is replaced.
        saved: The folder; it is gone afterwards.

    Raises:
        UserError: the disk is full or refuses; ``saved`` holds no model.
    """
    final, temporary = checkpoints / f"step-{step}", checkpoints / f"{_SAVING}step-{step}"
    if not (saved / "config.json").is_file():
        raise UserError(f"{saved}: no model was written there, it has no config.json")
    with explained_write_errors(final):
        checkpoints.mkdir(parents=True, exist_ok=True)
        _settle(checkpoints)
        try:
            saved.rename(temporary)
            _write_manifest(temporary, step, weights_only=True)
            _swap_in(temporary, final)
        finally:
            _settle(checkpoints)
    return final


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose every file is what its manifest says, or None if there is none at all.

    A damaged one is named in a warning, and the next older is tried. The step is told by what ``load_checkpoint``
    returns, not by the folder's name: after a kill between two renames, that is ``.replaced-step-N``.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    faults: list[str] = []
    for folder in _candidates(checkpoints):
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
    """Every checkpoint by its step, oldest first.

    Raises:
        UserError: a file of one is missing or damaged.
    """
    # A kill between two renames leaves a checkpoint under the name of what it was about to replace.
    folders = dict(sorted((_step_folders(checkpoints, _REPLACED) | _step_folders(checkpoints)).items()))
    for folder in folders.values():
        verify_checkpoint(folder)
    return folders


def load_checkpoint(
    path: Path,
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
) -> dict[str, Any]:
    """Restore weights, optimizer and random states, bit for bit, in place; return the saved progress.

    Everything is read and compared before anything is changed, so a refused checkpoint leaves the model as it was.

    Raises:
        UserError: a file is damaged, missing or a pickle, or the checkpoint is of another model, optimizer or set of
            generators; the message names the file or the tensor.
    """
    verify_checkpoint(path)
    weights = _read_weights(path, model)
    optimizer_state = _read_optimizer(path, model, optimizer)
    random_states = _read_random_states(path, generators)
    progress = _read_json(path / PROGRESS)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])
    optimizer.load_state_dict(optimizer_state)
    _restore_random_states(path, random_states, generators)  # last: nothing after it may draw a number
    return progress


def verify_checkpoint(path: Path) -> None:
    """Check every file against the manifest: present, no other, same size, same SHA-256; and no pickle anywhere.

    Raises:
        UserError: naming the file, what was found and what the manifest says.
    """
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


# -- Writing ---------------------------------------------------------------------------------------------------------


def _write_optimizer(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Tensors by ``key/parameter`` name, everything else of the groups as JSON."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}, not as a tensor")
            tensors[f"{key}/{names[id(parameter)]}"] = value.contiguous()
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    save_file(tensors, folder / OPTIMIZER_TENSORS)
    _write_json(folder / OPTIMIZER_GROUPS, {"class": type(optimizer).__name__, "param_groups": groups})


def _random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    states = {"torch/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"torch/cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states | {f"generator/{name}": generator.get_state() for name, generator in generators.items()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def _write_manifest(folder: Path, step: int, *, weights_only: bool = False) -> None:
    """Put every file on the disk, and then the list of them."""
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        fsync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "step": step, "files": files} | ({"weights_only": True} if weights_only else {})
    _write_json(folder / MANIFEST, manifest)
    fsync(folder / MANIFEST)
    fsync(folder)


def _swap_in(temporary: Path, final: Path) -> None:
    """Give a complete folder its name. A folder cannot be renamed over another, so an older one steps aside first."""
    if final.exists() or final.is_symlink():
        final.rename(final.with_name(_REPLACED + final.name))
    temporary.rename(final)
    fsync(final.parent)


def _settle(checkpoints: Path) -> None:
    """Clear away what a save left half-done, so that only whole checkpoints under their own names remain."""
    for folder in [*checkpoints.glob(f"{_SAVING}*"), *checkpoints.glob(f"{_REMOVING}*")]:
        _delete(folder)
    for folder in checkpoints.glob(f"{_REPLACED}*"):
        final = folder.with_name(folder.name.removeprefix(_REPLACED))
        if final.exists():
            _remove(folder)
        else:
            folder.rename(final)
            fsync(checkpoints)


def _prune(checkpoints: Path, step: int, keep: int) -> None:
    steps = _step_folders(checkpoints)
    later = [folder for number, folder in steps.items() if number > step]
    older = [folder for number, folder in sorted(steps.items(), reverse=True) if number < step]
    for folder in later:
        _log.warning("%s: removed; the run went back behind it, to an older checkpoint", folder)
    for folder in later + older[keep - 1 :]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Take a checkpoint away: first its name, in one instant, then its files."""
    _delete(folder.rename(folder.with_name(_REMOVING + folder.name.removeprefix(_REPLACED))))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# -- Finding and verifying -------------------------------------------------------------------------------------------


def _step_folders(checkpoints: Path, prefix: str = "") -> dict[int, Path]:
    names = {path.name.removeprefix(prefix): path for path in checkpoints.glob(f"{prefix}step-*")}
    return {int(match[1]): path for name, path in names.items() if (match := _STEP_FOLDER.fullmatch(name))}


def _candidates(checkpoints: Path) -> list[Path]:
    """Whole checkpoints as far as names tell, newest first."""
    named, aside = _step_folders(checkpoints), _step_folders(checkpoints, _REPLACED)
    ranked = [(step, 1, path) for step, path in named.items()] + [(step, 0, path) for step, path in aside.items()]
    return [path for *_, path in sorted(ranked, reverse=True)]


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file, by its path relative to the checkpoint."""
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
    training = set() if weights_only else {OPTIMIZER_TENSORS, OPTIMIZER_GROUPS, RANDOM_STATES, PROGRESS}
    for name in sorted(({"config.json"} | training) - listed.keys()):
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


# -- Reading ---------------------------------------------------------------------------------------------------------


def _read_weights(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The saved weights under the names of ``model.state_dict()``.

    They go through ``from_pretrained``, because file and module need not agree on names: tied weights are stored once,
    and mixture-of-experts models are fused in memory and split on the disk.
    """
    config, dtype = _read_json(path / "config.json"), str(model.dtype).removeprefix("torch.")
    kind, here_kind = f"{config.get('model_type')} in {config.get('dtype')}", f"{model.config.model_type} in {dtype}"
    if kind != here_kind:
        raise UserError(f"{path}: checkpoint of another model: {kind}, this run trains {here_kind}")
    try:
        with _no_progress_bars():
            opened: Any = type(model).from_pretrained(
                path, dtype=model.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever a hand-made file provokes inside the libraries
        raise UserError(f"{path}: its weights cannot be read ({type(error).__name__}: {_first_line(error)})") from error
    loaded, report = opened
    here, saved = model.state_dict(), loaded.state_dict()
    for name, tensor in here.items():
        if name not in saved or name in report["missing_keys"]:
            raise UserError(f"{path}: checkpoint of another model: it has no {name}")
        if saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            there = _described(saved[name])
            raise UserError(f"{path}: checkpoint of another model: {name} is {there}, here {_described(tensor)}")
    for name in sorted({*report["unexpected_keys"], *saved.keys() - here.keys()}):
        raise UserError(f"{path}: checkpoint of another model: it holds {name}, which this model lacks")
    _require_same_function(path, loaded.config.to_dict(), model.config.to_dict())
    return dict(saved)


def _require_same_function(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Weights of the same shapes can still be another model: other heads, another rotary base, tied or not."""
    for key in sorted((there.keys() | here.keys()) - _NOT_THE_FUNCTION):
        if not key.startswith("_") and there.get(key) != here.get(key):
            was, now = there.get(key), here.get(key)
            raise UserError(f"{path}: checkpoint of another model: its config.json has {key} = {was!r}, here {now!r}")


def _read_optimizer(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A dict for ``optimizer.load_state_dict``, whose parameters are numbered in the order of the groups."""
    file = path / OPTIMIZER_GROUPS
    saved, tensors = _read_json(file), _read_tensors(path / OPTIMIZER_TENSORS)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = {names[id(parameter)]: index for index, parameter in enumerate(parameters)}
    here = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    try:
        there, kind = [list(group["params"]) for group in saved["param_groups"]], saved["class"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as parameter groups ({type(error).__name__}: {error})") from error
    if kind != type(optimizer).__name__:
        raise UserError(f"{file}: checkpoint of another optimizer: {kind}, this run uses {type(optimizer).__name__}")
    if there != here:
        raise UserError(
            f"{file}: checkpoint of another model or optimizer: groups of {list(map(len, there))} parameters, "
            f"here {list(map(len, here))}; first difference: {_first_difference(there, here)}"
        )
    state: dict[int, dict[str, Tensor]] = {}
    for label, tensor in tensors.items():
        key, _, name = label.partition("/")
        if name not in order or (tensor.dim() and tensor.shape != parameters[order[name]].shape):
            raise UserError(f"{path / OPTIMIZER_TENSORS}: checkpoint of another model: {label} is {_described(tensor)}")
        state.setdefault(order[name], {})[key] = tensor
    groups = []
    for current, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        values = {key: tuple(value) if isinstance(current.get(key), tuple) else value for key, value in group.items()}
        groups.append({**values, "params": [order[name] for name in group["params"]]})
    return {"state": state, "param_groups": groups}


def _read_random_states(path: Path, generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    file = path / RANDOM_STATES
    states = _read_tensors(file)
    there = {label.partition("/")[2] for label in states if label.startswith("generator/")}
    if there != set(generators):
        raise UserError(f"{file}: random generators {sorted(there)}, this run has {sorted(generators)}")
    for name, generator in generators.items():
        if states[f"generator/{name}"].shape != generator.get_state().shape:
            raise UserError(
                f"{file}: random generator {name!r} lived on another kind of device than {generator.device}; "
                f"resume where the run was started"
            )
    if "torch/cpu" not in states:
        raise UserError(f"{file}: no random state of the CPU")
    return states


def _restore_random_states(path: Path, states: Mapping[str, Tensor], generators: Mapping[str, torch.Generator]) -> None:
    for name, generator in generators.items():
        generator.set_state(states[f"generator/{name}"])
    torch.set_rng_state(states["torch/cpu"])
    saved = {label for label in states if label.startswith("torch/cuda:")}
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(saved) > devices:
        _log.warning(
            "%s: saved with %d CUDA devices, here are %d: no longer the same run to the bit", path, len(saved), devices
        )
    for index in range(min(devices, len(saved))):
        torch.cuda.set_rng_state(states[f"torch/cuda:{index}"], index)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({_first_line(error)})") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({_first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object")
    return value


def _first_difference(there: list[list[str]], here: list[list[str]]) -> str:
    flat = itertools.chain.from_iterable
    pairs = itertools.zip_longest(flat(there), flat(here), fillvalue="nothing")
    return next((f"{a} there, {b} here" for a, b in pairs if a != b), "where one group ends")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars over shards: the terminal belongs to the run's own progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
