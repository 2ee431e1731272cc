"""Several sequences in one row, without padding, and each prompt once for all its responses.

Only attention needs to know the sequences: everything else in a transformer works token by token. So a packed pass
computes the same hidden states and gradients as a padded one, with fewer tokens. Axes: ``B`` sequences, ``T`` positions
of a sequence, ``N`` packed tokens; in a segment ``S`` sequences, ``R`` queries; ``H`` query heads, ``K`` key heads,
``C`` channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forkrl.model.attention import (
    Attention,
    attending_by,
    attention_dtype,
    current_attention,
    grouped_attention,
    precise_on_cpu,
)
from forkrl.types import TokenBatch

if TYPE_CHECKING:
    from forkrl.model.policy import Policy

LARGEST_MASK = 1 << 18
"""Entries ``R T`` up to which the responses of a prompt attend with a mask."""
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_PROBE_WINDOW = 6


class Segment(NamedTuple):
    """Sequences that attend in one call, as indices of packed tokens; the last ones of a sequence may be padding."""

    query_SR: Tensor
    key_ST: Tensor
    first: int
    """Position of the first query; the queries before it attend in another segment."""


class Packing(NamedTuple):
    """A batch in one row of ``N`` tokens."""

    input_ids_1N: Tensor
    position_1N: Tensor
    slot_BT: Tensor
    """Packed index of each position of the batch; that of another token on padding."""
    segments: list[Segment]
    place_N: Tensor
    """Index of each packed token among the queries of all segments."""

    def unpack(self, hidden_1ND: Tensor, at_BT: Tensor) -> Tensor:
        """Rows ``[M, D]`` of the true positions of ``at_BT``."""
        return hidden_1ND[0, self.slot_BT[at_BT]]

    def unpack_heads(self, heads: Tensor) -> Tensor:
        """Keys or values of all positions, ``[B, K, T, C]``, from ``[1, K, N, C]``, in the precision of attention."""
        return _unpack(attention_dtype(heads), self.slot_BT).contiguous()


def pack(batch: TokenBatch) -> Packing:
    """Lay out a batch: each distinct prompt, followed by the rest of its sequences."""
    groups, length_B = batch.rows_by_prompt(), batch.attention_mask.sum(1).tolist()
    slot_BT, num_tokens = _slots(groups, length_B, batch.input_ids.shape[1])
    segments = _segments(groups, length_B, slot_BT)
    inside_BT, device = batch.attention_mask.cpu(), batch.input_ids.device
    flat_N = inside_BT.flatten().nonzero()[:, 0][_first_places(slot_BT[inside_BT], num_tokens)].to(device)
    queries = torch.cat([segment.query_SR.flatten() for segment in segments])
    return Packing(
        batch.input_ids.flatten()[flat_N][None],
        (flat_N % slot_BT.shape[1])[None],
        slot_BT.to(device),
        [Segment(query_SR.to(device), key_ST.to(device), first) for query_SR, key_ST, first in segments],
        _first_places(queries, num_tokens).to(device),
    )


def _slots(groups: Mapping[tuple[int, ...], list[int]], length_B: list[int], width: int) -> tuple[Tensor, int]:
    """Packed index of each position, ``[B, T]``, and the number of packed tokens."""
    slot_BT, start = torch.zeros(len(length_B), width, dtype=torch.int64), 0
    for prompt, rows in groups.items():
        slot_BT[rows, : len(prompt)] = torch.arange(start, start + len(prompt))
        start += len(prompt)
        for row in rows:
            num_own = length_B[row] - len(prompt)
            slot_BT[row, len(prompt) : length_B[row]] = torch.arange(start, start + num_own)
            start += num_own
            slot_BT[row, length_B[row] :] = start - 1
    return slot_BT, start


def _segments(groups: Mapping[tuple[int, ...], list[int]], length_B: list[int], slot_BT: Tensor) -> list[Segment]:
    whole: list[Tensor] = []  # slots of sequences, or of prompts alone, that attend from their first position
    segments: list[Segment] = []
    for prompt, rows in groups.items():
        first, longest = len(prompt), max(length_B[row] for row in rows)
        longer = [row for row in rows if length_B[row] > first]
        # Half of the scores of a causal call are skipped, none of a call with a mask, which also takes memory.
        if len(rows) > 1 and longest < 2 * first and (longest - first) * longest <= LARGEST_MASK:
            whole.append(slot_BT[rows[0], :first])
            if longer:
                segments.append(Segment(slot_BT[longer, first:longest], slot_BT[longer, :longest], first))
        else:
            whole += [slot_BT[row, : length_B[row]] for row in rows]
    return segments + _segments_of_similar_length(whole)


def _segments_of_similar_length(slots: list[Tensor]) -> list[Segment]:
    """Padding at most doubles a sequence."""
    segments: list[list[Tensor]] = []
    for slot_T in sorted(slots, key=len, reverse=True):
        if segments and 2 * len(slot_T) >= len(segments[-1][0]):
            segments[-1].append(slot_T)
        else:
            segments.append([slot_T])
    padded = [torch.stack([_padded(slot_T, len(segment[0])) for slot_T in segment]) for segment in segments]
    return [Segment(slot_ST, slot_ST, 0) for slot_ST in padded]


def _padded(slot_T: Tensor, length: int) -> Tensor:
    return torch.cat([slot_T, slot_T[-1:].expand(length - len(slot_T))])


def _first_places(index_M: Tensor, count: int) -> Tensor:
    """Where each number below ``count`` first occurs in ``index_M``."""
    return torch.full((count,), len(index_M)).scatter_reduce_(0, index_M, torch.arange(len(index_M)), "amin")


def packed_attention(packing: Packing, windows: list[int | None]) -> Attention:
    """Attention of the packed tokens; ``windows`` as from :func:`attention_windows`."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        index: Any = module.layer_idx
        packed = [attention_dtype(each) for each in (query, key, value)]
        outputs = []
        for segment in packing.segments:
            seen_RT = _seen(segment, windows[index])
            with precise_on_cpu(query.device):
                if segment.first == 0:
                    mixed = _attend_whole(module, packed, segment, seen_RT, scaling, kwargs)
                else:  # recomputed in the backward, which then needs no copies of a prompt's keys and values
                    mixed = checkpoint(
                        _attend_partly, packed, segment, seen_RT, scaling, use_reentrant=False, preserve_rng_state=False
                    )
            outputs.append(mixed.flatten(0, 1).flatten(1))
        mixed_ND = torch.cat(outputs)[packing.place_N]
        return mixed_ND.unflatten(-1, (query.shape[1], -1))[None], None

    return attention


def _attend_whole(
    module: nn.Module,
    packed: list[Tensor],
    segment: Segment,
    seen_RT: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention ``[S, R, H, C]`` of all positions of some sequences."""
    query, key, value = (_unpack(each, segment.key_ST) for each in packed)
    mask = None if seen_RT is None else seen_RT[None, None]
    return grouped_attention(module, query, key, value, mask, scaling=scaling, **kwargs)[0]


def _attend_partly(packed: list[Tensor], segment: Segment, seen_RT: Tensor, scaling: float | None) -> Tensor:
    """Attention ``[S, R, H, C]`` of the last positions of some sequences."""
    query = _unpack(packed[0], segment.query_SR)
    key, value = (_unpack(each, segment.key_ST) for each in packed[1:])
    # The query heads that share keys take the place of a longer query sequence, instead of copies of the keys.
    num_kv, shared_by = key.shape[1], query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (num_kv, shared_by)).flatten(2, 3)
    mask = seen_RT.repeat(shared_by, 1)[None, None]
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    by_head: Tensor = mixed.unflatten(2, (shared_by, -1)).flatten(1, 2)
    return by_head.transpose(1, 2)


def _seen(segment: Segment, window: int | None) -> Tensor | None:
    """Which keys each query sees, bool ``[R, T]``; None: those up to its own position."""
    num_queries, num_keys = segment.query_SR.shape[1], segment.key_ST.shape[1]
    if segment.first == 0 and (window is None or window >= num_keys):
        return None
    key_T = torch.arange(num_keys, device=segment.key_ST.device)
    distance_RT = key_T[segment.first : segment.first + num_queries, None] - key_T
    return (distance_RT >= 0) & (distance_RT < (window or num_keys))


def _unpack(heads: Tensor, slot_ST: Tensor) -> Tensor:
    """``[S, heads, T, C]`` from packed ``[1, heads, N, C]``."""
    table_ND = heads[0].transpose(0, 1).flatten(1)
    unpacked: Tensor = table_ND[slot_ST].unflatten(-1, (heads.shape[1], -1))
    return unpacked.transpose(1, 2)


def packed_hidden_states(policy: Policy, packing: Packing, attention: Attention | None = None) -> Tensor:
    """Last hidden states ``[1, N, D]``; ``attention`` takes the place of :func:`packed_attention`."""
    config = policy.text_config
    with attending_by(attention or packed_attention(packing, attention_windows(config))):
        return policy.hidden_states(
            packing.input_ids_1N, no_mask(config, policy.device), position_ids=packing.position_1N, use_cache=False
        )


@torch.no_grad()
def why_not_packed(policy: Policy) -> str:
    """Why a model needs padded sequences, by comparing both passes in fp32; empty if it does not."""
    policy, length = type(policy)(policy.model, policy.tokenizer), 24
    ids_BT = (torch.arange(4 * length).view(4, length) * 7 + 1) % policy.head_weight.shape[0]
    lengths_B1, prompts_B1 = torch.tensor([[24], [18], [20], [11]]), torch.tensor([[16], [16], [3], [3]])
    ids_BT[1, :16], ids_BT[3, :3] = ids_BT[0, :16], ids_BT[2, :3]
    place_1T = torch.arange(length)[None]
    inside_BT, nothing_BT = place_1T < lengths_B1, torch.zeros(4, length)
    response_BT = inside_BT & (place_1T >= prompts_B1 - 1)
    batch = TokenBatch(ids_BT, ids_BT, inside_BT, response_BT, nothing_BT, nothing_BT, nothing_BT[:, 0])
    batch = batch.to(policy.device)
    with _short_window(policy.text_config):
        try:
            packing = pack(batch)
            packed_MD = packing.unpack(packed_hidden_states(policy, packing), batch.attention_mask)
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
            return f"{type(error).__name__}: {error}"
        padded_MD = policy.hidden_states(batch.input_ids, use_cache=False)[batch.attention_mask]
    difference = float((packed_MD - padded_MD).abs().max()) / max(float(padded_MD.abs().max()), 1e-6)
    return "" if difference < 1e-3 else f"its hidden states would differ by {difference:.2g} of the largest"


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Shrink a sliding window to less than the probe; a model that does not use its window then shows it."""
    window = getattr(config, "sliding_window", None)
    if window:
        config.sliding_window = min(window, _PROBE_WINDOW)
    try:
        yield
    finally:
        if window:
            config.sliding_window = window


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``torch.utils.checkpoint``: a layer attends in its recomputation as in its first pass."""
    return nullcontext(), attending_by(current_attention())


def attention_windows(config: Any) -> list[int | None]:
    """Attention window of each layer in positions, including the query's own; None: full causal.

    Raises ValueError for layers that do not attend in one of these ways.
    """
    num_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
    if unknown := set(kinds) - _KNOWN_LAYERS:
        raise ValueError(f"layers of kind {min(unknown)}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def no_mask(config: Any, device: torch.device) -> Tensor | dict[str, Tensor]:
    """A mask that a model passes to a custom attention unchanged."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    kinds = set(getattr(config, "layer_types", None) or ())
    return dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
