"""What stands before a fork: the n-grams of tokens after which a model is undecided.

The number of distinct n-grams grows with the text, so they are found in two passes over bounded memory: Misra and
Gries's frequent items first, which cannot miss an n-gram that makes up more than 1 / ``CAPACITY`` of all; then those
are counted exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from forkrl.analysis.token_table import Tokens, token_batches

CAPACITY = 1 << 17
_ID_BITS = 21
MOST_TOKENS = 63 // _ID_BITS
"""Longest context: token ids of 21 bits each, packed into one integer."""


def fork_contexts(tokens: Tokens, threshold: float, n: int = 2, min_count: int = 100) -> pd.DataFrame:
    """Contexts of ``n`` tokens with the entropy of what follows them, those before most forks first.

    Args:
        tokens: the table.
        threshold: nats; what exceeds it is a fork.
        n: tokens of the context, 1 to 3.
        min_count: rarer contexts are left out.

    Returns:
        ``context`` (text), ``count``, ``forks``, ``fork_share``, ``mean_entropy``.

    Raises:
        ValueError: ``n`` is not 1 to 3.
    """
    if not 1 <= n <= MOST_TOKENS:
        raise ValueError(f"n = {n}: contexts of 1 to {MOST_TOKENS} tokens are counted")
    candidates = _frequent(tokens, n)
    sums = np.zeros((3, len(candidates)))
    texts: dict[int, str] = {}
    for frame, keys_N, rows_N in _keys(tokens, ["entropy", "text"], n):
        place_N, known = np.searchsorted(candidates, keys_N), np.isin(keys_N, candidates)
        entropy_N = frame["entropy"].to_numpy(np.float64)[rows_N][known]
        for row, weights_N in enumerate((None, entropy_N, entropy_N > threshold)):
            sums[row] += np.bincount(place_N[known], weights_N, minlength=len(candidates))
        first = frame.drop_duplicates("token_id")
        texts.update(zip(first["token_id"].tolist(), first["text"].astype(str).tolist(), strict=True))
    kept = np.flatnonzero(sums[0] >= max(min_count, 1))
    count, entropy, forks = sums[:, kept]
    found = pd.DataFrame(
        {
            "context": ["".join(texts[i] for i in _unpacked(int(key), n)) for key in candidates[kept]],
            "count": count.astype(int),
            "forks": forks.astype(int),
            "fork_share": forks / count,
            "mean_entropy": entropy / count,
        }
    )
    return found.sort_values(["forks", "count"], ascending=False, kind="stable", ignore_index=True)


def _frequent(tokens: Tokens, n: int) -> npt.NDArray[np.int64]:
    """Sorted keys among which are all n-grams that make up more than 1 / CAPACITY of all."""
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for _, keys_N, _ in _keys(tokens, [], n):
        new, new_counts = np.unique(keys_N, return_counts=True)
        merged, owner = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(owner, np.concatenate([counts, new_counts])).astype(np.int64)
        keys = merged
        if len(keys) > CAPACITY:
            counts = counts - np.partition(counts, -CAPACITY - 1)[-CAPACITY - 1]
            keys, counts = keys[counts > 0], counts[counts > 0]
    return keys


def _keys(
    tokens: Tokens, columns: list[str], n: int
) -> Iterator[tuple[pd.DataFrame, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Batches, the packed n-gram before each row that has one, and which rows those are."""
    for frame in token_batches(tokens, ["token_id", "position", *columns]):
        ids_N = frame["token_id"].to_numpy(np.int64)
        rows_N = np.flatnonzero(frame["position"].to_numpy() >= n)
        keys_N = np.zeros(len(rows_N), dtype=np.int64)
        for back in range(n, 0, -1):
            keys_N = (keys_N << _ID_BITS) | ids_N[rows_N - back]
        yield frame, keys_N, rows_N


def _unpacked(key: int, n: int) -> list[int]:
    return [(key >> (_ID_BITS * back)) & ((1 << _ID_BITS) - 1) for back in range(n - 1, -1, -1)]
