"""What a checkpoint holds, as files and back, bit for bit: weights, optimizer, random states."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from forkrl.errors import UserError, first_line
from forkrl.store.checkpoint.files import read_json, read_tensors, write_json
from forkrl.store.checkpoint.manifest import OPTIMIZER_GROUPS, OPTIMIZER_TENSORS, RANDOM_STATES

# Entries of config.json that leave the model's function alone.
_NOT_THE_FUNCTION = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"
}  # fmt: skip

_log = logging.getLogger("forkrl")


def read_weights(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The saved weights under the names of ``model.state_dict()``.

    They go through ``from_pretrained``, because file and module need not agree on names: tied weights are stored once,
    and mixture-of-experts models are fused in memory and split on the disk.
    """
    config, dtype = read_json(path / "config.json"), str(model.dtype).removeprefix("torch.")
    kind, here_kind = f"{config.get('model_type')} in {config.get('dtype')}", f"{model.config.model_type} in {dtype}"
    if kind != here_kind:
        raise UserError(f"{path}: checkpoint of another model: {kind}, this run trains {here_kind}")
    try:
        with no_progress_bars():
            opened: Any = type(model).from_pretrained(
                path, dtype=model.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever a hand-made file provokes inside the libraries
        raise UserError(f"{path}: its weights cannot be read ({type(error).__name__}: {first_line(error)})") from error
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


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars over shards: the terminal belongs to the run's own progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def write_optimizer(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
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
    write_json(folder / OPTIMIZER_GROUPS, {"class": type(optimizer).__name__, "param_groups": groups})


def read_optimizer(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A dict for ``optimizer.load_state_dict``, whose parameters are numbered in the order of the groups."""
    file = path / OPTIMIZER_GROUPS
    saved, tensors = read_json(file), read_tensors(path / OPTIMIZER_TENSORS)
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


def _first_difference(there: list[list[str]], here: list[list[str]]) -> str:
    flat = itertools.chain.from_iterable
    pairs = itertools.zip_longest(flat(there), flat(here), fillvalue="nothing")
    return next((f"{a} there, {b} here" for a, b in pairs if a != b), "where one group ends")


def random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    """PyTorch's own random states and those of the run's generators."""
    states = {"torch/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"torch/cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states | {f"generator/{name}": generator.get_state() for name, generator in generators.items()}


def read_random_states(path: Path, generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    """The saved states, once they are found to be for these generators; nothing is set yet."""
    file = path / RANDOM_STATES
    states = read_tensors(file)
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


def restore_random_states(path: Path, states: Mapping[str, Tensor], generators: Mapping[str, torch.Generator]) -> None:
    """Set every generator to what was saved; where there are fewer CUDA devices than then, say so."""
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


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
