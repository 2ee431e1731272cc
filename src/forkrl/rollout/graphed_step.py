"""A decoding step of fixed shapes in fixed memory, which a CUDA graph can hold: one launch for a whole step.

On a GPU a step of a small or medium model takes longer to launch, kernel by kernel, than to run. A CUDA graph launches
all of it at once, but it is a recording: every tensor must lie where it lay, in the shape that it had, and no number
that changes may come from Python. So keys and values stand in buffers of full length; the place that the newest token
is written to is a number on the device; and tokens, positions, the mask and the hidden states have buffers of their
own. The layers are those of :class:`forkrl.rollout.flat_step.FlatStep`.

A step attends over a *bucket* of the buffers' length, not over all of it, and runs a bucket of their rows. What is
computed in vain is at most 63 tokens (7 rows), or a quarter of what is needed where that is more; and a batch that
shrinks while its sequences grow meets no more pairs of buckets than there are of both kinds together.

Each pair that comes up is captured once: the step runs as it is, then once more into the graph. Before that
``torch.cuda.graph`` waits for the device and empties the allocator's cache, so that what is allocated next has to ask
the driver for memory again. Some three ordinary steps together is an estimate, which no card has confirmed.

The head and the sampling are left out of the graph: some fifteen kernels against the twenty of every layer. Inside,
the logits of every bucket would need memory of their own, and the generator would have to be known to each graph.

Where the device is not CUDA the same step runs without a graph: the very operations, in the very buffers.

Memory, beside the model: two buffers of ``rows · heads of keys and values · capacity · channels`` numbers a layer, in
the precision of the products, whether they are filled or not (a Qwen3-0.6B in bf16: 112 KiB a token, so 256 sequences
of 2,112 tokens 58 GiB); the layers and the head once more, in that precision; and what one step works in.

Shapes: ``S`` rows, ``P`` prompts, ``K`` heads of keys and values, ``C`` channels of a head, ``D`` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import DynamicCache

from forkrl.model.policy import Policy
from forkrl.rollout.flat_step import FlatStep
from forkrl.store.interruption import signals_put_off

LEAST_ROWS, LEAST_LENGTH = 8, 64


def bucket(number: int, least: int) -> int:
    """The smallest size that holds ``number``: a multiple of ``least``, and of a quarter of the power of 2 below it."""
    step = max(least, 1 << max(0, (number - 1).bit_length() - 3))
    return -(-number // step) * step


class Store(NamedTuple):
    """Keys and values of a layer, ``[S, K, T, C]`` of its buffers, and the place of the newest token, ``[1]``."""

    keys: Tensor
    values: Tensor
    slot_1: Tensor

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot_1, key)
        self.values.index_copy_(2, self.slot_1, value)
        return self.keys, self.values


class GraphedStep:
    """Decodes batch after batch in the same buffers, a token of every row at a time.

    Args:
        policy: for which :func:`forkrl.rollout.flat_step.reproducible` is true; its weights are read now and not again.
        num_sequences: most of a batch.
        capacity: most tokens of a sequence, with its prompt and the padding before it.
    """

    def __init__(self, policy: Policy, num_sequences: int, capacity: int) -> None:
        flat, rows = FlatStep(policy), bucket(num_sequences, LEAST_ROWS)
        device = policy.device
        self.device, self.flat, self.capacity = device, flat, -(-capacity // LEAST_LENGTH) * LEAST_LENGTH
        self.head = policy.head_weight.to(flat.layers[0].qkv.dtype)
        self.head_bias = None if policy.head_bias is None else policy.head_bias.to(self.head.dtype)
        sizes = (2, rows, flat.num_kv, self.capacity, flat.head_dim)
        # Zeros and not whatever is there: what is masked is still multiplied, by 0, and 0 times NaN is NaN.
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
        """Take over prompts that have been read: every row begins with a copy of its own.

        Args:
            cache: of the prompts.
            seen_PT: bool, False where a place in it is padding.
            owner_S: which prompt is whose; as many as a bucket has rows.
        """
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
        """The last hidden states ``[S, D]`` after one more token of every row; they stay until the next call."""
        pair = self.rows, min(bucket(self.length + 1, LEAST_LENGTH), self.capacity)
        self.tokens_S[: self.rows].copy_(tokens_S)
        if pair not in self._steps:
            self._steps[pair] = self._capture(lambda: self._run(*pair))
        self._steps[pair]()
        self.position_S.add_(1)
        self.slot_1.add_(1)
        self.length += 1
        return self.hidden_SD[: self.rows]

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """As ``Policy.logits``, without converting the head's weights at every token."""
        return linear(hidden_SD.to(self.head.dtype), self.head, self.head_bias).float()

    def keep(self, place: Sequence[int]) -> None:
        """Go on with these rows, as many as a bucket has; only those that are not in their place already are copied."""
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
        """The step itself, from buffers to buffers; running it twice does no harm."""
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
    """One for the process: cuBLAS keeps a workspace for each stream that it has worked on."""
    # All graphs captured on a stream write to that workspace, so those of two GraphedSteps may not run at the same
    # time. They do not: decoding is one batch after another.
    return torch.cuda.Stream(device)


class Capture:
    """Turns functions that work from buffers to buffers into CUDA graphs, all of which work in the same memory.

    They can share it because no two run at once and none leaves anything there for later. It has not run on a GPU yet.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _capture_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                run()  # libraries set themselves up at their first call, which no graph may hold
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # Left half-way, between the capture's beginning and its end, the stream would go on capturing.
            with signals_put_off(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                run()
        return graph.replay
