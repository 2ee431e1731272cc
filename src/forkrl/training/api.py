"""Training from Python (docs/python.md)."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl.config import TrainConfig, recipe
from forkrl.training import loop
from forkrl.training.run import Run


def load_recipe(path: str | Path | None = None, *overrides: str) -> TrainConfig:
    """Settings from a recipe file, or the defaults, with overrides such as ``"training.steps=60"``.

    Raises:
        UserError: a missing or malformed file, an unknown key, or a value of the wrong type or range.
    """
    return recipe.load_recipe(TrainConfig, path, overrides)


@dataclass(frozen=True)
class RunResults:
    """The results of a run as data frames, read from its folder."""

    folder: Path

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per step, with the metrics of training and evaluation."""
        whole_lines = (self.folder / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
        return pd.read_json(io.BytesIO(whole_lines), lines=True).groupby("step").first()

    def rollouts(self, name: str) -> pd.DataFrame:
        """The sampled responses of ``rollouts/NAME.parquet``, such as "train-000010", one row each."""
        return pd.read_parquet(self.folder / "rollouts" / f"{name}.parquet")


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    on_step: Callable[[Run, dict[str, float]], None] | None = None,
    **plug_ins: Any,
) -> RunResults:
    """Train a new run in the new or empty folder ``out``.

    Args:
        config: for example from :func:`forkrl.load_recipe`.
        out: run folder.
        on_step: called after each step with the run and the step's metrics.
        plug_ins: ``engine``, ``task``, ``verifier`` or ``tracker``, see :class:`forkrl.PlugIns`.

    Raises:
        UserError: an error in the model, data, folder or recipe.
        TrainingHalted: training cannot continue, for example because of a NaN loss.
    """
    with Run.create(config, out, **plug_ins) as run:
        loop.train(run, on_step)
    return RunResults(Path(out))
