"""What every selection rule is given, and the exact, position-stable top-k that the entropy rules share.

Axes: ``N`` response tokens, flattened in reading order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Tokens looked at together: some tens of megabytes, whatever their number."""
_INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The response tokens a rule chooses among."""

    entropy: Tensor
    """``[N]`` nats, any floating dtype; finite for rules that read it."""
    num_kept: int
    """How many to keep, for rules that keep a fraction."""
    threshold: float | None
    """Nats, for the rule that has one."""
    generator: torch.Generator | None
    """For rules that draw; None draws from torch's default."""


def num_selected(num_tokens: int, ratio: float) -> int:
    """``max(1, ceil(ratio * num_tokens))``, the size of a selection; 0 of no tokens.

    The ceiling is that of the decimal product: 0.1 x 30 is 3, although the nearest doubles multiply to slightly more.

    Args:
        num_tokens: response tokens to choose among.
        ratio: fraction to keep, in (0, 1].

    Raises:
        ValueError: ``ratio`` is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio = {ratio} must lie in (0, 1]")
    if num_tokens == 0:
        return 0
    # Twelve digits: 0.1 + 0.2 is meant as 0.3.
    return max(1, math.ceil(Fraction(f"{ratio:.12g}") * num_tokens))


def keep_highest(scores_N: Tensor, num_kept: int) -> Tensor:
    """True at exactly ``num_kept`` of the highest scores; of equal ones the earliest.

    Linear time, and no memory that grows with ``N`` but the answer's: a hundred million entropies are as welcome as a
    batch. ``torch.quantile`` ends at 2^24 elements, ``kthvalue`` sorts two further copies, ``topk`` is not stable.
    """
    threshold = kth_highest(scores_N, num_kept)
    ties_left = num_kept - sum(int((part > threshold).sum()) for part in scores_N.split(CHUNK))
    kept_N = torch.empty_like(scores_N, dtype=torch.bool)
    for part, kept in zip(scores_N.split(CHUNK), kept_N.split(CHUNK), strict=True):
        tied = part == threshold
        kept.copy_((part > threshold) | (tied & (tied.cumsum(0) <= ties_left)))
        ties_left -= int(tied.sum())
    return kept_N


def kth_highest(scores_N: Tensor, rank: int) -> Tensor:
    """The score at place ``rank`` (from 1) in descending order: exact, found 16 bits at a time by counting."""
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
    """Integers in the order of the scores, of 32 bits at least: floats of one sign are ordered as their bits are."""
    integers = _flip_negative(scores_N.contiguous().view(_INTEGERS[8 * scores_N.element_size()]))
    return integers.int() if scores_N.element_size() == 2 else integers


def _flip_negative(integer: Tensor) -> Tensor:
    """Turn the order of the negative ones around; done twice, nothing has changed."""
    info = torch.iinfo(integer.dtype)
    return integer ^ ((integer >> (info.bits - 1)) & info.max)
