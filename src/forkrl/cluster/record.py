"""The run folder as a cluster writes it: the same metrics and rollouts as the local engine's.

verl/            verl's checkpoints and log; how the run ended; a request to stop
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forkrl.config import SelectionConfig
from forkrl.errors import NothingToLearn, TrainingHalted, UserError
from forkrl.store.atomic import write_text
from forkrl.store.run_folder import RunFolder
from forkrl.training.rollout_rows import evaluation_rows
from forkrl.types import RolloutGroup

OWN = "verl"
ENDED = "ended.json"
STOP = "stop"
BEGUN = "begun"
PROGRESS = "forkrl.json"
"""In each of verl's checkpoints: the size of the run's metrics."""


class StopRequested(Exception):
    """The launcher asked for the run to end after the current step."""


class Record:
    """Writes into a run folder that the launcher created, and holds its lock.

    Args:
        path: the run folder.
        every: steps between samples of training responses.
        sampled: responses in a sample.
    """

    def __init__(self, path: Path, *, every: int, sampled: int) -> None:
        self.folder = RunFolder.open(path)
        self.every, self.sampled = every, sampled

    def wants_rows(self, step: int) -> bool:
        """Whether a sample of this step's responses is written."""
        return bool(self.sampled) and step % self.every == 0

    def add_step(self, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        """A finished step, as one line of metrics.jsonl and, where there are rows, a file of rollouts/."""
        if rows:
            self.folder.write_rollouts(f"train-{step:06d}", rows)
        self.folder.append_metrics({"step": step, **metrics})

    def add_evaluation(
        self,
        step: int,
        figures: Mapping[str, float],
        groups: Sequence[RolloutGroup],
        tokenizer: Any,
        selection: SelectionConfig,
        seed: int,
    ) -> None:
        """An evaluation; without rows where the entropies are unknown."""
        written = groups[: max(1, self.sampled // max(1, len(groups[0].rollouts)))] if groups else []
        if written and all(len(rollout.entropy) == len(rollout) for group in written for rollout in group.rollouts):
            rows = evaluation_rows(step, written, tokenizer, selection, seed=seed)
            self.folder.write_rollouts(f"eval-{step:06d}", rows)
        self.folder.write_scores(step, {group.prompt.id: group.scores for group in groups})
        self.folder.append_metrics({"step": step, **{f"eval/{name}": value for name, value in figures.items()}})

    def before_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Note the size of the run's metrics in a checkpoint that verl is about to write."""
        checkpoint.mkdir(parents=True, exist_ok=True)
        write_text(checkpoint / PROGRESS, json.dumps({"step": step, "metrics_bytes": self.folder.metrics_bytes}))

    def begin_step(self) -> None:
        """Tell the launcher that steps have begun; raises StopRequested once it has asked for the end."""
        (self.folder.path / OWN / BEGUN).touch()
        if (self.folder.path / OWN / STOP).exists():
            raise StopRequested


def note_end(run_folder: str | None, error: BaseException, step: int) -> None:
    """Write down for the launcher why the run ends, in the words of the error instead of a traceback."""
    if run_folder is None:
        return
    kinds = (UserError, NothingToLearn, TrainingHalted, StopRequested)
    kind = next((each.__name__ for each in kinds if isinstance(error, each)), "")
    if kind and (Path(run_folder) / OWN).is_dir():
        message = str(getattr(error, "cause", None) or error)
        write_text(Path(run_folder) / OWN / ENDED, json.dumps({"kind": kind, "message": message, "step": step}))
