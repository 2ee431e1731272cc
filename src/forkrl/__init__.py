"""ForkRL: reinforcement learning on the forking tokens of a language model.

``import forkrl`` loads neither torch nor transformers; each public name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forkrl.advantages import group_advantages, overlong_penalty
    from forkrl.analysis import entropy_change_by_percentile, overlap_ratio
    from forkrl.errors import TrainingHalted, UserError
    from forkrl.objectives import policy_loss
    from forkrl.rollout.fork_temperature import ForkTemperature
    from forkrl.selectors import select_tokens
    from forkrl.token_stats import token_stats
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
        Verdict,
        Verifier,
    )

__version__ = "0.1.0"

__all__ = [
    "ForkTemperature",
    "LossOutput",
    "Prompt",
    "Rollout",
    "RolloutEngine",
    "RolloutGroup",
    "SamplingParams",
    "Task",
    "TokenBatch",
    "TokenStats",
    "TrainingHalted",
    "UserError",
    "Verdict",
    "Verifier",
    "__version__",
    "entropy_change_by_percentile",
    "group_advantages",
    "overlap_ratio",
    "overlong_penalty",
    "policy_loss",
    "select_tokens",
    "token_stats",
]

_HOMES = {
    "ForkTemperature": "forkrl.rollout.fork_temperature",
    "TrainingHalted": "forkrl.errors",
    "UserError": "forkrl.errors",
    "entropy_change_by_percentile": "forkrl.analysis",
    "group_advantages": "forkrl.advantages",
    "overlap_ratio": "forkrl.analysis",
    "overlong_penalty": "forkrl.advantages",
    "policy_loss": "forkrl.objectives",
    "select_tokens": "forkrl.selectors",
    "token_stats": "forkrl.token_stats",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "forkrl.types")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """``forkrl.token_stats`` is the function, whoever imported the subpackage of that name before.

    Importing a subpackage binds it in its parent; here the function takes its place. The subpackage's own modules
    remain reachable as ``from forkrl.token_stats import reference``.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "token_stats" and isinstance(value, ModuleType):
            value = value.token_stats
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
