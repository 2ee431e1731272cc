"""The engine that a recipe asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forkrl.parallel.workers import Workers
from forkrl.rollout.cached_decoding import require_cached_decoding
from forkrl.rollout.embedded import EmbeddedEngine
from forkrl.rollout.graphed_engine import GraphedEngine, require_graphs

if TYPE_CHECKING:  # pydantic, which only reading a recipe needs
    from forkrl.config import TrainConfig


def open_engine(workers: Workers, config: TrainConfig) -> EmbeddedEngine:
    """The embedded engine, with graphs or without."""
    require_cached_decoding(workers.policy)
    if config.rollout.cuda_graphs:
        require_graphs(workers.policy)
    kind = GraphedEngine if config.rollout.cuda_graphs else EmbeddedEngine
    return kind(
        workers,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_sequences=config.rollout.max_sequences,
    )
