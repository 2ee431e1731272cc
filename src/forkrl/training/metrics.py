"""Metrics of one step. Axes: ``B`` sequences, ``T`` token positions, ``P`` prompts, ``G`` rollouts per prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from forkrl.rollout.held_out import by_source
from forkrl.training.update import Update
from forkrl.types import FAILURES, RolloutGroup, TokenBatch


def rollout_metrics(
    sampled: Sequence[RolloutGroup],
    dropped: Sequence[RolloutGroup],
    num_kept: int,
    num_batches: int,
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """Metrics of everything sampled, and of the groups that dynamic sampling kept and dropped."""
    rollouts = [rollout for group in sampled for rollout in group.rollouts]
    num_tokens = sum(map(len, rollouts))
    return {
        "reward/accuracy": accuracy(sampled),
        "response/length": num_tokens / len(rollouts),
        "response/truncated_fraction": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
        "rollout/tokens": float(num_tokens),
        "rollout/tokens_per_s": num_tokens / seconds["rollout"],
        "sampling/generation_batches": float(num_batches),
        "sampling/groups_kept": float(num_kept),
        "sampling/dropped_all_right": float(sum(min(group.scores) == 1 for group in dropped)),
        "sampling/dropped_all_wrong": float(sum(min(group.scores) < 1 for group in dropped)),
        **_term_metrics(sampled),
        **_failures(sampled),
        "time/rollout_s": seconds["rollout"],
        "time/reward_s": seconds["reward"],
    }


def part_metrics(sampled: Sequence[RolloutGroup], dropped: Sequence[RolloutGroup]) -> dict[str, float]:
    """Sampling metrics per part of a mixed task, as ``area/name/PART``; empty if unmixed."""
    metrics: dict[str, float] = {}
    for source, groups in by_source(sampled).items():
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        metrics |= {
            f"reward/accuracy/{source}": accuracy(groups),
            f"response/length/{source}": sum(map(len, rollouts)) / len(rollouts),
            f"response/truncated_fraction/{source}": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
            f"sampling/groups/{source}": float(len(groups)),
            f"sampling/dropped/{source}": float(sum(group.prompt.source == source for group in dropped)),
        }
    return metrics


def level_metrics(levels: Mapping[str, int]) -> dict[str, float]:
    """The level of each curriculum, as ``task/level/PART``; ``task/level`` in an unmixed task."""
    return {f"task/level/{source}".rstrip("/"): float(level) for source, level in levels.items()}


def update_metrics(parts: Sequence[TokenBatch], updates: Sequence[Update]) -> dict[str, float]:
    """Means over gradient steps and selection statistics, by the rollout's entropies except ``entropy/threshold``."""
    means = {name: sum(update.metrics[name] for update in updates) / len(updates) for name in updates[0].metrics}
    entropy_N = torch.cat([part.rollout_entropy[part.response_mask] for part in parts])
    kept_N = torch.cat([update.selected_BT[part.response_mask] for part, update in zip(parts, updates, strict=True)])
    advantages_N = torch.cat(
        [part.advantages[:, None].expand_as(part.response_mask)[part.response_mask] for part in parts]
    )
    thresholds = [update.metrics["entropy/threshold"] for update in updates]
    return means | {
        "loss/ratio_max": max(update.metrics["loss/ratio_max"] for update in updates),
        "entropy/mean": _mean(entropy_N),
        "entropy/threshold": min((each for each in thresholds if not math.isnan(each)), default=math.nan),
        "entropy/selected_mean": _mean(entropy_N[kept_N]),
        "entropy/unselected_mean": _mean(entropy_N[~kept_N]),
        "selection/kept_fraction": _mean(kept_N),
        "selection/kept_fraction_positive": _mean(kept_N[advantages_N > 0]),
        "selection/kept_fraction_negative": _mean(kept_N[advantages_N < 0]),
    }


def accuracy(groups: Sequence[RolloutGroup]) -> float:
    scores = [score for group in groups for score in group.scores]
    return sum(scores) / len(scores)


def _term_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """The mean of each of ``reward.terms``, before its weight; a failure counts as 0."""
    results = [result for group in groups for result in group.results]
    return {
        f"reward/terms/{name}": sum(result.terms[name].score for result in results) / len(results)
        for name in results[0].terms
    }


def _failures(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Failed responses in total and by reason; always includes every reason."""
    results = [each for group in groups for result in group.results for each in (result, *result.terms.values())]
    counts = Counter(result.failure for result in results if result.failure)
    by_reason = {f"verifier/failures_{reason}": float(counts[reason]) for reason in FAILURES}
    return {"verifier/failures": float(counts.total()), **by_reason}


def _mean(values_N: Tensor) -> float:
    return float(values_N.float().mean()) if len(values_N) else math.nan
