"""Reinforcement learning on the forking tokens of a language model. Public names load lazily, without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forkrl.analysis import entropy_change_by_percentile, overlap_ratio
    from forkrl.config import TrainConfig
    from forkrl.errors import TrainingHalted, UserError
    from forkrl.head import token_stats
    from forkrl.method.advantages import group_advantages, overlong_penalty
    from forkrl.method.loss import policy_loss
    from forkrl.method.selection import select_tokens
    from forkrl.method.signals import Signals, Terms
    from forkrl.rollout.fork_temperature import ForkTemperature
    from forkrl.training.api import RunResults, load_recipe, train
    from forkrl.training.open_run import PlugIns
    from forkrl.training.run import Run
    from forkrl.types import (
        LossOutput,
        Prompt,
        Rollout,
        RolloutEngine,
        RolloutGroup,
        SamplingParams,
        Task,
        TokenBatch,
        TokenStats,
        Verifier,
        VerifierResult,
    )

__version__ = "0.1.0"

__all__ = [
    "ForkTemperature",
    "LossOutput",
    "PlugIns",
    "Prompt",
    "Rollout",
    "RolloutEngine",
    "RolloutGroup",
    "Run",
    "RunResults",
    "SamplingParams",
    "Signals",
    "Task",
    "Terms",
    "TokenBatch",
    "TokenStats",
    "TrainConfig",
    "TrainingHalted",
    "UserError",
    "Verifier",
    "VerifierResult",
    "__version__",
    "entropy_change_by_percentile",
    "group_advantages",
    "load_recipe",
    "overlap_ratio",
    "overlong_penalty",
    "policy_loss",
    "select_tokens",
    "token_stats",
    "train",
]

_HOMES = {
    "PlugIns": "forkrl.training.open_run",
    "Run": "forkrl.training.run",
    "RunResults": "forkrl.training.api",
    "TrainConfig": "forkrl.config",
    "load_recipe": "forkrl.training.api",
    "train": "forkrl.training.api",
    "ForkTemperature": "forkrl.rollout.fork_temperature",
    "TrainingHalted": "forkrl.errors",
    "UserError": "forkrl.errors",
    "entropy_change_by_percentile": "forkrl.analysis",
    "group_advantages": "forkrl.method.advantages",
    "overlap_ratio": "forkrl.analysis",
    "overlong_penalty": "forkrl.method.advantages",
    "policy_loss": "forkrl.method.loss",
    "Signals": "forkrl.method.signals",
    "Terms": "forkrl.method.signals",
    "select_tokens": "forkrl.method.selection",
    "token_stats": "forkrl.head",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "forkrl.types")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
