"""Patterns of token entropy (arXiv 2506.01939v2, section 3 and figure 2).

Every function queries the token table (``token_table.Tokens``) and returns a small data frame. A *fork* is a token
whose entropy exceeds a threshold (eq. 5). Intervals are 95%, clustered by prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from forkrl.analysis.token_table import Tokens, query, token_batches
from forkrl.stats.intervals import ClusterSums, Estimate, as_columns

LOW_ENTROPY = 0.01
"""Nats. In the paper, 50.64% of the tokens of Qwen3-8B are below it."""
PAPER_TEMPERATURE = 1.0
"""The paper's sampling and measuring temperature, on which both of its figures below depend."""
PAPER = {"share_below_0.01": 0.5064, "percentile_80": 0.672}
_PERCENTILES = (5, 25, 50, 75, 80, 90, 95, 99)


def entropy_summary(tokens: Tokens) -> pd.DataFrame:
    """Entropy statistics, one per row, with ``value`` and the ``paper``'s value (section 3).

    Percentiles are exact over all tokens. ``percentile_80`` is the paper's fork threshold.

    Raises:
        ValueError: there are no tokens, or an entropy is NaN or infinite.
    """
    fractions = [0.0, *(percent / 100 for percent in _PERCENTILES), 1.0]
    found = query(
        tokens,
        ["entropy"],
        f"""
        SELECT count(*) AS tokens, count(*) FILTER (entropy IS NULL OR NOT isfinite(entropy)) AS bad,
            avg(entropy::DOUBLE) AS mean, count(*) FILTER (entropy < {LOW_ENTROPY}::FLOAT) AS low,
            quantile_cont(greatest(entropy::DOUBLE, 0), {fractions}) AS quantiles
        FROM tokens
        """,
    ).iloc[0]
    count = int(found["tokens"])
    if count == 0:
        raise ValueError("no tokens: there is nothing to summarise")
    if found["bad"]:
        raise ValueError(f"entropy is NaN or infinite at {found['bad']} of {count} tokens")
    figures = {"tokens": float(count), "mean": found["mean"], f"share_below_{LOW_ENTROPY:g}": found["low"] / count}
    names = ["min", *(f"percentile_{percent}" for percent in _PERCENTILES), "max"]
    figures |= dict(zip(names, found["quantiles"], strict=True))
    frame = pd.DataFrame({"value": figures, "paper": {name: PAPER.get(name, np.nan) for name in figures}})
    frame.index.name = "figure"
    return frame


def entropy_histogram(tokens: Tokens, bins: int = 60) -> pd.DataFrame:
    """Tokens per entropy bin from 0 to the maximum (figure 2a plots their logarithm).

    Returns:
        ``low``, ``high`` (nats), ``tokens``, and counts in responses judged ``correct`` and ``incorrect``.
    """
    top = query(tokens, ["entropy"], "SELECT coalesce(max(entropy), 0)::DOUBLE AS top FROM tokens")["top"].iloc[0]
    edges = np.linspace(0.0, max(top, 0.1), bins + 1)
    counts = {name: np.zeros(bins, dtype=np.int64) for name in ("tokens", "correct", "incorrect")}
    for frame in token_batches(tokens, ["entropy", "correct"]):
        entropy_N = np.clip(frame["entropy"].to_numpy(), 0.0, edges[-1])
        correct_N, judged_N = frame["correct"].fillna(False).to_numpy(bool), frame["correct"].notna().to_numpy()
        for name, rows in (("tokens", slice(None)), ("correct", correct_N), ("incorrect", judged_N & ~correct_N)):
            counts[name] += np.histogram(entropy_N[rows], edges)[0]
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], **counts})


def token_types(tokens: Tokens, min_count: int = 100, threshold: float | None = None) -> pd.DataFrame:
    """Mean entropy of every token type seen at least ``min_count`` times, highest first (figure 2b and 2c).

    Args:
        min_count: the paper uses 100.
        threshold: fork threshold in nats, or None.

    Returns:
        ``token_id``, ``text``, ``count``, ``mean_entropy`` (at the position where the type was written) and, with a
        threshold, ``fork_share``.
    """
    found = query(
        tokens,
        ["token_id", "text", "entropy"],
        f"""
        SELECT token_id, any_value(text)::VARCHAR AS text, count(*) AS count, avg(entropy::DOUBLE) AS mean_entropy,
            avg((entropy::DOUBLE > $threshold)::INTEGER) AS fork_share
        FROM tokens GROUP BY token_id HAVING count(*) >= {max(min_count, 1)} ORDER BY mean_entropy DESC, token_id
        """,
        threshold=np.inf if threshold is None else threshold,
    )
    return found.drop(columns="fork_share") if threshold is None else found


def fork_contexts(tokens: Tokens, threshold: float, n: int = 2, min_count: int = 100) -> pd.DataFrame:
    """Contexts of ``n`` tokens with the entropy of the next token, those before most forks first.

    Args:
        threshold: fork threshold in nats.
        min_count: rarer contexts are left out.

    Returns:
        ``context`` (text), ``count``, ``forks``, ``fork_share``, ``mean_entropy``.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}: a context has at least one token")
    ids, texts = (", ".join(f"lag({name}, {back}) OVER w" for back in range(n, 0, -1)) for name in ("token_id", "text"))
    return query(
        tokens,
        ["prompt", "sample", "position", "token_id", "text", "entropy"],
        f"""
        SELECT any_value(context) AS context, count(*) AS count, sum(fork)::BIGINT AS forks, avg(fork) AS fork_share,
            avg(entropy) AS mean_entropy
        FROM (
            SELECT position, entropy::DOUBLE AS entropy, (entropy::DOUBLE > $threshold)::INTEGER AS fork,
                [{ids}] AS ids, concat({texts}) AS context
            FROM tokens WINDOW w AS (PARTITION BY prompt, sample ORDER BY position)
        )
        WHERE position >= {n} GROUP BY ids HAVING count(*) >= {max(min_count, 1)}
        ORDER BY forks DESC, count DESC, ids
        """,
        threshold=threshold,
    )


def fork_positions(tokens: Tokens, threshold: float, bins: int = 20) -> pd.DataFrame:
    """Share of forks and mean entropy by relative position in the response.

    Returns:
        ``low``, ``high`` (fractions of the response), ``tokens``, ``fork_share``, ``mean_entropy``, each of the last
        two with ``_low`` and ``_high``.
    """
    found = query(
        tokens,
        ["prompt", "position", "length", "entropy"],
        f"""
        SELECT prompt, least(floor((position + 0.5::DOUBLE) / length * {bins}), {bins - 1})::INTEGER AS part,
            count(*) AS tokens, sum((entropy::DOUBLE > $threshold)::INTEGER) AS forks,
            sum(entropy::DOUBLE) AS entropy
        FROM tokens GROUP BY prompt, part ORDER BY prompt, part
        """,
        threshold=threshold,
    )
    sums = _cluster_sums(found, bins, ["tokens", "forks", "entropy"])
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
    """Entropy and forks in correct and incorrect responses, and their difference.

    "difference" pools all tokens, so hard prompts weigh more among the incorrect. "difference within prompts" avoids
    that: the mean over prompts with both kinds of responses, with equal weights.

    Returns:
        Four rows (column ``responses``), with ``count`` of responses (of prompts in the last row), ``tokens``,
        ``mean_entropy`` and ``fork_share``, each of the last two with ``_low`` and ``_high``. Empty if no response was
        judged.
    """
    found = query(
        tokens,
        ["prompt", "position", "entropy", "correct"],
        """
        SELECT prompt, 1 - correct::INTEGER AS part, count(*) AS tokens, sum(entropy::DOUBLE) AS entropy,
            sum((entropy::DOUBLE > $threshold)::INTEGER) AS forks, count(*) FILTER (position = 0) AS responses
        FROM tokens WHERE correct IS NOT NULL GROUP BY prompt, part ORDER BY prompt, part
        """,
        threshold=threshold,
    )
    if found.empty:
        return pd.DataFrame()
    sums, within = _cluster_sums(found, 2, ["tokens", "entropy", "forks", "responses"]), ClusterSums(3)
    means = found.assign(entropy=found["entropy"] / found["tokens"], forks=found["forks"] / found["tokens"])
    both = means.pivot(index="prompt", columns="part", values=["entropy", "forks"]).dropna()
    for _, row in both.iterrows() if both.shape[1] == 4 else ():
        within.add([1.0, row["entropy", 0] - row["entropy", 1], row["forks", 0] - row["forks", 1]])
    rows = [
        _row(name, sums.total(at + 3), sums.total(at), sums.mean(at + 1, at), sums.share(at + 2, at))
        for name, at in (("correct", 0), ("incorrect", 4))
    ]
    differences = (sums.difference((4 + value, 4), (value, 0)) for value in (1, 2))
    rows.append(_row("difference", sums.total(3) + sums.total(7), sums.total(0) + sums.total(4), *differences))
    rows.append(_row("difference within prompts", within.total(0), np.nan, within.mean(1, 0), within.mean(2, 0)))
    return pd.DataFrame(rows)


def response_table(tokens: Tokens, threshold: float) -> pd.DataFrame:
    """Per response: ``prompt``, ``sample``, ``length``, ``correct``, ``mean_entropy``, ``forks``, ``fork_density``."""
    table = query(
        tokens,
        ["prompt", "sample", "length", "entropy", "correct"],
        """
        SELECT prompt, sample, any_value(length) AS length, any_value(correct) AS correct,
            avg(entropy::DOUBLE) AS mean_entropy, sum((entropy::DOUBLE > $threshold)::INTEGER)::BIGINT AS forks
        FROM tokens GROUP BY prompt, sample ORDER BY prompt, sample
        """,
        threshold=threshold,
    )
    table["fork_density"] = table["forks"] / table["length"]
    return table


def density_against_correctness(responses: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """Accuracy by fork density in equal parts, lowest density first.

    Args:
        responses: from :func:`response_table`; unjudged responses are left out.
        bins: parts; fewer if densities are tied.

    Returns:
        ``low``, ``high`` (fork density), ``responses``, ``accuracy``, ``accuracy_low``, ``accuracy_high``.
    """
    judged = responses[responses["correct"].notna()]
    if judged.empty:
        return pd.DataFrame()
    part = pd.qcut(judged["fork_density"], bins, labels=False, duplicates="drop").fillna(0).astype(int).to_numpy()
    rows = []
    for index in np.unique(part):
        inside = part == index
        right = judged["correct"][inside].astype(float).groupby(judged["prompt"][inside], sort=False)
        density = judged["fork_density"][inside]
        rows.append(
            {
                "low": float(density.min()),
                "high": float(density.max()),
                "responses": int(inside.sum()),
                **as_columns("accuracy", share_by_cluster(right.sum(), right.size())),
            }
        )
    return pd.DataFrame(rows)


def share_by_cluster(sums_P: Iterable[float], counts_P: Iterable[float]) -> Estimate:
    """A mean of zeros and ones, ``sum(sums) / sum(counts)`` over prompts; NaN if the counts sum to 0."""
    return _sums_by_cluster(sums_P, counts_P).share(0, 1)


def mean_by_cluster(sums_P: Iterable[float], counts_P: Iterable[float]) -> Estimate:
    """``sum(sums) / sum(counts)`` over prompts, with Student's interval; NaN if the counts sum to 0."""
    return _sums_by_cluster(sums_P, counts_P).mean(0, 1)


def _sums_by_cluster(sums_P: Iterable[float], counts_P: Iterable[float]) -> ClusterSums:
    clusters = ClusterSums(2)
    for pair in zip(sums_P, counts_P, strict=True):
        clusters.add(pair)
    return clusters


def _cluster_sums(found: pd.DataFrame, parts: int, columns: Sequence[str]) -> ClusterSums:
    prompt, prompts = pd.factorize(found["prompt"])
    values = np.zeros((len(prompts), parts, len(columns)))
    values[prompt, found["part"].to_numpy(int)] = found[list(columns)].to_numpy(float)
    sums = ClusterSums(parts * len(columns))
    for of_prompt in values:
        sums.add(of_prompt.ravel())
    return sums


def _row(name: str, count: float, tokens: float, entropy: Estimate, forks: Estimate) -> dict[str, str | float]:
    return {
        "responses": name,
        "count": count,
        "tokens": tokens,
        **as_columns("mean_entropy", entropy),
        **as_columns("fork_share", forks),
    }
