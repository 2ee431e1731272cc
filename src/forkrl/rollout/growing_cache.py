"""A key-value cache for decoding that writes in place.

``transformers``' DynamicCache copies every layer's whole past at each token. Here each full-attention layer keeps a buffer
with room to spare and hands out a view of what is filled; other layer types (sliding windows) stay the library's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 64


class GrowingLayer(DynamicLayer):
    """Keys and values ``[S, heads, T, head_dim]`` at the front of buffers that grow by half when full."""

    key_buffer: Tensor | None = None
    value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new keys and values and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[2]
        if self.key_buffer is None or self.value_buffer is None or self.key_buffer.shape[2] < end:
            room = (*key_states.shape[:2], end + max(ROOM, end // 2), key_states.shape[3])
            key_buffer, value_buffer = key_states.new_empty(room), value_states.new_empty((*room[:3], value_states.shape[3]))
            if past:
                key_buffer[:, :, :past], value_buffer[:, :, :past] = self.keys, self.values
            self.key_buffer, self.value_buffer = key_buffer, value_buffer
        self.key_buffer[:, :, past:end] = key_states
        self.value_buffer[:, :, past:end] = value_states
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep (or repeat) the given sequences; the next update makes room anew."""
        super().batch_select_indices(indices)
        self.key_buffer = self.value_buffer = None


def build_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for the model, with in-place layers wherever attention is full."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_sequences(cache: DynamicCache, index_S: Tensor) -> None:
    """Keep only the given sequences of a cache, in that order; an index may come several times."""
    with torch.no_grad():
        cache.batch_select_indices(index_S)
