"""Writes the run folder from verl's trainer; ``verl/`` holds its checkpoints, log, outcome and a stop request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forkrl.config import SelectionConfig
from forkrl.errors import NothingToLearn, TrainingHalted, UserError
from forkrl.store.atomic import write_text
from forkrl.store.run_folder import RunFolder
from forkrl.training.metrics import part_metrics, rollout_metrics
from forkrl.training.rollout_rows import evaluation_rows
from forkrl.types import RolloutGroup

OWN, ENDED, STOP, BEGUN = "verl", "ended.json", "stop", "begun"
PROGRESS = "forkrl.json"
"""File in each verl checkpoint with the size of the run's metrics."""
FROM_WORKERS = "actor/forkrl/"
"""Prefix of the workers' sums, which verl averages over the gradient steps of a batch."""


class StopRequested(Exception):
    """The launcher requested a stop after the current step."""


class Record:
    """Writes into the launcher's run folder and holds its lock; samples ``sampled`` responses every ``every`` steps."""

    def __init__(self, path: Path, *, every: int, sampled: int) -> None:
        self.folder = RunFolder.open(path)
        self.every, self.sampled = every, sampled

    def wants_rows(self, step: int) -> bool:
        return bool(self.sampled) and step % self.every == 0

    def add_step(self, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a line of metrics.jsonl and, if there are rows, a file in rollouts/."""
        if rows:
            self.folder.write_rollouts(f"train-{step:06d}", rows)
        self.folder.append_metrics({"step": step, **metrics})

    def add_evaluation(
        self,
        step: int,
        figures: Mapping[str, float],
        groups: Sequence[RolloutGroup],
        tokenizer: Any,
        selection: SelectionConfig,
        seed: int,
    ) -> None:
        """An evaluation; without rows if the entropies are unknown."""
        written = groups[: max(1, self.sampled // max(1, len(groups[0].rollouts)))] if groups else []
        if written and all(len(rollout.entropy) == len(rollout) for group in written for rollout in group.rollouts):
            rows = evaluation_rows(step, written, tokenizer, selection, seed=seed)
            self.folder.write_rollouts(f"eval-{step:06d}", rows)
        self.folder.write_scores(step, {group.prompt.id: group.scores for group in groups})
        self.folder.append_metrics({"step": step, **{f"eval/{name}": value for name, value in figures.items()}})

    def before_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Note the size of the run's metrics in a checkpoint that verl is about to write."""
        checkpoint.mkdir(parents=True, exist_ok=True)
        write_text(checkpoint / PROGRESS, json.dumps({"step": step, "metrics_bytes": self.folder.metrics_bytes}))

    def begin_step(self) -> None:
        """Tell the launcher that training has begun; raises StopRequested if it requested a stop."""
        (self.folder.path / OWN / BEGUN).touch()
        if (self.folder.path / OWN / STOP).exists():
            raise StopRequested


def note_end(run_folder: str | None, error: BaseException, step: int) -> None:
    """Record the error message that ends the run for the launcher, instead of a traceback."""
    kinds = (UserError, NothingToLearn, TrainingHalted, StopRequested)
    kind = next((each.__name__ for each in kinds if isinstance(error, each)), "")
    if run_folder is not None and kind and (Path(run_folder) / OWN).is_dir():
        message = str(getattr(error, "cause", None) or error)
        write_text(Path(run_folder) / OWN / ENDED, json.dumps({"kind": kind, "message": message, "step": step}))


def step_metrics(
    metrics: dict[str, Any],
    timing: Mapping[str, float],
    kept: Sequence[RolloutGroup],
    dropped: Sequence[RolloutGroup],
    *,
    num_batches: float,
    reward: float,
    seconds: float,
) -> dict[str, float]:
    """All metrics that a local run logs for a step; removes the workers' sums from ``metrics``.

    ``dropped`` groups were all right, all wrong, surplus or incomplete; ``num_batches`` is in batches of a step's size;
    ``reward`` includes the overlong penalty; ``timing`` and ``seconds`` (the whole step) are in seconds.
    """
    names = [name for name in metrics if name.startswith(FROM_WORKERS)]
    sums = {name.removeprefix(FROM_WORKERS): float(metrics.pop(name)) for name in names}
    sampled = [*kept, *dropped]
    dropped = [group for group in dropped if min(group.scores) == max(group.scores)]  # as the local engine counts
    # verl scores responses while sampling others, so rollout time includes reward time.
    time_s = {"rollout": max(timing.get("gen", 0.0), 1e-9), "reward": 0.0}
    return {
        **rollout_metrics(sampled, dropped, len(kept), 1, time_s),
        **part_metrics(sampled, dropped),
        **selection_metrics(sums),
        **{name: value for name, value in metrics.items() if name.startswith(("rollout/logprob", "rollout/sampler"))},
        "sampling/generation_batches": num_batches,
        "reward/mean": reward,
        "grad/norm": float(metrics["actor/grad_norm"]),
        "optimizer/lr": float(metrics["actor/lr"]),
        "time/update_s": timing.get("old_log_prob", 0.0) + timing.get("update_actor", 0.0),
        "time/step_s": seconds,
    }


def selection_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of loss, entropy and selection from the workers' sums over tokens."""

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    unselected = sums["response"] - sums["selected"]
    return {
        **{name: sums[name] for name in sums if name.startswith("loss/")},
        "loss/ratio_max": sums["ratio_max"],
        "entropy/mean": ratio(sums["entropy"], sums["response"]),
        "entropy/threshold": sums["threshold_min"] if math.isfinite(sums["threshold_min"]) else math.nan,
        "entropy/selected_mean": ratio(sums["entropy_selected"], sums["selected"]),
        "entropy/unselected_mean": ratio(sums["entropy"] - sums["entropy_selected"], unselected),
        "selection/kept_fraction": ratio(sums["selected"], sums["response"]),
        "selection/kept_fraction_positive": ratio(sums["positive_selected"], sums["positive"]),
        "selection/kept_fraction_negative": ratio(sums["negative_selected"], sums["negative"]),
    }
