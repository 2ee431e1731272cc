"""Engines that turn prompts into rollouts (``forkrl.types.RolloutEngine``)."""

from forkrl.rollout.embedded import EmbeddedEngine
from forkrl.rollout.opening import open_engine, training_sampling

__all__ = ["EmbeddedEngine", "open_engine", "training_sampling"]
