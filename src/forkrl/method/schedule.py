"""The learning rate and the adaptive entropy bonus over a run, and when it stops early. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol


class Schedule(Protocol):
    """The settings of a schedule, of a recipe or of the plug-in for verl."""

    @property
    def warmup_steps(self) -> int: ...
    @property
    def schedule(self) -> Literal["constant", "linear", "cosine"]: ...
    @property
    def min_lr_ratio(self) -> float: ...


def share_of_lr(settings: Schedule, number: int, progress: float, gradient_steps: int) -> float:
    """The share of the learning rate for one gradient step, as in ``transformers``' schedules with warm-up.

    The first gradient step after the warm-up has the whole rate; the decay would reach ``min_lr_ratio`` after the last.

    Args:
        settings: warm-up and decay.
        number: of the gradient step, counted from 1.
        progress: share of the run's training steps done before it, in [0, 1). Those of a batch count equally.
        gradient_steps: of the whole run if every batch is full; the warm-up takes ``warmup_steps`` of them.
    """
    warmed = min(1.0, number / settings.warmup_steps if settings.warmup_steps else 1.0)
    if settings.schedule == "constant":
        return warmed
    start = settings.warmup_steps / gradient_steps
    decayed = max(0.0, (progress - start) / (1 - start))
    left = 1 - decayed if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * decayed))
    return warmed * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left)


def adaptive_bonus(coef: float, entropy: float, target: float, delta: float) -> tuple[float, float]:
    """The weight of the entropy bonus in a step, and ``coef`` of the next step (Skywork-OR1, arXiv 2505.22312).

    ``entropy`` is the step's mean, in nats, of the policy that sampled; ``coef`` is 0 in the first step.
    """
    if entropy < target:
        return coef, coef + delta
    return 0.0, max(0.0, coef - delta)


class EarlyEnd(NamedTuple):
    """The setting that ended a run before ``training.steps``, and what happened."""

    setting: str
    reason: str


def early_end(rows: Sequence[Mapping[str, Any]], *, patience: int, epochs: float) -> EarlyEnd | None:
    """Why a run with these rows of metrics has no further step; None if it continues to ``training.steps``.

    Args:
        rows: all rows of metrics.
        patience: ``eval.patience``; 0: no limit.
        epochs: ``training.epochs``; 0: no limit.
    """
    done = next((row["sampling/epochs"] for row in reversed(rows) if "sampling/epochs" in row), 0.0)
    if 0 < epochs <= done:
        return EarlyEnd("training.epochs", f"sampling/epochs is {done:.4g} (training.epochs = {epochs:g})")
    if _has_stalled(rows, patience):
        return EarlyEnd("eval.patience", f"no higher accuracy in {patience} evaluations (eval.patience)")
    return None


def _has_stalled(rows: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether the last row is an evaluation, and the last ``patience`` evaluations have no best among them."""
    if not rows or not _is_measured(rows[-1]):
        return False
    accuracies: list[float] = [row["eval/accuracy"] for row in rows if _is_measured(row)]
    if not 0 < patience < len(accuracies):
        return False
    return max(accuracies[-patience:]) <= max(accuracies[:-patience])


def _is_measured(row: Mapping[str, Any]) -> bool:
    """Whether the row is an evaluation, and not one whose verifier failed."""
    accuracy = row.get("eval/accuracy")
    return accuracy is not None and not (accuracy == 0 and row.get("eval/verifier_failures"))
