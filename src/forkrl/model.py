"""Opening a causal language model: weights, tokenizer, device, and the head that token statistics read.

ForkRL never asks the model for logits. It takes the last hidden states and the output embedding, so that
``token_stats`` can work on exactly the rows it needs. A model that does more than one linear map after its last hidden
state (logit soft-capping, scaling) would be trained wrongly that way: it is recognised here by comparison and refused.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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

from forkrl.attention import use_grouped_attention
from forkrl.errors import UserError
from forkrl.types import Prompt

if TYPE_CHECKING:  # pydantic, which only reading a recipe needs
    from forkrl.config import ModelConfig

EMBEDDED_PREFIX = "embedded:"
_PROBE_LOGIT = 100.0
"""Beyond the soft caps in use (Gemma 2: 30), within the range of every precision."""


class Policy:
    """A causal language model with its tokenizer: hidden states, head weights, precision."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str = "fp32") -> None:
        use_grouped_attention(model)
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        # transformers renamed this argument; models with code of their own keep the old name.
        takes_cache = "cache" in inspect.signature(self.decoder.forward).parameters
        self._cache_argument = "cache" if takes_cache else "past_key_values"
        self._recomputed_layers = [
            module
            for module in model.modules()
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        ]

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
        decoder: nn.Module = getattr(self.model, self.model.base_model_prefix)
        return decoder

    def stop_token_ids(self, stop: Sequence[str]) -> tuple[int, ...]:
        """The ids of further stop tokens.

        Raises:
            UserError: one of them is not exactly one token of this tokenizer.
        """
        return stop_token_ids(self.tokenizer, stop)

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in the configured precision; weights stay fp32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        *,
        cache: DynamicCache | None = None,
        **options: Any,
    ) -> Tensor:
        """Last hidden states ``[B, T, D]``. The model gets all arguments unchanged.

        Args:
            input_ids_BT: token ids.
            attention_mask: one mask, or one per kind of layer.
            cache: keys and values of earlier tokens; the new ones are appended.
            options: further arguments of the model.
        """
        if cache is not None:
            options[self._cache_argument] = cache
        # transformers recomputes layers in training mode only, and then they neither use a cache nor go without
        # dropout; the policy stays in evaluation mode, and only the layers themselves are told, only for gradients.
        for layer in self._recomputed_layers:
            layer.training = torch.is_grad_enabled()
        with self.autocast():
            output = self.decoder(input_ids=input_ids_BT, attention_mask=attention_mask, **options)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits ``[N, V]`` of a few rows, with the head in the configured precision."""
        with self.autocast():
            return nn.functional.linear(hidden_ND.to(self.head_weight.dtype), self.head_weight, self.head_bias).float()


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> tuple[int, ...]:
    """As ``Policy.stop_token_ids``, where there is a tokenizer only."""
    ids = []
    for text in stop:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise UserError(f"rollout.stop: {text!r} is {len(encoded)} tokens of this tokenizer, not one")
        ids.append(encoded[0])
    return tuple(ids)


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, most: int, add_special_tokens: bool
) -> tuple[int, ...]:
    """The tokens of a prompt.

    Raises:
        UserError: there are none, or more than ``most``, the recipe's ``rollout.max_prompt_tokens``.
    """
    ids = tuple(tokenizer.encode(prompt.text, add_special_tokens=add_special_tokens))
    place = prompt.place or f"prompt {prompt.id}"
    if not ids:
        raise UserError(f"{place}: no tokens; an empty prompt cannot be continued")
    if len(ids) > most:
        raise UserError(
            f"{place}: {len(ids)} tokens, over rollout.max_prompt_tokens = {most}; raise the limit or remove the row"
        )
    return ids


def open_policy(config: ModelConfig, device: str = "auto") -> Policy:
    """Load model and tokenizer, fp32, on the device, ready to train.

    Raises:
        UserError: nothing at that path, weights that do not fit, a tokenizer without EOS, or a head that is not one
            linear map.
    """
    path = model_location(config.path)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # in a log it is noise around the lines that matter
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision)
        opened: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=config.revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever a damaged or foreign folder provokes inside the libraries
        raise UserError(f"model.path = {config.path!r} cannot be opened as a model: {first_line(error)}") from error
    model, report = opened
    if absent := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"model.path = {config.path!r}: its weights lack {absent[0]}; download or save the model anew")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.path!r} has no EOS token, so no response could ever end; "
            f'set "eos_token" in its tokenizer_config.json'
        )
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model, True)
        model.disable_input_require_grads()  # that is for adapters; its hook is of a kind that cannot be pickled
    model.eval()
    torch.nn.Module.to(model, pick_device(device))
    policy = Policy(model, tokenizer, config.precision)
    require_linear_head(policy, config.path)
    return policy


def set_gradient_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Recompute the layers' activations in the backward pass, or keep them."""
    switch = f"checkpointing_{'enable' if enabled else 'disable'}"
    # Renamed in transformers 5.24, where the old name warns.
    renamed = getattr(model, f"activation_{switch}", None)
    (renamed or getattr(model, f"gradient_{switch}"))()


def model_location(path: str) -> str:
    """The folder or hub id behind ``model.path``."""
    if path.startswith(EMBEDDED_PREFIX):
        folder = resources.files("forkrl") / "assets" / path.removeprefix(EMBEDDED_PREFIX)
        if not folder.is_dir():
            names = sorted(entry.name for entry in (resources.files("forkrl") / "assets").iterdir() if entry.is_dir())
            raise UserError(f"model.path = {path!r}: no such embedded model; there is {', '.join(names)}")
        return str(folder)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise UserError(f"model.path = {path!r}: no such folder")
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


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


def first_line(error: BaseException) -> str:
    """The first line of an error, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def require_linear_head(policy: Policy, path: str) -> None:
    """Refuse models whose logits are not ``hidden @ weight.T + bias``: ours would silently differ from theirs.

    The last hidden states are scaled up until the logits are large: near zero a soft cap is hardly felt.
    """
    ids = torch.arange(4, device=policy.device)[None] % policy.head_weight.shape[0]
    mask = torch.ones_like(ids)
    hidden_TD = policy.hidden_states(ids, mask)[0]
    largest = float(policy.logits(hidden_TD).abs().max())
    if not math.isfinite(largest):
        raise UserError(f"model.path = {path!r}: its logits are NaN or infinite; the weights are damaged")
    scale = _PROBE_LOGIT / max(largest, 1e-6)

    def enlarge(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * scale
        return output

    with policy.decoder.register_forward_hook(enlarge), policy.autocast():
        expected = policy.model(input_ids=ids, attention_mask=mask).logits[0].float()
    actual = policy.logits(hidden_TD * scale)
    tolerance = 1e-3 if policy.precision == "fp32" else 5e-2
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise UserError(
            f"model.path = {path!r}: {type(policy.model).__name__} transforms its logits after the output embedding "
            f"(soft-capping or scaling), which ForkRL does not reproduce; training would be wrong, so it is refused"
        )
