"""Exact top-k over any number of scores, in linear time, with ties resolved by position."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Scores processed at a time; bounds intermediate results to tens of megabytes."""
_INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def keep_highest(scores_N: Tensor, num_kept: int) -> Tensor:
    """True at exactly ``num_kept`` of the highest scores, ties to the earliest; unlike ``topk`` stable, at any size."""
    threshold = kth_highest(scores_N, num_kept)
    ties_left = num_kept - sum(int((part > threshold).sum()) for part in scores_N.split(CHUNK))
    kept_N = torch.empty_like(scores_N, dtype=torch.bool)
    for part, kept in zip(scores_N.split(CHUNK), kept_N.split(CHUNK), strict=True):
        tied = part == threshold
        kept.copy_((part > threshold) | (tied & (tied.cumsum(0) <= ties_left)))
        ties_left -= int(tied.sum())
    return kept_N


def kth_highest(scores_N: Tensor, rank: int) -> Tensor:
    """The ``rank``-th highest score (from 1), exact, by a radix select of 16 bits per pass."""
    width = 8 * scores_N.element_size()
    found, sign = 0, 0x8000  # the first digit is signed
    for shift in reversed(range(0, width, 16)):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=scores_N.device)
        for part in scores_N.split(CHUNK):
            key = _ordered_integers(part)
            if shift + 16 < width:
                key = key[key >> (shift + 16) == found]
            counts += torch.bincount(((key >> shift) & 0xFFFF).int() ^ sign, minlength=1 << 16)
        highest_first = counts.flip(0).cumsum(0)
        place = int((highest_first < rank).sum())
        rank -= int(highest_first[place - 1]) if place else 0
        found, sign = (found << 16) + (0xFFFF - place) - sign, 0
    integer = torch.tensor(found, dtype=_INTEGERS[width], device=scores_N.device)
    return _flip_negative(integer).view(scores_N.dtype)


def _ordered_integers(scores_N: Tensor) -> Tensor:
    """Integers of at least 32 bits in the order of the scores: floats of one sign sort as their bits."""
    integers = _flip_negative(scores_N.contiguous().view(_INTEGERS[8 * scores_N.element_size()]))
    return integers.int() if scores_N.element_size() == 2 else integers


def _flip_negative(integer: Tensor) -> Tensor:
    """Reverse the order of negative integers; its own inverse."""
    info = torch.iinfo(integer.dtype)
    return integer ^ ((integer >> (info.bits - 1)) & info.max)
