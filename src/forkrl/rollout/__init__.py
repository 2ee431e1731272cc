"""Engines that turn prompts into rollouts; ``forkrl.types.RolloutEngine`` is what they have in common."""

from forkrl.rollout.embedded import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
