"""Attention for all models: PyTorch's, except for decoding one token with grouped queries.

``transformers`` copies the whole cache at every token to repeat keys and values per query head, which on a CPU costs
eight times as much as the attention. Here the query heads that share keys take the place of a query sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "forkrl_sdpa"
Attention = Callable[..., tuple[Tensor, None]]
"""``(module, query, key, value, attention_mask, dropout=, scaling=, **kwargs)``, as ``transformers`` calls it."""
LEAST_TRANSPOSED = 48
"""Tokens from which the transposed product with the values is faster, given a cache that stores time last."""
sdpa_attention: Attention = AttentionInterface()["sdpa"]
_stand_in: ContextVar[Attention | None] = ContextVar("stand_in", default=None)


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Use this attention in models that use PyTorch's; other models are unchanged."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


@contextmanager
def attending_by(attention: Attention) -> Iterator[None]:
    """Inside the context, every layer of these models uses ``attention`` instead."""
    token = _stand_in.set(attention)
    try:
        yield
    finally:
        _stand_in.reset(token)


def current_attention() -> Attention:
    return _stand_in.get() or grouped_attention


def attend(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Called by ``transformers`` in each layer."""
    return current_attention()(module, *args, **kwargs)


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention ``[S, T, heads, head_dim]`` of query ``[S, heads, T, head_dim]``, equal to "sdpa"."""
    num_sequences, num_heads, length, head_dim = query.shape
    shared_by = num_heads // key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    with precise_on_cpu(query.device):
        if query.device.type == "cpu":
            query, key, value = map(attention_dtype, (query, key, value))
        if length > 1 or shared_by == 1 or not one_mask:
            return sdpa_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        grouped = query.reshape(num_sequences, key.shape[1], shared_by, head_dim)
        mixed = attend_one_token(grouped, key, value, attention_mask, scaling or head_dim**-0.5, dropout)
    return mixed.reshape(num_sequences, 1, num_heads, -1), None


def attention_dtype(each: Tensor) -> Tensor:
    """Attention precision: at least fp32 on a CPU, else autocast's if enabled."""
    device = each.device.type
    if device == "cpu":
        return each.to(torch.promote_types(each.dtype, torch.float32))
    return each.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else each


def precise_on_cpu(device: torch.device) -> AbstractContextManager[None]:
    """Disable autocast on CPUs, where PyTorch's attention backward takes four times as long in bf16."""
    return torch.autocast("cpu", enabled=False) if device.type == "cpu" else nullcontext()


def attend_one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Attention of one new token's queries to all keys, in the shape of ``query``.

    Args:
        query: ``[S, kv_heads, shared_by, head_dim]``: the query heads that share each key head.
        key, value: ``[S, kv_heads, T, head_dim]``.
        mask: ``[S, 1, 1, T]``: bool (True: visible), or floating, added to the scores; None: all visible.
    """
    if query.device.type != "cpu" or key.dtype != torch.float32 or dropout:
        return torch.nn.functional.scaled_dot_product_attention(
            query.to(value.dtype), key.to(value.dtype), value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    weights = torch.softmax(scores, dim=-1)
    if value.shape[2] < LEAST_TRANSPOSED or value.stride(2) != 1:
        return torch.matmul(weights, value)
    return torch.matmul(value.transpose(-1, -2), weights.transpose(-1, -2)).transpose(-1, -2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
