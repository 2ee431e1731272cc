"""Copies of the metrics in TensorBoard, W&B and trackio. A failure to start ends the run; a later one does not.

On a resume, steps after the checkpoint are logged twice: TensorBoard deletes the first, W&B keeps them and warns,
trackio shows both.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from forkrl.errors import UserError, first_line


@dataclass(frozen=True)
class TrackedRun:
    """The run, as trackers see it."""

    path: Path
    """The run folder; its name is the run's name."""
    config: Mapping[str, Any]
    """The resolved recipe, stored with the curves."""
    id: str
    """Unique, and unchanged by a resume."""
    first_step: int = 0
    """The next step to log; a tracker's later steps were lost."""

    @property
    def name(self) -> str:
        return self.path.resolve().name


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in ``RUN/tensorboard``; view with ``tensorboard --logdir RUN``."""

    def __init__(self, run: TrackedRun) -> None:
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=run.first_step)
        if run.first_step == 0:
            settings = "\n".join(f"    {key} = {value!r}" for key, value in _flatten(run.config).items())
            self._writer.add_text("config", settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class HostedTracker:
    """A run of W&B or trackio."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _open_wandb(run: TrackedRun) -> Tracker:
    """Project, entity and offline mode come from WANDB_* variables."""
    wandb = _require("wandb")
    return HostedTracker(
        wandb.init(name=run.name, id=run.id, resume="allow", dir=str(run.path), config=dict(run.config))
    )


def _open_trackio(run: TrackedRun) -> Tracker:
    """trackio resumes a run by its name, which therefore includes the id."""
    trackio = _require("trackio")
    return HostedTracker(
        trackio.init(project="forkrl", name=f"{run.name}-{run.id}", resume="allow", config=_flatten(run.config))
    )


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Trackers:
    """The open trackers of a run. Their failures do not reach the caller."""

    def __init__(self, trackers: Mapping[str, Tracker], report: Callable[[str], None] = _warn) -> None:
        self._trackers = dict(trackers)
        self._report = report

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.log, step, metrics)

    def close(self) -> None:
        """Flush and close every tracker; may be called twice."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close)
        self._trackers.clear()

    def _attempt(self, name: str, call: Callable[..., None], *arguments: object) -> None:
        # A tracker may raise anything; it must not end the training.
        try:
            call(*arguments)
        except Exception as error:
            del self._trackers[name]
            self._report(
                f"{name} failed ({type(error).__name__}: {first_line(error)}) "
                f"and gets no further metrics; training continues, metrics.jsonl is complete"
            )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def require_trackers(names: Sequence[str]) -> None:
    """Check that every tracker's package is installed, before a run folder is created."""
    for name in names:
        _require(name)  # each tracker is named after its package


def open_trackers(
    names: Sequence[str],
    run: TrackedRun,
    *,
    own: Tracker | None = None,
    report: Callable[[str], None] = _warn,
) -> Trackers:
    """Open the named trackers and the caller's ``own``. ``report`` gets one line when a tracker fails later."""
    trackers: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            trackers[name] = TRACKERS[name](run)
        except UserError:
            Trackers(trackers, report).close()
            raise
        except Exception as error:
            Trackers(trackers, report).close()
            reason = first_line(error).rstrip(".")
            raise UserError(f"log.trackers: {name} does not start: {reason}; fix it, or remove it") from error
    return Trackers(trackers if own is None else {**trackers, "tracker": own}, report)


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"log.trackers names {package!r}, which cannot be imported ({error}); "
            f"install it: pip install 'forkrl[tracking]'"
        ) from None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
