"""A decoding step with fixed shapes and buffers, so that a CUDA graph can replay it in one launch.

Keys and values have full-length buffers and the write position is a tensor on the device. A step runs on a *bucket* of
rows and of the length, which wastes at most 7 rows and 63 tokens, or a quarter if that is more; each pair of buckets is
captured once. Head and sampling stay outside: they would need memory for the logits of every bucket, and the generator.

Memory: per layer two buffers of ``rows · K · capacity · C`` numbers in compute precision (Qwen3-0.6B in bf16: 112 KiB
per token over all layers), and a second copy of the weights.

Shapes: ``S`` rows, ``P`` prompts, ``K`` key-value heads, ``C`` channels per head, ``D`` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from forkrl.model.policy import Policy
from forkrl.rollout.flat_step import FlatStep
from forkrl.store.interruption import signals_put_off

LEAST_ROWS, LEAST_LENGTH = 8, 64


def bucket(number: int, least: int) -> int:
    """Round up to a multiple of ``least`` and of a quarter of the power of 2 below ``number``."""
    step = max(least, 1 << max(0, (number - 1).bit_length() - 3))
    return -(-number // step) * step


class Store(NamedTuple):
    """Key and value buffers of a layer, ``[S, K, T, C]``, and the write position, ``[1]``."""

    keys: Tensor
    values: Tensor
    slot_1: Tensor

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot_1, key)
        self.values.index_copy_(2, self.slot_1, value)
        return self.keys, self.values


class GraphedStep:
    """Decodes batches in the same buffers, one token of every row per step; copies the weights once.

    Requires :func:`forkrl.rollout.flat_step.reproducible`. ``capacity`` includes prompt and left padding.
    """

    def __init__(self, policy: Policy, num_sequences: int, capacity: int) -> None:
        flat, rows = FlatStep(policy), bucket(num_sequences, LEAST_ROWS)
        device = policy.device
        self.device, self.flat, self.capacity = device, flat, -(-capacity // LEAST_LENGTH) * LEAST_LENGTH
        self.logits = policy.head_in_precision()
        sizes = (2, rows, flat.num_kv, self.capacity, flat.head_dim)
        # Zeros, because masked values are multiplied by 0, and 0 times NaN is NaN.
        self.buffers = [torch.zeros(sizes, dtype=flat.cache_dtype, device=device) for _ in flat.layers]
        self.bias_ST = torch.full((rows, self.capacity), -torch.inf, dtype=flat.cache_dtype, device=device)
        self.tokens_S, self.position_S = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.slot_1 = torch.zeros(1, dtype=torch.int64, device=device)
        weight: Tensor = policy.decoder.embed_tokens.weight  # type: ignore[assignment,union-attr]
        self.hidden_SD = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=device)
        self.rows = self.length = 0
        self._capture = Capture(device) if device.type == "cuda" else _as_it_is
        self._steps: dict[tuple[int, int], Callable[[], None]] = {}

    def begin(self, cache: DynamicCache, seen_PT: Tensor, owner_S: Tensor) -> None:
        """Copy prefilled prompts into the rows; ``seen_PT`` is False for padding, ``owner_S`` is each row's prompt."""
        self.rows, self.length = len(owner_S), seen_PT.shape[1]
        read: list[Any] = list(cache.layers)
        for buffer, layer in zip(self.buffers, read, strict=True):
            buffer[0, : self.rows, :, : self.length] = layer.keys[owner_S]
            buffer[1, : self.rows, :, : self.length] = layer.values[owner_S]
        self.bias_ST.fill_(-torch.inf)
        self.bias_ST[: self.rows, : self.length].masked_fill_(seen_PT[owner_S], 0.0)
        self.position_S[: self.rows] = seen_PT.sum(1)[owner_S]
        self.slot_1.fill_(self.length)

    def advance(self, tokens_S: Tensor) -> Tensor:
        """Last hidden states ``[S, D]`` after one more token of every row; valid until the next call."""
        pair = self.rows, min(bucket(self.length + 1, LEAST_LENGTH), self.capacity)
        self.tokens_S[: self.rows].copy_(tokens_S)
        if pair not in self._steps:
            self._steps[pair] = self._capture(lambda: self._run(*pair))
        self._steps[pair]()
        self.position_S.add_(1)
        self.slot_1.add_(1)
        self.length += 1
        return self.hidden_SD[: self.rows]

    def keep(self, place: Sequence[int]) -> None:
        """Keep these rows (a whole bucket); copies only rows that change place."""
        moved = [(there, here) for here, there in enumerate(place) if there != here]
        if moved:
            source, target = torch.tensor(moved, device=self.device).unbind(1)
            for buffer in self.buffers:
                filled = buffer[:, :, :, : self.length]
                filled.index_copy_(1, target, filled.index_select(1, source))
            for state in (self.bias_ST, self.position_S):
                state.index_copy_(0, target, state.index_select(0, source))
        self.rows = len(place)

    def _run(self, rows: int, length: int) -> None:
        """The step, from buffers to buffers; idempotent."""
        bias_ST = self.bias_ST[:rows, :length]
        bias_ST.index_fill_(1, self.slot_1, 0.0)
        filled = [buffer[:, :rows, :, :length] for buffer in self.buffers]
        stores = [Store(keys, values, self.slot_1) for keys, values in filled]
        hidden_SD = self.flat.run_layers(self.tokens_S[:rows], self.position_S[:rows], bias_ST[:, None, None], stores)
        self.hidden_SD[:rows].copy_(hidden_SD)


def _as_it_is(run: Callable[[], None]) -> Callable[[], None]:
    return run


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per process, because cuBLAS keeps a workspace for every stream it has used."""
    # Graphs captured on this stream share its workspace, so two GraphedSteps must not run concurrently.
    return torch.cuda.Stream(device)


class Capture:
    """Captures functions that work from buffers to buffers as CUDA graphs. Not yet tested on a GPU.

    They share a memory pool, which is safe because they run one at a time and leave no results in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _capture_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                run()  # warm-up: libraries initialise at the first call, which cannot be captured
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # An interruption during capture would leave the stream in capture mode.
            with signals_put_off(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                run()
        return graph.replay
