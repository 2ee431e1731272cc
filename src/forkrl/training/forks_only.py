"""The forks-only backward: only some positions run with gradients, an approximation for speed (docs/forks-only.md).

A prefill without gradients caches keys, values and entropies; then the selected positions run with gradients and attend
to the cache. Log-probs equal those of the dense pass; the gradient lacks the paths through positions that do not run,
some of which ``ForksOnlyConfig`` can restore. Axes: ``B`` sequences, ``T`` token positions, ``N`` running positions,
``D`` hidden; ``H`` query heads, ``K`` key-value heads, ``C`` channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GradientCheckpointingLayer

from forkrl.errors import UserError
from forkrl.model.attention import attending_by
from forkrl.model.forward import head_stats
from forkrl.model.packing import (
    attention_windows,
    no_mask,
    pack,
    packed_attention,
    packed_hidden_states,
)
from forkrl.model.policy import Policy
from forkrl.training.selected_attention import Group, lay_out, selected_attention
from forkrl.types import TokenBatch, TokenStats


class KeysAndValues(NamedTuple):
    """Keys and values of a layer at every position, ``[B, K, T, C]`` each."""

    keys: Tensor
    values: Tensor


class Prefill(NamedTuple):
    """Keys and values of each layer, and the last hidden states of the response tokens if the pass was complete."""

    layers: dict[int, KeysAndValues]
    hidden_ND: Tensor | None

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for layer in self.layers.values() for each in layer)


def prefill(policy: Policy, batch: TokenBatch, *, to_the_end: bool, projections: bool = False) -> Prefill:
    """A forward pass that caches each layer's keys and values; without ``to_the_end`` it stops at the last layer's.

    With ``projections``, gradients flow from keys and values into their projections only.
    """
    layers: dict[int, KeysAndValues] = {}
    num_layers = policy.text_config.num_hidden_layers
    last = None if to_the_end else num_layers - 1
    packing = pack(batch)
    attend = packed_attention(packing, attention_windows(policy.text_config))

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        index: Any = module.layer_idx
        layers[index] = KeysAndValues(*map(packing.unpack_heads, (key, value)))
        if index == last:
            raise _LastKeysKnown
        return attend(module, query.detach(), key.detach(), value.detach(), *args, **kwargs)

    hidden_ND = None
    gradients = torch.set_grad_enabled(projections)
    with suppress(_LastKeysKnown), gradients, _constant_inputs(policy, projections):
        hidden_ND = packing.unpack(packed_hidden_states(policy, packing, record).detach(), batch.response_mask)
    if layers.keys() != set(range(num_layers)):
        raise ValueError(
            f"{num_layers - len(layers)} of its {num_layers} layers do not attend through the interface of "
            f"transformers; its attention is {policy.model.config._attn_implementation!r}"
        )
    return Prefill(layers, hidden_ND)


def prefill_stats(policy: Policy, batch: TokenBatch, cache: Prefill, *, temperature: float) -> TokenStats:
    """Statistics of all response tokens, fp32 ``[B, T]``, 0 elsewhere. Needs a complete prefill."""
    assert cache.hidden_ND is not None, "the pass ended early"
    with torch.no_grad():
        mask_BT = batch.response_mask
        return head_stats(policy, cache.hidden_ND, batch, mask_BT, temperature=temperature)


def compute_selected_stats(
    policy: Policy,
    batch: TokenBatch,
    selected_BT: Tensor,
    *,
    temperature: float,
    weight_BT: Tensor | None = None,
    projections: bool = False,
    cache: Prefill | None = None,
) -> TokenStats:
    """Log-prob and entropy at the selected positions, fp32 ``[B, T]``, 0 elsewhere.

    ``weight_BT`` is ``1 / p`` at positions drawn with probability ``p``, 1 at others that run, 0 elsewhere. With
    ``projections``, key and value projections get gradients at all positions; ``cache`` must be made the same way.
    """
    if projections and weight_BT is not None and bool((weight_BT > 1).any()):
        raise ValueError("projections and weights above 1 would count the same gradients twice; leave one of them out")
    if not selected_BT.any():
        nothing_BT = torch.zeros_like(batch.old_logprobs)
        return TokenStats(nothing_BT, nothing_BT)
    if cache is None:
        cache = prefill(policy, batch, to_the_end=False, projections=projections)
    running_BT = selected_BT if weight_BT is None else weight_BT > 0
    groups = lay_out(running_BT, weight_BT)
    position_1N = running_BT.nonzero()[:, 1][None]
    with attending_by(_attention_to(policy, cache, groups)):
        hidden_1ND = policy.hidden_states(
            batch.input_ids[running_BT][None],
            no_mask(policy.text_config, policy.device),
            position_ids=position_1N,
            use_cache=False,
        )
    return head_stats(policy, hidden_1ND[0, selected_BT[running_BT]], batch, selected_BT, temperature=temperature)


def require_forks_only(policy: Policy, *, projections: bool = False) -> None:
    """Raise UserError for a model with other state or custom attention, by comparing log-probs with the dense pass."""
    name = type(policy.model).__name__
    refusal = f'training.backward = "forks_only" does not fit {name}; set it to "dense"'
    ids = torch.arange(17, device=policy.device)[None] % policy.head_weight.shape[0]
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    nothing = torch.zeros_like(mask, dtype=torch.float32)
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], mask, mask, nothing, nothing, nothing[:, 0])
    selected = mask & (torch.arange(16, device=policy.device) % 3 == 0)
    try:
        stats = compute_selected_stats(policy, batch, selected, temperature=1.0, projections=projections)
        sparse = stats.logprobs.detach()[selected]
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        raise UserError(f"{refusal} ({type(error).__name__}: {error})") from error
    with torch.no_grad():
        logits = policy.logits(policy.hidden_states(batch.input_ids)[selected])
        dense = logits.log_softmax(-1).gather(-1, batch.targets[selected][:, None])[:, 0]
    if not torch.allclose(sparse, dense, rtol=0, atol=1e-3 if policy.precision == "fp32" else 0.1):
        raise UserError(f"{refusal} (its log-probs would differ by {float((sparse - dense).abs().max()):.2g})")
    if reason := policy.why_padded:
        raise UserError(f"{refusal} ({reason})")


class _LastKeysKnown(Exception):
    """Ends a forward pass early, once the last layer's keys and values are known."""


@contextmanager
def _constant_inputs(policy: Policy, wanted: bool) -> Iterator[None]:
    """If ``wanted``, detach every layer's input, so that gradients stay within a layer."""

    def detach_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}

    layers = [module for module in policy.decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if wanted and len(layers) != policy.text_config.num_hidden_layers:
        raise ValueError("transformers does not tell which of its modules are its layers")
    hooks = [layer.register_forward_pre_hook(detach_input, with_kwargs=True) for layer in layers] if wanted else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attention_to(policy: Policy, cache: Prefill, groups: list[Group]) -> Any:
    """Attention of the running positions, packed as one sequence, to the keys of their sequences."""
    windows = attention_windows(policy.text_config)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, scaling: float | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        index: Any = module.layer_idx
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        constants = cache.layers[index]
        mixed = selected_attention(query, key, value, *constants, groups, scaling=scaling, window=windows[index])
        return mixed, None

    return attention
