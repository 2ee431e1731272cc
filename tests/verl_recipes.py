"""Recipes for verl, and the paths of a run that nobody writes."""

from __future__ import annotations

from pathlib import Path

from forkrl.cluster.settings import VerlPaths
from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe

PATHS = VerlPaths(
    model="/run/model",
    train=Path("/run/train.parquet"),
    held_out=Path("/run/held_out.parquet"),
    verifiers=Path("/run/verifiers.json"),
    checkpoints=Path("/run/verl"),
    run_folder=Path("/run"),
)
ONE_GYM = ('task.name="reasoning-gym"', "task.generator=chain_sum", "task.template={prompt}")
MIX = ('task.name="mix"',)
CPU = ("runtime.device=cpu",)


def recipe(*overrides: str, path: Path | None = None) -> TrainConfig:
    """A recipe, by default one of defaults alone, with verl as its engine."""
    return load_recipe(TrainConfig, path, ["runtime.trainer=verl", *overrides])
