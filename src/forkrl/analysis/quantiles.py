"""Exact quantiles of any number of entropies in constant memory: the bits of a float are counted, twice.

A non-negative fp32 number sorts as its bits do. The first pass counts the upper 16 bits of every value, which finds the
65,536th of the line of numbers where a wanted rank lies; the second counts the lower 16 bits there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
_HALF = 1 << 16


def exact_quantiles(batches: Callable[[], Iterable[Floats]], fractions: Sequence[float]) -> npt.NDArray[np.float64]:
    """Quantiles of non-negative numbers, linear between order statistics as ``numpy.quantile`` is.

    Args:
        batches: gives all numbers from the start, each time it is called; it is called twice. Rounded to fp32; a tiny
            negative entropy is rounding, and counts as 0.
        fractions: ``[Q]`` in [0, 1].

    Returns:
        fp64 ``[Q]``.

    Raises:
        ValueError: no numbers, one that is NaN or infinite, or a fraction outside [0, 1].
    """
    wanted = np.asarray(fractions, dtype=np.float64)
    if wanted.size and not (wanted.min() >= 0 and wanted.max() <= 1):
        raise ValueError(f"fractions span {wanted.min():g} to {wanted.max():g}; they must lie in [0, 1]")
    upper = np.zeros(_HALF, dtype=np.int64)
    for bits in map(_sortable_bits, batches()):
        upper += np.bincount(bits >> 16, minlength=_HALF)
    total = int(upper.sum())
    if total == 0:
        raise ValueError("no tokens: there is nothing to take a quantile of")
    places = wanted * (total - 1)
    ranks = np.unique(np.concatenate([np.floor(places), np.ceil(places)])).astype(np.int64)
    values = dict(zip(ranks.tolist(), _order_statistics(batches, upper, ranks), strict=True))
    low = np.array([values[int(rank)] for rank in np.floor(places)])
    high = np.array([values[int(rank)] for rank in np.ceil(places)])
    found: npt.NDArray[np.float64] = low + (high - low) * (places - np.floor(places))
    return found


def _order_statistics(
    batches: Callable[[], Iterable[Floats]], upper: npt.NDArray[np.int64], ranks: npt.NDArray[np.int64]
) -> list[float]:
    """The values of so many ranks (from 0)."""
    ends = upper.cumsum()
    buckets = np.searchsorted(ends, ranks, side="right")
    lower = {int(bucket): np.zeros(_HALF, dtype=np.int64) for bucket in np.unique(buckets)}
    for bits in map(_sortable_bits, batches()):
        for bucket, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == bucket] & (_HALF - 1), minlength=_HALF)
    found = []
    for rank, bucket in zip(ranks.tolist(), buckets.tolist(), strict=True):
        before = ends[bucket] - upper[bucket]
        low_bits = int(np.searchsorted(lower[bucket].cumsum(), rank - before, side="right"))
        found.append(float(np.array((bucket << 16) | low_bits, dtype=np.uint32).view(np.float32)))
    return found


def _sortable_bits(values: Floats) -> npt.NDArray[np.int64]:
    flat = np.asarray(values).ravel().astype(np.float32)
    if not np.isfinite(flat).all():
        raise ValueError(f"entropy is NaN or infinite at {int((~np.isfinite(flat)).sum())} of {flat.size} tokens")
    bits: npt.NDArray[np.int64] = np.maximum(flat, np.float32(0)).view(np.uint32).astype(np.int64) & 0x7FFFFFFF
    return bits
