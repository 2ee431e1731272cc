"""Patterns of token entropy (arXiv 2506.01939v2, section 3 and figure 2), and what the paper left out.

Every function reads the table of tokens (``token_table.Tokens``) batch by batch and returns a small data frame. A
*fork* is a token whose entropy exceeds a threshold, as in eq. 5. Intervals are 95% and clustered by prompt: responses
to one prompt are alike, and tokens of one response even more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from forkrl.analysis.quantiles import exact_quantiles
from forkrl.analysis.token_table import Tokens, token_batches
from forkrl.stats.intervals import ClusterSums, Estimate, as_columns

LOW_ENTROPY = 0.01
"""Nats. The paper finds 50.64% of the tokens of Qwen3-8B below it."""
PAPER_TEMPERATURE = 1.0
"""Of the paper's responses and entropies. Both figures below depend on it."""
PAPER = {"share_below_0.01": 0.5064, "percentile_80": 0.672}
_PERCENTILES = (5, 25, 50, 75, 80, 90, 95, 99)

SlottedValues: TypeAlias = Sequence[tuple[npt.NDArray[np.integer], npt.NDArray[np.generic]]]
"""(slot of each row, value of each row), ``[N]`` each: summed over the rows of each prompt, slot by slot."""


def entropy_summary(tokens: Tokens) -> pd.DataFrame:
    """Where the entropies of a model lie: one figure a row, ``value`` beside what the ``paper`` found (section 3).

    Percentiles are exact over all tokens. ``percentile_80`` is the paper's threshold of a fork.

    Raises:
        ValueError: there are no tokens, or an entropy is NaN or infinite.
    """
    quantiles = exact_quantiles(lambda: _entropies(tokens), [0.0, *(p / 100 for p in _PERCENTILES), 1.0])
    count, total, low = 0, 0.0, 0
    for entropy_N in _entropies(tokens):
        count += len(entropy_N)
        total += float(entropy_N.sum(dtype=np.float64))
        low += int((entropy_N < LOW_ENTROPY).sum())
    figures = {"tokens": float(count), "mean": total / count, f"share_below_{LOW_ENTROPY:g}": low / count}
    names = ["min", *(f"percentile_{percent}" for percent in _PERCENTILES), "max"]
    figures |= dict(zip(names, quantiles.tolist(), strict=True))
    frame = pd.DataFrame({"value": figures, "paper": {name: PAPER.get(name, np.nan) for name in figures}})
    frame.index.name = "figure"
    return frame


def entropy_histogram(tokens: Tokens, bins: int = 60) -> pd.DataFrame:
    """Tokens per entropy bin from 0 to the largest (figure 2a draws their logarithm).

    Returns:
        ``low``, ``high`` (nats), ``tokens``, and of these those of responses judged ``correct`` and ``incorrect``.
    """
    top = max((float(entropy_N.max()) for entropy_N in _entropies(tokens) if len(entropy_N)), default=0.0)
    edges = np.linspace(0.0, max(top, 0.1), bins + 1)
    counts = {name: np.zeros(bins, dtype=np.int64) for name in ("tokens", "correct", "incorrect")}
    for frame in token_batches(tokens, ["entropy", "correct"]):
        entropy_N, verdict_N = np.clip(frame["entropy"].to_numpy(), 0.0, edges[-1]), _verdicts(frame)
        for name, rows in (("tokens", slice(None)), ("correct", verdict_N == 1), ("incorrect", verdict_N == 0)):
            counts[name] += np.histogram(entropy_N[rows], edges)[0]
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], **counts})


def token_types(tokens: Tokens, min_count: int = 100, threshold: float | None = None) -> pd.DataFrame:
    """Mean entropy of every token type seen at least ``min_count`` times, highest first (figure 2b and 2c).

    The entropy is that of the position where the type was written: how undecided the model was when it wrote it.

    Args:
        tokens: the table.
        min_count: rarer types are left out; the paper takes 100.
        threshold: nats; with it, ``fork_share`` is the share of the type's tokens that are forks.

    Returns:
        ``token_id``, ``text``, ``count``, ``mean_entropy`` and, with a threshold, ``fork_share``.
    """
    sums = np.zeros((3, 0))
    texts: dict[int, str] = {}
    for frame in token_batches(tokens, ["token_id", "text", "entropy"]):
        ids_N, entropy_N = frame["token_id"].to_numpy(), frame["entropy"].to_numpy(np.float64)
        if len(ids_N) == 0:
            continue
        sums = np.pad(sums, ((0, 0), (0, max(int(ids_N.max()) + 1 - sums.shape[1], 0))))
        forks_N = entropy_N > threshold if threshold is not None else np.zeros(len(ids_N))
        for row, weights_N in enumerate((None, entropy_N, forks_N)):
            sums[row] += np.bincount(ids_N, weights_N, minlength=sums.shape[1])
        first = frame.drop_duplicates("token_id")
        texts.update(zip(first["token_id"].tolist(), first["text"].astype(str).tolist(), strict=True))
    ids = np.flatnonzero(sums[0] >= max(min_count, 1))
    count, entropy, forks = sums[:, ids]
    found = pd.DataFrame(
        {
            "token_id": ids,
            "text": [texts[int(i)] for i in ids],
            "count": count.astype(int),
            "mean_entropy": entropy / count,
        }
    )
    if threshold is not None:
        found["fork_share"] = forks / count
    return found.sort_values("mean_entropy", ascending=False, kind="stable", ignore_index=True)


def fork_positions(tokens: Tokens, threshold: float, bins: int = 20) -> pd.DataFrame:
    """Where in a response the forks lie: share of forks and mean entropy by relative position.

    Returns:
        ``low``, ``high`` (fractions of the response), ``tokens``, ``fork_share``, ``mean_entropy``, each of the last
        two with ``_low`` and ``_high``.
    """

    def features(frame: pd.DataFrame) -> SlottedValues:
        place_N = (frame["position"].to_numpy() + 0.5) / frame["length"].to_numpy()
        bin_N = np.minimum((place_N * bins).astype(np.int64), bins - 1)
        entropy_N = frame["entropy"].to_numpy(np.float64)
        return [(3 * bin_N, np.ones(len(frame))), (3 * bin_N + 1, entropy_N > threshold), (3 * bin_N + 2, entropy_N)]

    sums = ClusterSums(3 * bins)
    for vector in sums_by_prompt(tokens, ["position", "length", "entropy"], 3 * bins, features):
        sums.add(vector)
    rows = [
        {
            "low": index / bins,
            "high": (index + 1) / bins,
            "tokens": int(sums.total(3 * index)),
            **as_columns("fork_share", sums.share(3 * index + 1, 3 * index)),
            **as_columns("mean_entropy", sums.mean(3 * index + 2, 3 * index)),
        }
        for index in range(bins)
    ]
    return pd.DataFrame(rows)


def correct_against_incorrect(tokens: Tokens, threshold: float) -> pd.DataFrame:
    """Entropy and forks of the tokens of correct and of incorrect responses, and their difference.

    "difference" compares all correct with all incorrect tokens; hard prompts weigh more among the incorrect.
    "difference within prompts" is free of that: the mean over prompts with responses of both kinds, each prompt
    counting once.

    Returns:
        Four rows (``responses``: which), with ``count`` of responses (of prompts, in the last row), ``tokens``,
        ``mean_entropy`` and ``fork_share``, each of the last two with ``_low`` and ``_high``. Empty where no response
        was judged.
    """

    def features(frame: pd.DataFrame) -> SlottedValues:
        start_N = 4 * np.array([1, 0, 2])[_verdicts(frame)]  # incorrect, correct and, as index -1, not judged
        entropy_N = frame["entropy"].to_numpy(np.float64)
        first_N = frame["position"].to_numpy() == 0
        values = (np.ones(len(start_N)), entropy_N, entropy_N > threshold, first_N)
        return [(start_N + slot, value_N) for slot, value_N in enumerate(values)]

    sums, within = ClusterSums(12), ClusterSums(3)
    for vector in sums_by_prompt(tokens, ["position", "entropy", "correct"], 12, features):
        sums.add(vector)
        right, wrong = vector[:4], vector[4:8]
        if right[0] and wrong[0]:
            within.add([1.0, right[1] / right[0] - wrong[1] / wrong[0], right[2] / right[0] - wrong[2] / wrong[0]])
    if not sums.total(0) + sums.total(4):
        return pd.DataFrame()
    rows = [
        _row(name, sums.total(at + 3), sums.total(at), sums.mean(at + 1, at), sums.share(at + 2, at))
        for name, at in (("correct", 0), ("incorrect", 4))
    ]
    differences = (sums.difference((4 + value, 4), (value, 0)) for value in (1, 2))
    rows.append(_row("difference", sums.total(3) + sums.total(7), sums.total(0) + sums.total(4), *differences))
    rows.append(_row("difference within prompts", within.total(0), np.nan, within.mean(1, 0), within.mean(2, 0)))
    return pd.DataFrame(rows)


def response_table(tokens: Tokens, threshold: float) -> pd.DataFrame:
    """One row a response: ``prompt``, ``sample``, ``length``, ``correct``, ``mean_entropy``, ``forks``.

    And ``fork_density``, the share of its tokens that are forks.
    """
    parts = []
    for frame in token_batches(tokens, ["prompt", "sample", "length", "entropy", "correct"]):
        entropy_N = frame["entropy"].astype(np.float64)  # pandas averages fp32 in fp32 otherwise
        whole = frame.assign(entropy=entropy_N, fork=entropy_N > threshold)
        grouped = whole.groupby(["prompt", "sample"], sort=False, observed=True)
        found = grouped.agg(
            length=("length", "first"),
            correct=("correct", "first"),
            mean_entropy=("entropy", "mean"),
            forks=("fork", "sum"),
        ).reset_index()
        parts.append(found)
    table = pd.concat(parts, ignore_index=True)
    table["fork_density"] = table["forks"] / table["length"]
    return table


def density_against_correctness(responses: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """Accuracy of responses with few forks and with many: equal parts by fork density, sparse first.

    Args:
        responses: from :func:`response_table`; those that nothing judged are left out.
        bins: parts; fewer where densities are tied.

    Returns:
        ``low``, ``high`` (fork density), ``responses``, ``accuracy``, ``accuracy_low``, ``accuracy_high``.
    """
    judged = responses[responses["correct"].notna()]
    if judged.empty:
        return pd.DataFrame()
    part = pd.qcut(judged["fork_density"], bins, labels=False, duplicates="drop").fillna(0).astype(int).to_numpy()
    correct = judged["correct"].to_numpy(float)
    rows = []
    for index in np.unique(part):
        inside = part == index
        sums = ClusterSums(2)
        for _, group in judged[inside].assign(value=correct[inside]).groupby("prompt", sort=False):
            sums.add([group["value"].sum(), len(group)])
        density = judged["fork_density"][inside]
        rows.append(
            {
                "low": float(density.min()),
                "high": float(density.max()),
                "responses": int(inside.sum()),
                **as_columns("accuracy", sums.share(0, 1)),
            }
        )
    return pd.DataFrame(rows)


def sums_by_prompt(
    tokens: Tokens, columns: Sequence[str], width: int, features: Callable[[pd.DataFrame], SlottedValues]
) -> Iterator[npt.NDArray[np.float64]]:
    """The ``[width]`` sums of each prompt's tokens, prompt after prompt, in constant memory.

    Raises:
        ValueError: the rows of a prompt do not follow each other.
    """
    current, pending = -1, np.zeros(width)
    for frame in token_batches(tokens, ["prompt", *columns]):
        prompts_N = frame["prompt"].to_numpy()
        if len(prompts_N) == 0:
            continue
        if (np.diff(prompts_N) < 0).any() or prompts_N[0] < current:
            raise ValueError("the table of tokens is not ordered by prompt; sort it by prompt, sample and position")
        prompts_U, owner_N = np.unique(prompts_N, return_inverse=True)
        sums_UW = np.zeros(len(prompts_U) * width)
        for slot, value_N in features(frame):
            sums_UW += np.bincount(owner_N * width + slot, value_N, minlength=len(sums_UW))
        for prompt, vector in zip(prompts_U.tolist(), sums_UW.reshape(-1, width), strict=True):
            if prompt != current:
                if current >= 0:
                    yield pending
                current, pending = prompt, np.zeros(width)
            pending = pending + vector
    if current >= 0:
        yield pending


def _entropies(tokens: Tokens) -> Iterator[npt.NDArray[np.floating]]:
    return (frame["entropy"].to_numpy() for frame in token_batches(tokens, ["entropy"]))


def _verdicts(frame: pd.DataFrame) -> npt.NDArray[np.int64]:
    """1 correct, 0 incorrect, -1 not judged."""
    correct = frame["correct"]
    return np.where(correct.isna(), -1, correct.fillna(False).astype(bool).astype(np.int64))


def _row(name: str, count: float, tokens: float, entropy: Estimate, forks: Estimate) -> dict[str, str | float]:
    return {
        "responses": name,
        "count": count,
        "tokens": tokens,
        **as_columns("mean_entropy", entropy),
        **as_columns("fork_share", forks),
    }
