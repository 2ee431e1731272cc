"""The figures of a step by their names in ``metrics.jsonl``, from what verl and the workers counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from forkrl.training.metrics import part_metrics, rollout_metrics
from forkrl.types import RolloutGroup

TOLD = "actor/forkrl/"
"""The workers' sums, as verl hands them on: means over the gradient steps of a batch."""


def step_figures(
    metrics: dict[str, Any],
    timing: Mapping[str, float],
    kept: Sequence[RolloutGroup],
    dropped: Sequence[RolloutGroup],
    *,
    num_batches: float,
    reward: float,
    seconds: float,
) -> dict[str, float]:
    """All that a local run logs of a step, by the same names; takes the workers' sums out of ``metrics``.

    Args:
        metrics: verl's of this step.
        timing: verl's, in seconds.
        kept: the groups trained on.
        dropped: those drawn and not trained on: all right, all wrong, one too many, or short of a response.
        num_batches: prompts drawn, in batches of a step's size.
        reward: mean of the kept responses, the penalty for long ones in it.
        seconds: the step in all.
    """
    told = {name.removeprefix(TOLD): float(metrics.pop(name)) for name in list(metrics) if name.startswith(TOLD)}
    sampled = [*kept, *dropped]
    dropped = [group for group in dropped if min(group.scores) == max(group.scores)]  # as the local engine counts
    rollout_s = timing.get("gen", 0.0)
    # verl judges each response while others are being sampled: what rewards take is inside the time of the rollout.
    figures = rollout_metrics(sampled, dropped, len(kept), 1, {"rollout": max(rollout_s, 1e-9), "reward": 0.0})
    return (
        figures
        | part_metrics(sampled, dropped)
        | _update_figures(told)
        | {
            "sampling/generation_batches": num_batches,
            "reward/mean": reward,
            "grad/norm": float(metrics["actor/grad_norm"]),
            "optimizer/lr": float(metrics["actor/lr"]),
            "time/update_s": timing.get("old_log_prob", 0.0) + timing.get("update_actor", 0.0),
            "time/step_s": seconds,
        }
    )


def _update_figures(told: Mapping[str, float]) -> dict[str, float]:
    rest = told["response"] - told["selected"]
    return {
        **{name: told[name] for name in told if name.startswith("loss/")},
        "loss/ratio_max": told["ratio_max"],
        "entropy/mean": _ratio(told["entropy"], told["response"]),
        "entropy/threshold": told["threshold_min"] if math.isfinite(told["threshold_min"]) else math.nan,
        "entropy/selected_mean": _ratio(told["entropy_selected"], told["selected"]),
        "entropy/unselected_mean": _ratio(told["entropy"] - told["entropy_selected"], rest),
        "selection/kept_fraction": _ratio(told["selected"], told["response"]),
        "selection/kept_fraction_positive": _ratio(told["positive_selected"], told["positive"]),
        "selection/kept_fraction_negative": _ratio(told["negative_selected"], told["negative"]),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
