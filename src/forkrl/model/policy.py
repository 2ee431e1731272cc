"""Opens a causal language model: weights, tokenizer, device and head.

ForkRL uses the last hidden states and the output embedding instead of logits, so that ``token_stats`` computes only the
rows it needs. ``support.py`` rejects models for which that is wrong.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]  # public, but not in its __all__
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GradientCheckpointingLayer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from forkrl.errors import UserError, first_line
from forkrl.head import why_no_triton
from forkrl.model.adapter import AdapterBase, adapter_off, merge_adapter
from forkrl.model.attention import use_grouped_attention
from forkrl.model.locations import adapter_base, model_location
from forkrl.model.packing import keep_attention, why_not_packed
from forkrl.model.products import decoding_product
from forkrl.model.stop_tokens import stop_token_ids
from forkrl.model.support import require_no_adapter, require_supported

if TYPE_CHECKING:  # loads pydantic, which only recipes need
    from forkrl.config import ModelConfig


class Policy:
    """A causal language model with its tokenizer: hidden states, head weights, precision."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        precision: str = "fp32",
        head: str = "auto",
    ) -> None:
        use_grouped_attention(model)
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        self.head = head  # backend of token_stats
        self.adapter: AdapterBase | None = None
        """What is below the adapter that is trained, if one is."""
        # transformers renamed this argument; models with custom code keep the old name.
        takes_cache = "cache" in inspect.signature(self.decoder.forward).parameters
        self._cache_argument = "cache" if takes_cache else "past_key_values"
        self._recomputed_layers = [
            module
            for module in model.modules()
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        ]
        if self._recomputed_layers:
            _remove_dropout(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head_weight(self) -> Tensor:
        """Output embedding, ``[V, D]``."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def head_bias(self) -> Tensor | None:
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: token ids to hidden states."""
        decoder: nn.Module = self.model.get_decoder()
        return decoder

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder."""
        return self.model.config.get_text_config()

    @functools.cached_property
    def why_padded(self) -> str:
        """Why updates must pad sequences instead of packing them (``packing.py``); empty if they pack."""
        return why_not_packed(self)

    @functools.cached_property
    def packs(self) -> bool:
        return not self.why_padded

    def stop_token_ids(self, stop: Sequence[str] = ()) -> tuple[int, ...]:
        return stop_token_ids(self.tokenizer, self.model.generation_config, stop)

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in the configured precision; weights stay fp32."""
        # Without a backward, converted weights are used once: the cache would hold them all until the pass ends.
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bf16",
            cache_enabled=torch.is_grad_enabled(),
        )

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        *,
        cache: DynamicCache | None = None,
        **options: Any,
    ) -> Tensor:
        """Last hidden states ``[B, T, D]``; appends to ``cache``. ``attention_mask``: one, or one per kind of layer."""
        if cache is not None:
            options[self._cache_argument] = cache
        # transformers recomputes layers only in training mode, which disables the cache. So only these layers switch to
        # it, and only when gradients are computed.
        for layer in self._recomputed_layers:
            layer.training = torch.is_grad_enabled()
        with self.autocast():
            output = self.decoder(input_ids=input_ids_BT, attention_mask=attention_mask, **options)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def head_in_precision(self) -> Callable[[Tensor], Tensor]:
        """Hidden states ``[N, D]`` to logits ``[N, V]`` in the configured precision, for many calls between updates.

        Converts the head's weights once, where :meth:`logits` does at every call.
        """
        dtype = torch.bfloat16 if self.precision == "bf16" else self.head_weight.dtype
        weight, bias = self.head_weight.to(dtype), None if self.head_bias is None else self.head_bias.to(dtype)
        return lambda hidden_ND: decoding_product(hidden_ND.to(dtype), weight, bias)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits ``[N, V]``; the head runs in the configured precision."""
        with self.autocast():
            return nn.functional.linear(hidden_ND.to(self.head_weight.dtype), self.head_weight, self.head_bias).float()


class PolicyWithoutAdapter(Policy):
    """The base model of a policy with an adapter, from the same weights."""

    def hidden_states(self, *args: Any, **options: Any) -> Tensor:
        with adapter_off(self.model):
            return super().hidden_states(*args, **options)


def _remove_dropout(model: PreTrainedModel) -> None:
    """Layers that are recomputed run in training mode, where they would drop."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)


def require_positions(model_config: Any, prompt_tokens: int, response_tokens: int) -> None:
    """Reject lengths beyond the model's positions, which would fail late or produce nonsense."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and prompt_tokens + response_tokens > positions:
        left = positions - prompt_tokens
        remedy = f"set it to {left} or less" if left > 0 else "leave out such prompts or use another model"
        raise UserError(
            f"rollout.max_response_tokens = {response_tokens} after a prompt of {prompt_tokens} tokens is more "
            f"than the {positions} positions of the model; {remedy}"
        )


def open_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises UserError if it cannot be used."""
    path = model_location(config.path)
    if (base := _below_adapter(config, path)) is not None:
        return open_tokenizer(base)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(
            f"model.path = {config.path!r} cannot be opened as a model: the folder has no config.json; name one that "
            f"save_pretrained wrote"
        )
    with _explained(config.path):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, revision=config.revision)
    if not tokenizer.encode("1 2", add_special_tokens=False):  # transformers returns an empty one without files
        raise UserError(
            f"model.path = {config.path!r} has no tokenizer; save the model's there: tokenizer.save_pretrained(FOLDER)"
        )
    return tokenizer


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged or incompatible folder can raise any exception
        raise UserError(f"model.path = {path!r} cannot be opened as a model: {first_line(error)}") from error


def open_policy(config: ModelConfig, device: str = "auto") -> Policy:
    """Load model (fp32, on the device) and tokenizer; raises UserError if they cannot be used."""
    if config.head == "triton" and (reason := why_no_triton(pick_device(device))):
        raise UserError(f'model.head = "triton": {reason}; set model.head=chunked, or drop it')
    tokenizer = open_tokenizer(config)
    transformers_logging.disable_progress_bar()  # for reading weights
    if sys.stderr.isatty():
        enable_progress_bars()  # the line above also disables the hub's, for downloads
    with _explained(config.path):
        model = _load_weights(config)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.path!r} has no EOS token, so no response could ever end; "
            f'set "eos_token" in its tokenizer_config.json'
        )
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model, True)
        model.disable_input_require_grads()  # only adapters need it, and its hook cannot be pickled
    model.eval()
    torch.nn.Module.to(model, pick_device(device))
    policy = Policy(model, tokenizer, config.precision, config.head)
    require_supported(policy, config.path)
    return policy


def _load_weights(config: ModelConfig) -> PreTrainedModel:
    """The model, with the adapters of its folder merged."""
    path = model_location(config.path)
    if (base := _below_adapter(config, path)) is not None:
        return merge_adapter(_load_weights(base), Path(path))
    require_no_adapter(path, config.revision, config.path)
    opened: Any = AutoModelForCausalLM.from_pretrained(
        path, revision=config.revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    model: PreTrainedModel = opened[0]
    if absent := sorted(opened[1]["missing_keys"]):  # transformers initialises them randomly
        raise UserError(f"model.path = {config.path!r}: its weights lack {absent[0]}; download or save the model again")
    return model


def _below_adapter(config: ModelConfig, location: str) -> ModelConfig | None:
    """The base model if ``location`` is the folder of an adapter."""
    if (base := adapter_base(location)) is None:
        return None
    path, revision = base
    return config.model_copy(update={"path": path, "revision": revision})


def set_gradient_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    switch = f"checkpointing_{'enable' if enabled else 'disable'}"
    # Renamed in transformers 5.24, where the old name warns.
    change = getattr(model, f"activation_{switch}", None) or getattr(model, f"gradient_{switch}")
    change(*([{"use_reentrant": False, "context_fn": keep_attention}] if enabled else []))


def pick_device(name: str) -> torch.device:
    """The configured device, or the first accelerator, or the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"runtime.device = {name!r} is not usable here: {first_line(error)}") from None
    return device
