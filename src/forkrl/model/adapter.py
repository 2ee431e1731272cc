"""LoRA adapters (arXiv 2106.09685): linear layers compute ``W + alpha / rank * B A`` and only ``A`` and ``B`` train.

PEFT replaces the layers inside the model, which keeps its class, so that every caller of the model works as before.
A folder of an adapter holds what PEFT writes, and ``base_model.json``, which identifies the weights below it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from forkrl.errors import UserError, first_line
from forkrl.model.locations import ADAPTER_CONFIG, EMBEDDED_PREFIX, model_location

if TYPE_CHECKING:  # loads pydantic, which only recipes need
    from forkrl.config import LoraConfig, ModelConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_MODEL = "base_model.json"
_MERGE = "merge it with PEFT (merge_and_unload, save_pretrained) and set model.path to the result"
_NAME = "default"
"""PEFT's name of a model's first adapter."""
_PREFIX = "base_model.model."
"""PEFT's files name weights as its own wrapper of the model does."""


class AdapterBase(NamedTuple):
    """The model below an adapter. ``sha256``: hash of its weights."""

    path: str
    revision: str | None
    sha256: str


class AdapterLayout(NamedTuple):
    """What another program needs to compute the adapted model from its parameters.

    ``base`` and ``lora``: names of parameters by their names in the files of the base model and of PEFT.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    base: dict[str, str]
    lora: dict[str, str]


def add_adapter(model: PreTrainedModel, settings: LoraConfig, trained: ModelConfig) -> AdapterBase:
    """Freeze the model and add a new adapter, which changes nothing yet (``B`` is 0); ``A`` is drawn at random.

    Raises UserError if PEFT is missing or ``lora.targets`` names no layer.
    """
    peft = _import_peft(f"lora.rank = {settings.rank}")
    targets = _find_targets(model, settings.targets)
    location = model_location(trained.path)
    if Path(location).is_dir() and not trained.path.startswith(EMBEDDED_PREFIX):
        location = str(Path(location).resolve())
    else:
        location = trained.path
    base = AdapterBase(location, trained.revision, hash_weights(model))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path,
        revision=base.revision,
    )
    peft.inject_adapter_in_model(config, model, _NAME)
    return base


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add the adapter in ``folder`` to the weights of its base model, in place; the result is a plain model.

    Raises UserError if PEFT is missing, or if the adapter is of another model or not a LoRA.
    """
    peft = _import_peft(f"model.path = {str(folder)!r} is an adapter, which")
    config = peft.PeftConfig.from_pretrained(str(folder))
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: an adapter of type {config.peft_type.value}; ForkRL reads LoRA only: {_MERGE}"
        )
    if (folder / BASE_MODEL).is_file():
        require_base(folder, hash_weights(model))
    _require_plain(config, folder)
    peft.inject_adapter_in_model(config, model, _NAME)
    _require_own_weights(model, folder)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in read_adapter(folder, model).items():
            state[name].copy_(tensor)
        for name, layer in _adapted_layers(model).items():
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)


def _require_plain(config: Any, folder: Path) -> None:
    """Reject what merging into linear layers would not reproduce."""
    for name in ("use_dora", "lora_bias", "layer_replication", "modules_to_save", "trainable_token_indices"):
        if value := getattr(config, name, None):
            raise UserError(f"{folder / ADAPTER_CONFIG}: {name} = {value}; ForkRL reads plain LoRA only: {_MERGE}")


def _require_own_weights(model: PreTrainedModel, folder: Path) -> None:
    """Reject adapters on embeddings and on shared weights, where merging into one layer would change another."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, layer in _adapted_layers(model).items():
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding) or uses[id(base.weight)] > 1:
            raise UserError(
                f"{folder / ADAPTER_CONFIG}: an adapter on {name}, an embedding or a layer that shares its weight; "
                f"merge it into the weights with PEFT, or train one without that layer"
            )


def write_adapter(folder: Path, model: PreTrainedModel, base: AdapterBase) -> None:
    """Write the adapter as PEFT does, and the identity of its base model."""
    tensors = {file_name: parameter.detach().cpu().clone() for file_name, _, parameter in _adapter_parameters(model)}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: Any = model.peft_config[_NAME]
    # The order of a set differs between processes; a resumed run writes the same bytes.
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    _write_json(folder / ADAPTER_CONFIG, values | {"inference_mode": True})
    _write_json(folder / BASE_MODEL, base._asdict())


def read_adapter(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The saved adapter by parameter name; raises UserError if it does not fit the adapter of ``model``."""
    file = folder / ADAPTER_WEIGHTS
    try:
        saved = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({first_line(error)})") from error
    found: dict[str, Tensor] = {}
    for file_name, name, parameter in _adapter_parameters(model):
        if (tensor := saved.pop(file_name, None)) is None:
            raise UserError(f"{file}: does not fit {type(model).__name__} or {ADAPTER_CONFIG}: it has no {file_name}")
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{file}: an adapter of another base model: {file_name} is {list(tensor.shape)}, here "
                f"{list(parameter.shape)}"
            )
        found[name] = tensor
    if saved:
        raise UserError(
            f"{file}: holds {min(saved)}, which {type(model).__name__} does not have; ForkRL reads plain LoRA: {_MERGE}"
        )
    return found


def require_base(folder: Path, sha256: str) -> None:
    """Raise UserError unless the adapter in ``folder`` was trained on the weights with this hash."""
    try:
        base = AdapterBase(**json.loads((folder / BASE_MODEL).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / BASE_MODEL}: cannot be read ({first_line(error)}); restore it") from error
    if base.sha256 != sha256:
        raise UserError(
            f"{folder}: an adapter of another base model: it was trained on {base.path} with weights "
            f"{base.sha256[:12]}, these are {sha256[:12]}; restore that model"
        )


def hash_weights(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        values: Any = parameter.detach().cpu().flatten().view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the model with its adapter merged, on the CPU; the model does not change."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_of_adapter(name)}
    with torch.no_grad():
        state |= {f"{name}.base_layer.weight": linear_weight(layer) for name, layer in _adapted_layers(model).items()}
    return {name.replace(".base_layer.", "."): tensor.cpu() for name, tensor in state.items()}


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes one linear map: a plain layer, or one with an adapter."""
    base = module.base_layer if _has_adapter(module) else module
    return type(base) is nn.Linear


def linear_weight(module: Any) -> Tensor:
    """The weight of a linear layer, its adapter merged in, in the weight's own precision."""
    weight: Tensor = module.weight
    return weight + module.get_delta_weight(_NAME) if _has_adapter(module) else weight


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run the base model alone."""
    layers = _adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _import_peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{what} needs PEFT ({first_line(error)}): pip install 'forkrl[lora]'") from error
    return peft


def _find_targets(model: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """Layers by the last part of their names; the head is not one, since ForkRL reads its weight directly."""
    linear = {
        name.rpartition(".")[2]
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # of GPT-2
    }
    if names == ("all-linear",):
        return sorted(linear)
    for name in names:
        if name not in linear:
            raise UserError(
                f"lora.targets = {list(names)}: {type(model).__name__} has no layer {name!r} that can be adapted; take "
                f'"all-linear" alone, or some of {", ".join(sorted(linear))}'
            )
    return sorted(names)


def adapter_layout(model: PreTrainedModel) -> AdapterLayout | None:
    """None if the model has no adapter."""
    if not has_adapters(model):
        return None
    config: Any = model.peft_config[_NAME]
    names = [name for name, _ in model.named_parameters() if not _is_of_adapter(name)]
    return AdapterLayout(
        config.r,
        config.lora_alpha,
        tuple(sorted(config.target_modules)),
        {name.replace(".base_layer.", "."): name for name in names},
        {file_name: name for file_name, name, _ in _adapter_parameters(model)},
    )


def has_adapters(model: nn.Module) -> bool:
    return any(_has_adapter(module) for module in model.modules())


def _has_adapter(module: Any) -> bool:
    return hasattr(module, "get_delta_weight")


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if _has_adapter(module)}


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name


def _adapter_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name in PEFT's file, name in the model, and parameter."""
    for name, parameter in model.named_parameters():
        if _is_of_adapter(name):
            yield _PREFIX + name.replace(f".{_NAME}", ""), name, parameter


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
