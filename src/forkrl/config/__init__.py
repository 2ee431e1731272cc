"""All settings of ForkRL with default, range and help. Imports no torch.

``recipe.py`` reads them from a TOML file and from ``section.key=value`` on the command line.
"""

from forkrl.config.lora import LoraConfig
from forkrl.config.reward import RewardConfig, RewardTerm, SandboxConfig
from forkrl.config.sft import SearchHabits, SftConfig
from forkrl.config.task import CurriculumConfig, PartConfig, TaskConfig
from forkrl.config.train import (
    CHANGEABLE,
    ForksOnlyConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
    SelectionConfig,
    TrainConfig,
    WeightsConfig,
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
    "RewardTerm",
    "RuntimeConfig",
    "SandboxConfig",
    "SearchHabits",
    "SelectionConfig",
    "SftConfig",
    "TaskConfig",
    "TrainConfig",
    "WeightsConfig",
]
