"""All settings of ForkRL with default, range and help. Imports no torch.

``recipe.py`` reads them from a TOML file and from ``section.key=value`` on the command line.
"""

from forkrl.config.lora import LoraConfig
from forkrl.config.sft import SearchHabits, SftConfig
from forkrl.config.task import CurriculumConfig, PartConfig, TaskConfig
from forkrl.config.train import (
    CHANGEABLE,
    ForksOnlyConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RuntimeConfig,
    SandboxConfig,
    SelectionConfig,
    TrainConfig,
)

__all__ = [
    "CHANGEABLE",
    "CurriculumConfig",
    "ForksOnlyConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PartConfig",
    "RewardConfig",
    "RuntimeConfig",
    "SandboxConfig",
    "SearchHabits",
    "SelectionConfig",
    "SftConfig",
    "TaskConfig",
    "TrainConfig",
]
