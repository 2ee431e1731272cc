"""Attention of the running positions to all positions of their sequences, with gradients for the running ones only.

Memory is one tile of scores; queries are in order, so a block reads keys only up to its last query. A position with
weight ``w`` was drawn with probability ``1 / w``: the gradient that reaches its key and value from other positions
counts ``w`` times, so that every path counts once on average. Sequences with similar numbers of running positions form
a group, so that padding at most doubles a row. Axes: ``B`` sequences, ``T`` positions, ``N`` running positions in all,
``S`` most in a sequence; ``H`` query heads, ``K`` key heads, ``G`` query heads per key head, ``C`` channels; ``R``
queries of a block, ``M`` its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forkrl.model.attention import attention_dtype

SCORES_CPU, COLUMNS_CPU = 1 << 19, 1024
"""Most scores in a tile on a CPU (2 MiB in fp32 fit its cache), and most keys, to leave room for several queries."""
SCORES, COLUMNS = 1 << 26, 16_384
"""The same on accelerators."""


class Layout(NamedTuple):
    """Running positions of some sequences, packed ``[N]`` by sequence and in order."""

    place_BS: Tensor
    """Position in the sequence; ``T`` on padding."""
    slot_BS: Tensor
    """Index among the packed positions."""
    real_BS: Tensor
    """False on padding."""
    weight_BS: Tensor | None
    """Weight of the key and value; None: all 1."""
    bounds: list[tuple[int, int]]
    """Lowest and highest position in each column ``S``."""


class Group(NamedTuple):
    """Sequences of a batch with similar numbers of running positions."""

    rows_B: Tensor
    slots_N: Tensor
    """Indices of their positions among the packed ones of the batch."""
    layout: Layout


def lay_out(running_BT: Tensor, weight_BT: Tensor | None) -> list[Group]:
    """Groups of sequences for the running positions; ``weight_BT`` is None if all weights are 1."""
    counts = running_BT.sum(1).tolist()
    slots_B = torch.arange(sum(counts), device=running_BT.device).split(counts)
    groups: list[list[int]] = []
    for row in sorted((row for row, count in enumerate(counts) if count), key=lambda row: -counts[row]):
        if groups and 2 * counts[row] >= counts[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [
        Group(
            torch.tensor(rows, device=running_BT.device),
            torch.cat([slots_B[row] for row in rows]),
            _lay_out_rows(running_BT[rows], None if weight_BT is None else weight_BT[rows]),
        )
        for rows in map(sorted, groups)
    ]


def _lay_out_rows(running_BT: Tensor, weight_BT: Tensor | None) -> Layout:
    num_positions, longest = running_BT.shape[1], int(running_BT.sum(1).max())
    place_BS = running_BT.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    real_BS = running_BT.gather(1, place_BS)
    slot_BS = real_BS.flatten().cumsum(0).view_as(real_BS) - 1
    weight_BS = None if weight_BT is None else weight_BT.gather(1, place_BS)
    place_BS = place_BS.where(real_BS, num_positions)
    bounds = torch.stack(place_BS.aminmax(dim=0), 1).tolist()
    return Layout(place_BS, slot_BS, real_BS, weight_BS, [(low, high) for low, high in bounds])


def selected_attention(
    query: Tensor, key: Tensor, value: Tensor, all_keys: Tensor, all_values: Tensor, groups: list[Group],
    *, scaling: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Attention ``[1, N, H, C]`` of packed queries ``[1, H, N, C]`` to all keys of their sequences, ``[B, K, T, C]``.

    ``key`` and ``value`` ``[1, K, N, C]`` equal their entries in ``all_keys`` and ``all_values`` and get a gradient.
    Other positions get one if ``all_keys`` requires it. ``window`` includes the query's own position.
    """
    packed = [attention_dtype(each) for each in (query, key, value)]
    constant = [attention_dtype(each) for each in (all_keys, all_values)]
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the scores
        if len(groups) == 1 and len(groups[0].rows_B) == len(all_keys):
            mixed = _attend(packed, constant, groups[0].layout, scaling, window)
        else:
            parts = [
                _attend(
                    [each.index_select(2, group.slots_N) for each in packed],
                    [each.index_select(0, group.rows_B) for each in constant],
                    group.layout, scaling, window,
                )
                for group in groups
            ]  # fmt: skip
            order_N = torch.cat([group.slots_N for group in groups]).argsort()
            mixed = torch.cat(parts, 2).index_select(2, order_N)
    return mixed.transpose(1, 2)


def _attend(packed: list[Tensor], constant: list[Tensor], layout: Layout, scaling: float, window: int | None) -> Tensor:
    mixed: Tensor = _SelectedAttention.apply(*packed, *constant, layout, scaling, window)  # type: ignore[no-untyped-call]
    return mixed


class _SelectedAttention(torch.autograd.Function):
    """Saves inputs, output and a log-sum-exp per query and head; the backward recomputes scores."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, all_keys: Tensor, all_values: Tensor, layout: Layout,
        scaling: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        query_BKGSC = _group(_unpack(query, layout), key.shape[1])
        mixed_BKGSC, lse_BKGS = torch.empty_like(query_BKGSC), torch.empty_like(query_BKGSC[..., 0], dtype=_wide(query))
        for block in _blocks(layout, query.shape[1], all_keys.shape[2], window, query.device):
            part, place_BR = query_BKGSC[..., block.rows, :], _query_places(layout, block.rows, all_keys.shape[2])
            highest = torch.full_like(part[..., :1], torch.finfo(_wide(part)).min, dtype=_wide(part))
            total, mixed = torch.zeros_like(highest), torch.zeros_like(part, dtype=_wide(part))
            for tile in block.tiles:
                scores = _scores(part, all_keys[:, :, tile.columns], scaling)
                _hide(scores, _sees(place_BR, tile.places(place_BR.device)[:, tile.clear :], window), tile.clear)
                before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
                weights, shrink = scores.sub_(highest).exp_(), (before - highest).exp()
                total = total * shrink + weights.sum(-1, keepdim=True)
                mixed = mixed * shrink + _mix(weights, all_values[:, :, tile.columns])
            lse_BKGS[..., block.rows] = (highest + total.log())[..., 0]
            mixed_BKGSC[..., block.rows, :] = mixed / total
        mixed = _pack(mixed_BKGSC.flatten(1, 2), layout)
        ctx.save_for_backward(query, key, value, all_keys, all_values, mixed, lse_BKGS)
        ctx.layout, ctx.scaling, ctx.window = layout, scaling, window
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, all_keys, all_values, mixed, lse_BKGS = ctx.saved_tensors
        layout, scaling, window = ctx.layout, ctx.scaling, ctx.window
        num_kv, to_all = key.shape[1], ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        query_BKGSC = _group(_unpack(query, layout), num_kv)
        grad_BKGSC = _group(_unpack(grad, layout) * layout.real_BS[:, None, :, None], num_kv)
        # Equals the sum over keys of weight times its gradient.
        dot_BKGS = (grad_BKGSC * _group(_unpack(mixed, layout), num_kv)).sum(-1, dtype=_wide(grad))
        grad_query = torch.zeros_like(query_BKGSC, dtype=_wide(query))
        own = (all_keys, all_values) if to_all else (_unpack(key, layout), _unpack(value, layout))
        sums = [torch.zeros_like(each, dtype=_wide(each)) for each in own]
        for block in _blocks(layout, query.shape[1], all_keys.shape[2], window, query.device):
            part = _Part(*(each[..., block.rows, :] for each in (query_BKGSC, grad_BKGSC)),
                         *(each[..., block.rows] for each in (dot_BKGS, lse_BKGS)))  # fmt: skip
            place_BR = _query_places(layout, block.rows, all_keys.shape[2])
            for tile in block.tiles:
                columns = tile.columns
                keys, values = all_keys[:, :, columns], all_values[:, :, columns]
                seen_BRM = _sees(place_BR, tile.places(place_BR.device)[:, tile.clear :], window)
                weights, grad_scores = _again(part, keys, values, scaling, seen_BRM, tile.clear)
                grad_query[..., block.rows, :] += _mix(grad_scores, keys)
                if to_all:
                    sums[0][:, :, columns] += _mix_back(grad_scores, part.query)
                    sums[1][:, :, columns] += _mix_back(weights, part.grad)
            if not to_all:
                columns = slice(0, block.rows.stop)
                keys, values, places = own[0][:, :, columns], own[1][:, :, columns], layout.place_BS[:, columns]
                weights, grad_scores = _again(part, keys, values, scaling, _sees(place_BR, places, window), 0)
                for each in (weights, grad_scores):
                    _count(each, layout.weight_BS, block.rows)
                sums[0][:, :, columns] += _mix_back(grad_scores, part.query)
                sums[1][:, :, columns] += _mix_back(weights, part.grad)
        grads = [total.to(each.dtype) for total, each in zip(sums, own, strict=True)]
        rest: list[Tensor | None] = [None, None]
        if to_all:
            grads, rest = _divide_gradient(grads, layout)
        return (
            _pack(grad_query.flatten(1, 2), layout),
            *(_pack(each, layout) for each in grads),
            *rest,
            None,
            None,
            None,
        )


class _Part(NamedTuple):
    """Queries of a block in the backward, ``[B, K, G, R, C]`` and ``[B, K, G, R]``."""

    query: Tensor
    grad: Tensor
    dot: Tensor
    lse: Tensor


class _Tile(NamedTuple):
    columns: slice
    clear: int
    """Leading keys that every query of the block sees."""

    def places(self, device: torch.device) -> Tensor:
        return torch.arange(self.columns.start, self.columns.stop, device=device)[None]


class _Block(NamedTuple):
    rows: slice
    tiles: list[_Tile]


def _blocks(
    layout: Layout, num_heads: int, num_positions: int, window: int | None, device: torch.device
) -> Iterator[_Block]:
    """Blocks of consecutive queries that fit a tile, with the tiles of keys they see."""
    budget, width = (SCORES_CPU, COLUMNS_CPU) if device.type == "cpu" else (SCORES, COLUMNS)
    budget //= len(layout.place_BS) * num_heads
    start = 0
    while start < len(layout.bounds):
        first = layout.bounds[start][0]
        low = 0 if window is None else max(0, first - window + 1)
        stop, high = start, low
        while stop < len(layout.bounds):
            seen = min(num_positions, layout.bounds[stop][1] + 1)
            if stop > start and (stop + 1 - start) * min(width, seen - low) > budget:
                break
            stop, high = stop + 1, seen
        tiles = [slice(column, min(column + width, high)) for column in range(low, high, width)]
        clear = [0 if window is not None else min(max(first + 1, tile.start), tile.stop) - tile.start for tile in tiles]
        yield _Block(slice(start, stop), list(map(_Tile, tiles, clear)))
        start = stop


def _query_places(layout: Layout, rows: slice, num_positions: int) -> Tensor:
    """Positions of some queries, ``[B, R]``. Padding sees what the last position sees, and no other padding."""
    return layout.place_BS[:, rows].clamp_max(num_positions - 1)


def _again(
    part: _Part, keys: Tensor, values: Tensor, scaling: float, seen_BRM: Tensor, clear: int
) -> tuple[Tensor, Tensor]:
    """Recomputed attention weights and the gradient of the unscaled scores, ``[B, K, G, R, M]``."""
    scores = _scores(part.query, keys, scaling)
    _hide(scores, seen_BRM, clear)
    weights = scores.sub_(part.lse[..., None]).exp_()
    grad_scores = _scores(part.grad, values, 1.0).sub_(part.dot[..., None]).mul_(weights).mul_(scaling)
    return weights, grad_scores


def _sees(query_place_BR: Tensor, key_place_BM: Tensor, window: int | None) -> Tensor:
    distance_BRM = query_place_BR[:, :, None] - key_place_BM[:, None, :]
    return distance_BRM >= 0 if window is None else (distance_BRM >= 0) & (distance_BRM < window)


def _hide(scores: Tensor, seen_BRM: Tensor, clear: int) -> None:
    """Mask unseen keys with minus infinity; the first ``clear`` keys are seen by all."""
    scores[..., clear:].masked_fill_(~seen_BRM[:, None, None], -torch.inf)


def _count(to_own: Tensor, weight_BS: Tensor | None, rows: slice) -> None:
    """Weight the gradient that reaches a drawn position from other positions; its own counts once."""
    if weight_BS is None:
        return
    weight_BM = weight_BS[:, : rows.stop].to(to_own.dtype)
    itself = to_own[..., rows].diagonal(dim1=-2, dim2=-1)
    kept = itself.clone()
    to_own.mul_(weight_BM[:, None, None, None])
    itself.copy_(kept)


def _divide_gradient(sums: list[Tensor], layout: Layout) -> tuple[list[Tensor], list[Tensor | None]]:
    """Split the gradients of all keys and values into those of running and of other positions."""
    inside_BS = layout.place_BS.where(layout.real_BS, 0)
    running, rest = [], list[Tensor | None]()
    for total in sums:
        index = inside_BS[:, None, :, None].expand(-1, total.shape[1], -1, total.shape[3])
        running.append(total.gather(2, index))
        batch_N, place_N = layout.real_BS.nonzero()[:, 0], layout.place_BS[layout.real_BS]
        total[batch_N, :, place_N] = 0
        rest.append(total)
    return running, rest


def _unpack(packed: Tensor, layout: Layout) -> Tensor:
    """``[1, heads, N, C]`` to ``[B, heads, S, C]``, finite on padding."""
    taken: Tensor = packed[0].index_select(1, layout.slot_BS.flatten()).unflatten(1, layout.slot_BS.shape)
    return taken.transpose(0, 1)


def _pack(padded: Tensor, layout: Layout) -> Tensor:
    """``[B, heads, S, C]`` to ``[1, heads, N, C]``."""
    return padded.transpose(1, 2)[layout.real_BS].transpose(0, 1)[None]


def _group(heads: Tensor, num_kv: int) -> Tensor:
    """``[B, H, ...]`` to ``[B, K, G, ...]``: query heads by key head."""
    grouped: Tensor = heads.unflatten(1, (num_kv, -1))
    return grouped


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _scores(rows: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """``[B, K, G, R, M]`` of ``[B, K, G, R, C]`` and ``[B, K, M, C]``, fp32 at least."""
    shape = (*rows.shape[:-1], keys.shape[2])
    left, right = rows.flatten(2, 3), keys.transpose(2, 3)
    if rows.is_cuda and rows.dtype != _wide(rows) and torch.version.hip is None:
        product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
        return product.mul_(scaling).view(shape)
    return torch.matmul(left.to(_wide(left)) * scaling, right.to(_wide(right))).view(shape)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """``[B, K, G, R, C]`` of ``[B, K, G, R, M]`` and ``[B, K, M, C]``."""
    mixed = torch.matmul(weights.to(values.dtype).flatten(2, 3), values)
    return mixed.view(*weights.shape[:-1], -1)


def _mix_back(weights: Tensor, rows: Tensor) -> Tensor:
    """``[B, K, M, C]``, summed over queries, of ``[B, K, G, R, M]`` and ``[B, K, G, R, C]``."""
    return torch.matmul(weights.to(rows.dtype).flatten(2, 3).transpose(2, 3), rows.flatten(2, 3))
