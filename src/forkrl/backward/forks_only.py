"""The forks-only way: only the selected positions run with gradients. An approximation, made for speed.

First every position runs without gradients, which leaves the keys and values of each layer. Then the selected positions
run again with gradients, as queries at their own places: their keys and values replace those of the first pass, all
others are constants. The log-probs of the selected tokens are those of the dense pass, and so is the gradient if
everything is selected; otherwise it lacks the paths that lead through the hidden states of positions not selected.

It goes through the cache interface of ``transformers`` and touches no model's code.

Shapes: ``B`` sequences, ``T`` token positions, ``S`` selected positions of the sequence with the most, ``N`` selected
positions in all, ``D`` hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from forkrl.errors import UserError
from forkrl.model import Policy
from forkrl.token_stats import token_stats
from forkrl.types import TokenBatch, TokenStats

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def compute_selected_stats(policy: Policy, batch: TokenBatch, selected_BT: Tensor, *, temperature: float) -> TokenStats:
    """Log-prob and entropy at the selected positions, fp32 ``[B, T]``, 0 elsewhere.

    Args:
        policy: gradients flow into its weights through the selected positions alone.
        batch: on the policy's device.
        selected_BT: bool, inside the response mask.
        temperature: of sampling; the statistics are of the same distribution.
    """
    place_BS, real_BS = _places(selected_BT)
    num_positions = batch.input_ids.shape[1]
    inside_BS = place_BS.clamp_max(num_positions - 1)
    masks = _masks(policy, place_BS, num_positions)
    with torch.no_grad():
        filled = DynamicCache()
        policy.hidden_states(batch.input_ids, past_key_values=filled, use_cache=True)
    hidden_BSD = policy.hidden_states(
        batch.input_ids.gather(1, inside_BS),
        masks,
        position_ids=inside_BS,
        past_key_values=_FilledCache(filled, place_BS),
        use_cache=True,
    )
    with policy.autocast():
        stats_N = token_stats(
            hidden_BSD[real_BS].to(policy.head_weight.dtype),
            policy.head_weight,
            batch.targets[selected_BT],
            temperature=temperature,
            bias=policy.head_bias,
        )
    empty_BT = hidden_BSD.new_zeros(selected_BT.shape, dtype=stats_N.logprobs.dtype)
    return TokenStats(*(empty_BT.masked_scatter(selected_BT, values_N) for values_N in stats_N))


def require_forks_only(policy: Policy) -> None:
    """Refuse a model whose log-probs are not the same by this way: one with state beside its keys and values.

    Raises:
        UserError: naming the model.
    """
    name = type(policy.model).__name__
    refusal = f'training.backward = "forks_only" does not fit {name}; set it to "dense"'
    ids = torch.arange(17, device=policy.device)[None] % policy.head_weight.shape[0]
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    nothing = torch.zeros_like(mask, dtype=torch.float32)
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], mask, mask, nothing, nothing, nothing[:, 0])
    selected = mask & (torch.arange(16, device=policy.device) % 3 == 0)
    with torch.no_grad():
        try:
            sparse = compute_selected_stats(policy, batch, selected, temperature=1.0).logprobs[selected]
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{refusal} ({type(error).__name__}: {error})") from error
        logits = policy.logits(policy.hidden_states(batch.input_ids)[selected])
        dense = logits.log_softmax(-1).gather(-1, batch.targets[selected][:, None])[:, 0]
    if not torch.allclose(sparse, dense, rtol=0, atol=1e-3 if policy.precision == "fp32" else 0.1):
        raise UserError(f"{refusal} (its log-probs would differ by {float((sparse - dense).abs().max()):.2g})")


class _FilledCache(DynamicCache):
    """Keys and values of every position, those of the given places fresh and differentiable.

    One place more than there are positions takes what pads the shorter rows of ``place_BS``.
    """

    def __init__(self, filled: DynamicCache, place_BS: Tensor) -> None:
        super().__init__()
        self._filled, self._place_BS = filled, place_BS

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self._filled.layers[layer_idx]
        return self._place(layer.keys, key_states), self._place(layer.values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def _place(self, constant: Tensor, fresh: Tensor) -> Tensor:
        index = self._place_BS[:, None, :, None].expand(-1, fresh.shape[1], -1, fresh.shape[3])
        return torch.nn.functional.pad(constant, (0, 0, 0, 1)).scatter(2, index, fresh)


def _places(selected_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The selected positions of each sequence in order, ``[B, S]``, padded with ``T``; and which are no padding."""
    longest = max(1, int(selected_BT.sum(1).max()))
    place_BS = selected_BT.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    real_BS = selected_BT.gather(1, place_BS)
    return place_BS.where(real_BS, selected_BT.shape[1]), real_BS


def _masks(policy: Policy, place_BS: Tensor, num_positions: int) -> Tensor | dict[str, Tensor]:
    """Which positions each place attends to: one mask ``[B, 1, S, T + 1]``, or one for each kind of layer.

    What pads a row stands at place ``T`` and sees the positions before it, so that its softmax is not NaN.
    """
    config = policy.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - _KNOWN_LAYERS:
        raise ValueError(f"layers of kind {min(unknown)}")
    column_T = torch.arange(num_positions + 1, device=place_BS.device)
    distance_BST = place_BS[:, :, None] - column_T
    full = ((distance_BST >= 0) & (column_T < num_positions))[:, None]
    window = getattr(config, "sliding_window", None)
    if window is None or kinds == {"full_attention"}:
        return full
    near = full & (distance_BST < window)[:, None]
    return {"full_attention": full, "sliding_attention": near} if len(kinds) > 1 else near
