"""How training changes entropy (arXiv 2506.01939v2, section 4: table 1, figures 4 and 5).

All compare policies on the *same* tokens, responses of the final model. Axes: ``B`` sequences, ``T`` token positions,
``N`` response tokens in reading order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from forkrl.method.selection import select_tokens
from forkrl.stats.intervals import ClusterSums, Estimate, as_columns
from forkrl.types import require_tensors


def overlap_ratio(entropy_a: Tensor, entropy_b: Tensor, response_mask: Tensor, ratio: float = 0.2) -> float:
    """Share of one policy's top ``ratio`` of positions by entropy that are in the other's top too (table 1).

    Both tops hold ``max(1, ceil(ratio * N))`` positions (ties: the earliest), so the measure is symmetric.

    Args:
        entropy_a: nats, any shape.
        entropy_b: of another policy at the same positions.
        response_mask: bool, same shape.
        ratio: in (0, 1].

    Raises:
        ValueError: there is no response token, or as :func:`forkrl.select_tokens`.
    """
    require_tensors(entropy_a=entropy_a, entropy_b=entropy_b, response_mask=response_mask)
    if not bool(response_mask.any()):
        raise ValueError("response_mask is empty: there are no positions to compare")
    top_a = select_tokens(entropy_a, response_mask, "top_entropy", ratio)
    top_b = select_tokens(entropy_b, response_mask, "top_entropy", ratio)
    return int((top_a & top_b).sum()) / int(top_a.sum())


def overlap_table(entropies: Mapping[str, Tensor], prompts: Tensor, ratio: float = 0.2) -> pd.DataFrame:
    """Table 1: overlap of each checkpoint's top positions with those of the first and last, with intervals.

    Args:
        entropies: ``[N]`` in nats by checkpoint name, in training order.
        prompts: ``[N]`` int64, the prompt of each token; intervals are clustered by it.
        ratio: in (0, 1].

    Returns:
        ``checkpoint``, ``with_first``, ``with_last``, the last two with ``_low`` and ``_high``.
    """
    everything = torch.ones(prompts.shape, dtype=torch.bool)
    names = list(entropies)
    owner_N = np.unique(prompts.cpu().numpy(), return_inverse=True)[1]

    def top(name: str) -> _Top:
        entropy_N = entropies[name].cpu()
        return _Top(entropy_N, select_tokens(entropy_N, everything, "top_entropy", ratio))

    ends = {end: top(end) for end in (names[0], names[-1])}
    rows = []
    for name in names:
        row: dict[str, str | float] = {"checkpoint": name}
        for column, end in (("with_first", names[0]), ("with_last", names[-1])):
            # The overlap with itself is known exactly.
            share = Estimate(1.0, 1.0, 1.0) if name == end else _overlap(top(name), ends[end], owner_N)
            row |= as_columns(column, share)
        rows.append(row)
    return pd.DataFrame(rows)


def entropy_change_by_percentile(base: Tensor, trained: Tensor, mask: Tensor, bins: int = 20) -> pd.DataFrame:
    """Figure 4: mean entropy change per percentile range of the base policy's entropy.

    Tokens are ranked by base entropy (ties: the earlier first) and cut into ``bins`` parts, equal to within one token.
    Beware of regression to the mean: a token that ranks high by chance tends to fall.

    Args:
        base: nats, ``[B, T]`` or any shape.
        trained: of another policy at the same positions.
        mask: bool, same shape; True at the tokens that count.
        bins: parts; 20 give the paper's 5% ranges.

    Returns:
        ``from_percentile``, ``to_percentile``, ``tokens``, ``base_mean``, ``trained_mean``, ``change`` (trained minus
        base, nats), and for ``[B, T]`` also ``change_low`` and ``change_high`` (95%, clustered by sequence).

    Raises:
        ValueError: shapes differ, an entropy is not finite, or there are fewer tokens than bins.
    """
    require_tensors(base=base, trained=trained, mask=mask)
    if not base.shape == trained.shape == mask.shape:
        raise ValueError(
            f"base {tuple(base.shape)}, trained {tuple(trained.shape)} and mask {tuple(mask.shape)} do not match"
        )
    base_N, trained_N = base[mask].cpu().double(), trained[mask].cpu().double()
    clusters_N = mask.nonzero()[:, 0].cpu() if mask.ndim > 1 else None
    return change_table(base_N, trained_N, clusters_N, bins)


def change_table(base_N: Tensor, trained_N: Tensor, clusters_N: Tensor | None, bins: int = 20) -> pd.DataFrame:
    """``entropy_change_by_percentile`` on CPU tensors ``[N]``; ``clusters_N``: the prompt of each token."""
    if len(base_N) < bins:
        raise ValueError(f"{len(base_N)} tokens are fewer than the {bins} percentile ranges; give more, or fewer bins")
    if not bool(base_N.isfinite().all() and trained_N.isfinite().all()):
        raise ValueError("an entropy is NaN or infinite")
    rank_N = torch.empty(len(base_N), dtype=torch.int64)
    rank_N[base_N.argsort(stable=True)] = torch.arange(len(base_N))
    bin_N = (rank_N * bins // len(base_N)).numpy()
    owner_N = np.zeros(len(bin_N), dtype=np.int64)
    if clusters_N is not None:
        owner_N = np.unique(clusters_N.numpy(), return_inverse=True)[1]
    width = 3 * bins
    sums_UW = np.zeros((int(owner_N.max()) + 1) * width)
    values = (np.ones(len(bin_N)), base_N.numpy(), (trained_N - base_N).numpy())
    for slot, value_N in enumerate(values):
        sums_UW += np.bincount(owner_N * width + 3 * bin_N + slot, value_N, minlength=len(sums_UW))
    sums = ClusterSums(width)
    for vector in sums_UW.reshape(-1, width):
        sums.add(vector)
    rows = []
    for index in range(bins):
        count, base_mean = sums.total(3 * index), sums.total(3 * index + 1) / sums.total(3 * index)
        change = sums.mean(3 * index + 2, 3 * index)
        rows.append(
            {
                "from_percentile": 100 * index / bins,
                "to_percentile": 100 * (index + 1) / bins,
                "tokens": int(count),
                "base_mean": base_mean,
                "trained_mean": base_mean + change.mean,
                **(as_columns("change", change) if clusters_N is not None else {"change": change.mean}),
            }
        )
    return pd.DataFrame(rows)


def percentile_table(
    entropies: Mapping[str, Tensor], percentiles: Sequence[float] = tuple(range(0, 101, 5))
) -> pd.DataFrame:
    """Figure 5: entropy percentiles in nats, one row per checkpoint.

    Args:
        entropies: ``[N]`` in nats by checkpoint name, in training order.
        percentiles: in [0, 100].

    Raises:
        ValueError: there are no tokens.
    """
    rows = []
    for name, entropy_N in entropies.items():
        if len(entropy_N) == 0:
            raise ValueError(f"{name}: no tokens to take percentiles of")
        entropy_N = entropy_N.cpu().double()
        values = np.percentile(entropy_N.numpy(), list(percentiles))
        columns = [f"percentile_{percent:g}" for percent in percentiles]
        rows.append(
            {
                "checkpoint": name,
                "mean": float(entropy_N.mean()),
                **dict(zip(columns, values.tolist(), strict=True)),
            }
        )
    return pd.DataFrame(rows)


class _Top(NamedTuple):
    entropy: Tensor
    selected: Tensor

    def at_border(self, other: _Top) -> float:
        """Share of ``other``'s top among the hundredth of the tokens (at least 40) around this one's border."""
        order_N = self.entropy.argsort(descending=True, stable=True)
        border, width = int(self.selected.sum()), max(len(order_N) // 200, 20)
        return float(other.selected[order_N[max(border - width, 0) : border + width]].double().mean())


def _overlap(a: _Top, b: _Top, owner_N: npt.NDArray[np.int64]) -> Estimate:
    """Overlap of two tops of equal size; the interval accounts for tokens that a prompt displaces from a top."""
    tops = (a.selected & b.selected, a.selected, b.selected)
    both_C, in_a_C, in_b_C = (np.bincount(owner_N, top_N.numpy()) for top_N in tops)
    fair_C = in_a_C.sum() / len(owner_N) * np.bincount(owner_N)
    value_C = both_C - a.at_border(b) * (in_a_C - fair_C) - b.at_border(a) * (in_b_C - fair_C)
    sums = ClusterSums(2)
    for vector in np.stack([value_C, fair_C], axis=1):
        sums.add(vector)
    # K of N tokens are in the top: two unrelated tops are K draws without replacement, worth K / (1 - K / N).
    num_top = int(in_a_C.sum())
    share = sums.share(0, 1, most=num_top / max(1 - num_top / len(owner_N), 1 / len(owner_N)))
    return share._replace(mean=int(both_C.sum()) / num_top)  # exact mean
