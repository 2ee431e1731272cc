"""Every knob of ForkRL, with its default, its range and its reason. Imports no torch.

``recipe.py`` reads them from a TOML file and from ``section.key=value`` on the command line. Defaults are the paper's
setting (arXiv 2506.01939v2, section 5.2) wherever the paper has one. What a setting is made of (its base class, its
range) is in ``sections.py``.
"""

from forkrl.config.responses import DynamicSamplingConfig, RewardConfig, RolloutConfig, SandboxConfig
from forkrl.config.runtime import ClusterConfig, RuntimeConfig
from forkrl.config.sft import ArchitectureConfig, SearchHabits, SftConfig, SftDataConfig
from forkrl.config.task import CurriculumConfig, PartConfig, TaskConfig
from forkrl.config.train import CHANGEABLE, CheckpointConfig, EvalConfig, LogConfig, ModelConfig, TrainConfig
from forkrl.config.update import ForksOnlyConfig, LossConfig, OptimizerConfig, SelectionConfig, TrainingConfig

__all__ = [
    "CHANGEABLE",
    "ArchitectureConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CurriculumConfig",
    "DynamicSamplingConfig",
    "EvalConfig",
    "ForksOnlyConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PartConfig",
    "RewardConfig",
    "RolloutConfig",
    "RuntimeConfig",
    "SandboxConfig",
    "SearchHabits",
    "SelectionConfig",
    "SftConfig",
    "SftDataConfig",
    "TaskConfig",
    "TrainConfig",
    "TrainingConfig",
]
