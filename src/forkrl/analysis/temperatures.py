"""Decoding with two temperatures: the sweep, broken outputs, and the figures (arXiv 2506.01939, eq. 5, Fig. 3).

Axes: ``P`` prompts, ``K`` responses to each, ``N`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from forkrl.stats.intervals import (
    Estimate,
    as_columns,
    mean_with_interval,
    mean_with_normal_interval,
    paired_difference,
)

PAPER_TEMPERATURES = (0.0, 0.05, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0)
FORK_FRACTION = 0.8
"""Entropy quantile of the paper's threshold: a fifth of the tokens is above it."""
LOOP_REPEATS, LOOP_TOKENS = 4, 32
NO_TEXT = "\N{REPLACEMENT CHARACTER}"

_Array = npt.NDArray[np.float64]


class Setting(NamedTuple):
    """Temperature at forks (``high``) and elsewhere (``low``)."""

    high: float
    low: float

    def __str__(self) -> str:
        return f"high {self.high:g}, low {self.low:g}"


UNSCALED = Setting(1.0, 1.0)
"""The model's own distribution."""


def plan_settings(temperatures: Sequence[float] = PAPER_TEMPERATURES, base: float = 1.0) -> list[Setting]:
    """(base, base), then the other temperatures at forks with ``base`` elsewhere, then the reverse."""
    if wrong := [value for value in temperatures if not 0 <= value < math.inf]:
        raise ValueError(f"{wrong[0]} is not a valid temperature")
    if len(set(temperatures)) < len(temperatures):
        raise ValueError(f"duplicate temperature among {', '.join(f'{value:g}' for value in temperatures)}")
    others = [temperature for temperature in temperatures if temperature != base]
    return [
        Setting(base, base),
        *(Setting(value, base) for value in others),
        *(Setting(base, value) for value in others),
    ]


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Whether it ends in a block repeated at least ``LOOP_REPEATS`` times over at least ``LOOP_TOKENS`` tokens.

    The last repetition may be partial. ``token_ids`` excludes a final stop token. Linear time.
    """
    ids = list(token_ids)[::-1]
    # common[p]: common prefix of the reversed text and its shift by p; with p more, it repeats a block of p tokens.
    common = _common_prefixes(ids)
    return any(common[p] + p >= max(LOOP_REPEATS * p, LOOP_TOKENS) for p in range(1, len(ids) // LOOP_REPEATS + 1))


def _common_prefixes(ids: Sequence[int]) -> list[int]:
    """Z-function: for each index, the longest common prefix of the sequence and its suffix from there."""
    common = [0] * len(ids)
    start = end = 0  # the interval [start, end) that matches a prefix and reaches furthest
    for place in range(1, len(ids)):
        length = min(end - place, common[place - start]) if place < end else 0
        while place + length < len(ids) and ids[length] == ids[place + length]:
            length += 1
        common[place] = length
        if place + length > end:
            start, end = place, place + length
    return common


def holds_no_text(response: str) -> bool:
    """Whether it has U+FFFD, the replacement for bytes that are not valid text."""
    return NO_TEXT in response


def temperature_table(responses: pd.DataFrame, base: float = 1.0) -> pd.DataFrame:
    """Statistics of every setting, with 95% intervals clustered by prompt.

    Args:
        responses: one row per response. ``high``, ``low``: the setting; ``prompt``: int, the same prompts in every
            setting, each equally often; ``score`` in [0, 1]; ``length``: tokens; ``cut``, ``loop``, ``garbled``: bool;
            ``surprise``: sum of -log-prob over its tokens under the unscaled model, nats; ``forks``: tokens above the
            threshold; ``failure``: empty, or why the verifier gave no result.
        base: temperature of the baseline setting (base, base).

    Returns:
        One row per setting, in order of first appearance. ``accuracy``, ``difference`` (of accuracy to the baseline,
        paired by prompt; NaN without it), ``length`` (tokens), ``broken`` (share that is cut, loops or is garbled) and
        ``surprise`` (nats per token), each also with ``_low`` and ``_high``; shares ``cut``, ``loop``, ``garbled``,
        ``forks``; counts ``prompts``, ``samples``, ``tokens``, ``failures``.

    Raises:
        ValueError: no responses, or the number of responses differs between prompts or settings.
    """
    if responses.empty:
        raise ValueError("no responses")
    groups = {
        Setting(float(high), float(low)): group for (high, low), group in responses.groupby(["high", "low"], sort=False)
    }
    baseline = groups.get(Setting(base, base))
    rows = [_figures(setting, group, baseline) for setting, group in groups.items()]
    if len({(row["prompts"], row["samples"]) for row in rows}) > 1:
        raise ValueError("the settings differ in their numbers of prompts or of responses to each")
    return pd.DataFrame(rows)


def _figures(setting: Setting, group: pd.DataFrame, baseline: pd.DataFrame | None) -> dict[str, Any]:
    score_PK, length_PK, tokens = _matrix(group, "score"), _matrix(group, "length"), int(group["length"].sum())
    broken = group[["cut", "loop", "garbled"]].any(axis=1)
    nothing = Estimate(np.nan, np.nan, np.nan)
    estimates = {
        "accuracy": mean_with_interval(score_PK),
        "difference": nothing if baseline is None else paired_difference(_matrix(baseline, "score"), score_PK),
        "length": mean_with_normal_interval(length_PK),
        "broken": mean_with_interval(_matrix(group.assign(broken=broken), "broken")),
        "surprise": _per_token(_matrix(group, "surprise"), length_PK),
    }
    row: dict[str, Any] = {"high": setting.high, "low": setting.low}
    for name, estimate in estimates.items():
        row |= as_columns(name, estimate)
    row |= {name: float(group[name].mean()) for name in ("cut", "loop", "garbled")}
    prompts, samples = score_PK.shape
    failures = int((group["failure"] != "").sum())
    row |= {"forks": float(group["forks"].sum()) / tokens, "prompts": prompts, "samples": samples}
    return row | {"tokens": tokens, "failures": failures}


def _matrix(group: pd.DataFrame, column: str) -> _Array:
    """``[P, K]``, sorted by prompt."""
    values = [part.to_numpy(np.float64) for _, part in group.groupby("prompt", sort=True)[column]]
    if len({len(part) for part in values}) > 1:
        raise ValueError("prompts differ in their number of responses")
    return np.stack(values)


def _per_token(sums_PK: _Array, lengths_PK: _Array) -> Estimate:
    """Ratio of sums; the interval uses deviations ``sum - ratio · length`` per mean length."""
    ratio = float(sums_PK.sum() / lengths_PK.sum())
    return mean_with_normal_interval(ratio + (sums_PK - ratio * lengths_PK) / lengths_PK.mean())
