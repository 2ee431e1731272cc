"""The state of training in a checkpoint's ``trainer/``: optimizer, random generators, progress. No pickles."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from forkrl.errors import UserError, first_line

OPTIMIZER_TENSORS = "trainer/optimizer.safetensors"
OPTIMIZER_GROUPS = "trainer/optimizer.json"
RANDOM_STATES = "trainer/rng.safetensors"
PROGRESS = "trainer/progress.json"
TRAINING_FILES = {OPTIMIZER_TENSORS, OPTIMIZER_GROUPS, RANDOM_STATES, PROGRESS}

_log = logging.getLogger("forkrl")


def write_training_state(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    progress: Mapping[str, Any],
) -> None:
    (folder / "trainer").mkdir()
    save_file(_optimizer_tensors(model, optimizer), folder / OPTIMIZER_TENSORS)
    write_exactly(folder / OPTIMIZER_GROUPS, _optimizer_groups(model, optimizer))
    save_file(_random_states(generators), folder / RANDOM_STATES)
    write_exactly(folder / PROGRESS, dict(progress))


def write_exactly(path: Path, value: dict[str, Any]) -> None:
    """Raises ValueError for NaN and infinity: null would change the resumed values."""
    path.write_text(json.dumps(value, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object")
    return value


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({first_line(error)})") from error


def _optimizer_groups(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [names[id(each)] for each in group["params"]]} for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "param_groups": groups}


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by ``key/parameter``."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}, not as a tensor")
            tensors[f"{key}/{name}"] = value.contiguous()
    return tensors


def read_optimizer(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A dict for ``optimizer.load_state_dict``, which matches parameters by their order in the groups."""
    file, tensors = path / OPTIMIZER_GROUPS, _read_tensors(path / OPTIMIZER_TENSORS)
    saved, current = read_json(file), _optimizer_groups(model, optimizer)
    here = [group["params"] for group in current["param_groups"]]
    try:
        there, kind = [list(group["params"]) for group in saved["param_groups"]], saved["class"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as parameter groups ({type(error).__name__}: {error})") from error
    if kind != current["class"]:
        raise UserError(f"{file}: checkpoint of another optimizer: {kind}, this run uses {current['class']}")
    if there != here:
        raise UserError(
            f"{file}: checkpoint of another model or optimizer: groups of {list(map(len, there))} parameters, "
            f"here {list(map(len, here))}; first difference: {_first_difference(there, here)}"
        )
    names = set(itertools.chain(*here))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name in names}
    state: dict[str, dict[str, Tensor]] = {}
    for label, tensor in tensors.items():
        key, _, name = label.partition("/")
        if name not in shapes or (tensor.dim() and tensor.shape != shapes[name]):
            raise UserError(f"{path / OPTIMIZER_TENSORS}: checkpoint of another model: {label} is {described(tensor)}")
        state.setdefault(name, {})[key] = tensor
    groups = [
        {key: tuple(value) if isinstance(now.get(key), tuple) else value for key, value in group.items()}
        for now, group in zip(current["param_groups"], saved["param_groups"], strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _first_difference(there: list[list[str]], here: list[list[str]]) -> str:
    flat = itertools.chain.from_iterable
    pairs = itertools.zip_longest(flat(there), flat(here), fillvalue="nothing")
    return next((f"{a} there, {b} here" for a, b in pairs if a != b), "where one group ends")


def _random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    states = {"torch/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"torch/cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states | {f"generator/{name}": generator.get_state() for name, generator in generators.items()}


def read_random_states(path: Path, generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    """The saved states, checked against these generators; nothing is set yet."""
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


def restore_random_states(path: Path, states: Mapping[str, Tensor], generators: Mapping[str, torch.Generator]) -> None:
    for name, generator in generators.items():
        generator.set_state(states[f"generator/{name}"])
    torch.set_rng_state(states["torch/cpu"])
    saved = sum(label.startswith("torch/cuda:") for label in states)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved > devices:
        _log.warning(
            "%s: saved with %d CUDA devices, here are %d: no longer the same run to the bit", path, saved, devices
        )
    for index in range(min(devices, saved)):
        torch.cuda.set_rng_state(states[f"torch/cuda:{index}"], index)


def described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
