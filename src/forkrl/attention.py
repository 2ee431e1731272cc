"""Attention for decoding with grouped queries, without copying the cache.

Where several query heads share one head of keys and values, ``transformers`` repeats the keys and values for each of
them before it calls PyTorch: at every token a copy of the whole cache, which on a CPU costs eight times the attention
itself. A single new token needs none of that: the query heads that share keys can stand where a sequence of queries
would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "forkrl_sdpa"


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model that uses PyTorch's attention decode this way; any other is left as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


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
    """Attention ``[S, T, heads, head_dim]`` of query ``[S, heads, T, head_dim]``, the same as that of "sdpa"."""
    num_sequences, num_heads, length, head_dim = query.shape
    shared_by = num_heads // key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if length > 1 or shared_by == 1 or not one_mask:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.reshape(num_sequences, key.shape[1], shared_by, head_dim)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return mixed.reshape(num_sequences, 1, num_heads, -1), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
