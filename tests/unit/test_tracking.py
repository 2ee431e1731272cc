"""Trackers: present, missing, refusing, and failing in the middle of a run (fault B3-20: a tracker goes down)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.training import tracking
from forkrl.training.tracking import TrackedRun, Trackers, open_trackers

CONFIG = {"seed": 3, "loss": {"clip_high": 0.28}}


class RecordingTracker:
    """Keeps what it is sent; fails at and after ``fails_at``."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.received: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("server is gone\nwith a long trace")
        self.received.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1


def test_a_failing_tracker_is_reported_once_and_dropped_while_others_go_on() -> None:
    good, bad, lines = RecordingTracker(), RecordingTracker(fails_at=2), list[str]()
    tracker = Trackers({"bad": bad, "good": good}, lines.append)
    for step in range(1, 5):
        tracker.log(step, {"reward/accuracy": step / 10})
    tracker.close()
    assert [step for step, _ in good.received] == [1, 2, 3, 4]
    assert [step for step, _ in bad.received] == [1]
    assert len(lines) == 1
    assert lines[0].startswith("bad failed (ConnectionError: server is gone) and gets no further metrics")
    assert (good.closed, bad.closed) == (1, 0)


def test_an_error_while_closing_does_not_escape_and_closing_twice_is_harmless() -> None:
    class Unclosable(RecordingTracker):
        def close(self) -> None:
            raise TimeoutError

    last, lines = RecordingTracker(), list[str]()
    tracker = Trackers({"first": Unclosable(), "last": last}, lines.append)
    tracker.close()
    tracker.close()
    assert last.closed == 1
    assert lines[0].startswith("first failed (TimeoutError: TimeoutError)")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_stops_the_start_with_its_install_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"'{name}'.*pip install 'forkrl\[tracking\]'"):
        open_trackers([name], TrackedRun(tmp_path, CONFIG, "f00d"))


def test_a_missing_package_leaves_no_run_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forkrl.training.open_run import open_run

    monkeypatch.setitem(sys.modules, "trackio", None)
    config = TrainConfig.model_validate({"log": {"trackers": ["trackio"]}})
    with pytest.raises(UserError, match="log.trackers names 'trackio'"), open_run(config, tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_refuses_to_start_closes_those_already_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = RecordingTracker()

    def refuse(run: TrackedRun) -> RecordingTracker:
        raise PermissionError("no api key")

    monkeypatch.setattr(tracking, "TRACKERS", {"tensorboard": lambda run: opened, "wandb": refuse})
    with pytest.raises(UserError, match="log.trackers: wandb does not start: no api key"):
        open_trackers(["tensorboard", "wandb"], TrackedRun(tmp_path, CONFIG, "f00d"))
    assert opened.closed == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_name_config_steps_and_an_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda metrics, step: calls.append(("log", (step, metrics))), finish=lambda: calls.append(("finish", None))
    )

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(("init", settings))
        return run

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    with open_trackers([name], TrackedRun(tmp_path / "run-7", CONFIG, "f00d")) as tracker:
        tracker.log(4, {"loss/policy": 0.5})
    start = calls[0][1]
    # W&B takes up a run by its id, trackio by its name.
    assert (start["name"], start.get("id")) == {"wandb": ("run-7", "f00d"), "trackio": ("run-7-f00d", None)}[name]
    assert start["resume"] == "allow"
    assert start["config"]["seed"] == 3
    assert calls[1:] == [("log", (4, {"loss/policy": 0.5})), ("finish", None)]


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_trackers(["tensorboard", "tensorboard"], TrackedRun(tmp_path, CONFIG, "f00d")) as tracker:
        assert tracker.names == ("tensorboard",)
        tracker.log(0, {"eval/accuracy": 0.25})
        tracker.log(1, {"reward/accuracy": 0.5, "grad/norm": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/accuracy", "grad/norm", "reward/accuracy"]
    assert [(event.step, event.value) for event in events.Scalars("grad/norm")] == [(1, 2.0)]


@pytest.mark.parametrize("first_step", [0, 3])
def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(first_step: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # the page's own

    with open_trackers(["tensorboard"], TrackedRun(tmp_path, CONFIG, "f00d")) as tracker:
        for step in range(5):
            tracker.log(step, {"grad/norm": 1.0})
    with open_trackers(["tensorboard"], TrackedRun(tmp_path, CONFIG, "f00d", first_step)) as tracker:
        for step in range(first_step, 6):
            tracker.log(step, {"grad/norm": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    kept = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("grad/norm")]
    assert kept == [(step, 1.0 if step < first_step else 2.0) for step in range(6)]
    assert len(events.Tensors("config/text_summary")) == 1
