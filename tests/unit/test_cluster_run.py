"""Around verl's process: how a run ended, where it is taken up again, which of verl's checkpoints are whole."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forkrl.cluster.launch import _rewind, require_verl
from forkrl.cluster.process import (
    TRACKER,
    conclude,
    explain_end,
    last_error,
    merge_checkpoints,
    run_and_watch,
    verl_checkpoints,
)
from forkrl.cluster.record import BEGUN, OWN, PROGRESS, STOP, StopRequested, note_end
from forkrl.errors import NothingToLearn, TrainingHalted, UserError
from forkrl.store.checkpoint import MANIFEST, adopt_weights, all_checkpoints
from forkrl.store.interruption import Interrupted
from forkrl.store.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    RunFolder.create(tmp_path / "run", {}, {"run_id": "abc"}).close()
    (tmp_path / "run" / OWN / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


def shards(run: Path, step: int, metrics_bytes: int | None = 0) -> Path:
    folder = run / OWN / "checkpoints" / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "model_world_size_1_rank_0.pt").write_bytes(b"")
    if metrics_bytes is not None:
        (folder / PROGRESS).write_text(json.dumps({"step": step, "metrics_bytes": metrics_bytes}))
    return folder


def track(run: Path, step: int) -> None:
    (run / OWN / "checkpoints" / TRACKER).write_text(str(step))


def test_without_verl_the_error_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkrl.cluster.launch.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'runtime.trainer = "verl" needs verl.*pip install .forkrl\[verl\].'):
        require_verl()


def test_a_checkpoint_that_the_tracker_has_not_come_to_is_not_whole(run: Path) -> None:
    shards(run, 2)
    own = run / OWN / "checkpoints"
    assert verl_checkpoints(own) == {}
    for step in (4, 6):
        shards(run, step)
    track(run, 4)
    assert list(verl_checkpoints(own)) == [2, 4]
    (own / "global_step_2" / "actor" / "model_world_size_1_rank_0.pt").unlink()  # verl keeps data.pt of older ones
    assert list(verl_checkpoints(own)) == [4]


def test_taking_up_forgets_what_came_after_the_checkpoint(run: Path) -> None:
    with RunFolder.open(run) as folder:
        for step in (1, 2):
            folder.append_metrics({"step": step, "reward/accuracy": 0.5})
        shards(run, 2, folder.metrics_bytes)
        track(run, 2)
        folder.append_metrics({"step": 3, "reward/accuracy": 0.5})
        begun = shards(run, 4, None)
        assert _rewind(folder) == 2
        assert [record["step"] for record in folder.read_metrics()] == [1, 2]
        assert not begun.exists()


def test_an_evaluation_made_after_the_save_is_kept(run: Path) -> None:
    with RunFolder.open(run) as folder:
        folder.append_metrics({"step": 2, "reward/accuracy": 0.5})
        shards(run, 2, folder.metrics_bytes)
        track(run, 2)
        folder.append_metrics({"step": 2, "eval/accuracy": 0.25})
        folder.append_metrics({"step": 3, "reward/accuracy": 0.5})
        assert _rewind(folder) == 2
        assert [sorted(record) for record in folder.read_metrics()] == [
            ["reward/accuracy", "step"], ["eval/accuracy", "step"]
        ]  # fmt: skip


def test_without_a_checkpoint_the_run_starts_over(run: Path) -> None:
    with RunFolder.open(run) as folder:
        folder.append_metrics({"step": 1, "reward/accuracy": 0.5})
        shards(run, 2, None)
        assert _rewind(folder) == 0
        assert folder.read_metrics() == []


@pytest.mark.parametrize("content", ["", "four", "-", "\xff"])
def test_a_damaged_tracker_is_told_and_nothing_is_deleted(run: Path, content: str) -> None:
    kept = [shards(run, 2), shards(run, 4)]
    (run / OWN / "checkpoints" / TRACKER).write_bytes(content.encode("latin-1"))
    with RunFolder.open(run) as folder, pytest.raises(UserError, match=rf"{TRACKER}.*write 4"):
        _rewind(folder)
    assert all(folder.is_dir() for folder in kept)


def test_a_lost_tracker_costs_no_checkpoint(run: Path) -> None:
    kept = [shards(run, 2), shards(run, 4)]
    with RunFolder.open(run) as folder, pytest.raises(UserError, match=rf"{TRACKER}.*write 4"):
        _rewind(folder)
    assert all(folder.is_dir() for folder in kept)


def test_a_folder_of_the_users_among_the_checkpoints_stays(run: Path) -> None:
    shards(run, 2)
    track(run, 2)
    own = run / OWN / "checkpoints" / "global_step_2-copy"
    own.mkdir()
    with RunFolder.open(run) as folder:
        assert _rewind(folder) == 2
    assert own.is_dir()


@pytest.mark.parametrize("content", ["", "[]", '{"step": 2}', "{"])
def test_damaged_progress_names_the_file_and_a_way_on(run: Path, content: str) -> None:
    (shards(run, 2) / PROGRESS).write_text(content)
    track(run, 2)
    with RunFolder.open(run) as folder, pytest.raises(UserError, match=rf"{PROGRESS}.*{TRACKER}"):
        _rewind(folder)


def test_older_checkpoints_than_are_kept_go_in_both_forms(run: Path) -> None:
    for step in (2, 4, 6):
        shards(run, step)
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step}" / MANIFEST).touch()
    track(run, 6)
    with RunFolder.open(run) as folder:
        merge_checkpoints(folder, run / OWN / "checkpoints", {}, print, keep=2)
    assert sorted(path.name for path in (run / OWN / "checkpoints").glob("global*")) == [
        "global_step_4",
        "global_step_6",
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-4", "step-6"]


def test_a_run_that_came_to_its_end_has_nothing_to_explain(run: Path) -> None:
    explain_end(run, 0)


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (UserError("algorithm.x = 1 is wrong; set it to 2"), UserError, ["algorithm.x = 1"]),
        (NothingToLearn("nothing to learn"), NothingToLearn, ["step 3", "nothing to learn", "--resume"]),
        (TrainingHalted("the loss is nan"), TrainingHalted, ["step 3", "the loss is nan", "--resume"]),
    ],
)
def test_what_the_trainer_noted_is_what_the_user_reads(
    run: Path, error: Exception, raised: type[Exception], words: list[str]
) -> None:
    note_end(str(run), error, 3)
    with pytest.raises(raised) as caught:
        explain_end(run, 1)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_stop_on_request_is_no_failure(run: Path) -> None:
    note_end(str(run), StopRequested(), 3)
    explain_end(run, 0)


def test_other_ends_show_the_last_error_of_the_log(run: Path) -> None:
    log = run / OWN / "log.txt"
    log.write_text(
        "step\n\x1b[36m(WorkerDict pid=1)\x1b[0m Traceback (most recent call last):\n"
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n"
        "\tclass_name: create_colocated_worker_cls.<locals>.WorkerDict\n"
    )
    with pytest.raises(
        TrainingHalted, match=r"status 1: ray.exceptions.ActorDiedError: The actor died .*log.txt.*--resume"
    ):
        explain_end(run, 1)


def test_a_ray_that_does_not_answer_is_the_users_to_start(run: Path) -> None:
    (run / OWN / "log.txt").write_text("ConnectionError: Failed to connect to Ray cluster at 10.0.0.1:6379\n")
    with pytest.raises(UserError, match=r"cluster.address.*10.0.0.1:6379.*ray start.*RAY_AUTH_MODE"):
        explain_end(run, 1)


WARNED = (
    "\x1b[36m(RewardLoopWorker pid=7)\x1b[0m forkrl.errors.UserError: task.verifier = 'a:b' could not be started\n"
    "\x1b[36m(TaskRunner pid=6)\x1b[0m ValueError: Received an empty list as keys.\n"
    "\x1b[36m(pid=6596)\x1b[0m engine/__init__.py:69: UserWarning: megatron engine is not available: "
    "ModuleNotFoundError(\"No module named 'megatron'\")\n"
    '\x1b[36m(pid=6596)\x1b[0m   warnings.warn(f"megatron engine is not available: {e!r}", stacklevel=1)\n'
)


def test_what_verl_warns_of_is_not_why_it_ended(run: Path) -> None:
    (run / OWN / "log.txt").write_text(WARNED.replace("forkrl.errors.UserError", "x"))
    assert last_error(run / OWN / "log.txt") == "ValueError: Received an empty list as keys."


def test_forkrls_own_word_goes_before_what_followed_from_it(run: Path) -> None:
    (run / OWN / "log.txt").write_text(WARNED)
    assert last_error(run / OWN / "log.txt") == "task.verifier = 'a:b' could not be started"


def test_only_this_attempts_part_of_the_log_is_read(run: Path) -> None:
    log = run / OWN / "log.txt"
    log.write_text(WARNED)
    since = log.stat().st_size
    with log.open("a") as file:
        file.write("OSError: [Errno 28] No space left on device\n")
    with pytest.raises(TrainingHalted, match="status 1: OSError: .*No space left"):
        explain_end(run, 1, since=since)


def test_a_log_without_an_error_gives_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_bytes(b"one\ntwo \xff\n\n")
    assert last_error(tmp_path / "log.txt").startswith("two")
    (tmp_path / "log.txt").write_bytes(b"")
    assert last_error(tmp_path / "log.txt") == "it printed nothing"


def fail_to_merge() -> None:
    raise UserError("verl's merger failed")


@pytest.mark.parametrize("merge", [lambda: None, fail_to_merge])
@pytest.mark.parametrize(
    ("steps", "tracked", "outcome"),
    [
        ([], None, r"^before anything was saved$"),
        ([2], None, r"^before anything was saved$"),  # begun, and not finished
        ([2, 4], "4", r"^with step 4 saved$"),
        ([2, 4], "2", r"^with step 2 saved$"),
        ([2, 4], "", rf"^but .*{TRACKER}.*write 4"),
    ],
)
def test_an_interruption_says_what_is_saved(
    run: Path, steps: list[int], tracked: str | None, outcome: str, merge: Callable[[], None]
) -> None:
    for step in steps:
        shards(run, step)
    if tracked is not None:
        (run / OWN / "checkpoints" / TRACKER).write_text(tracked)
    stop = Interrupted(signal.SIGINT)
    with pytest.raises(Interrupted), conclude(merge, run / OWN / "checkpoints", print):
        raise stop
    assert re.search(outcome, stop.outcome)


@pytest.mark.parametrize("error", [TrainingHalted("the loss is nan"), OSError("no space"), KeyboardInterrupt()])
def test_a_failing_merge_does_not_hide_what_ended_the_run(run: Path, error: BaseException) -> None:
    said: list[str] = []
    with pytest.raises(type(error)) as ended, conclude(fail_to_merge, run / OWN / "checkpoints", said.append):
        raise error
    assert ended.value is error
    assert said == ["verl's checkpoints were not merged: verl's merger failed"]


def test_a_merge_that_alone_fails_is_what_ended_the_run(run: Path) -> None:
    with pytest.raises(UserError, match="merger failed"), conclude(fail_to_merge, run / OWN / "checkpoints", print):
        pass


def test_what_is_saved_is_merged_however_the_run_ended(run: Path) -> None:
    merged: list[str] = []
    with conclude(lambda: merged.append("at its end"), run / OWN / "checkpoints", print):
        assert not merged
    after = conclude(lambda: merged.append("after a failure"), run / OWN / "checkpoints", print)
    with pytest.raises(TrainingHalted), after:
        raise TrainingHalted("the loss is nan")
    assert merged == ["at its end", "after a failure"]


CHILD = """
import pathlib, sys, time
metrics, stop = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
with metrics.open("a") as file:
    file.write('{"step": 1}\\n'); file.flush()
    while not stop.exists() and len(sys.argv) > 3:
        time.sleep(0.05)
    file.write('{"step": 2}\\n')
print("said")
"""


def watch(tmp_path: Path, *more: str, seen: list[Any], said: list[str] | None = None, begun: bool = True) -> int:
    metrics, stop = tmp_path / "metrics.jsonl", tmp_path / OWN / STOP
    (tmp_path / OWN).mkdir()
    if begun:
        (tmp_path / OWN / BEGUN).touch()
    metrics.write_text('{"step": 0}\n')
    return run_and_watch(
        [sys.executable, "-c", CHILD, str(metrics), str(stop), *more],
        {"PATH": "/usr/bin:/bin"},
        tmp_path,
        known=1,
        on_metrics=seen.append,
        on_stop=lambda: said.append("stopping") if said is not None else None,
    )


def test_every_new_line_is_told_once(tmp_path: Path) -> None:
    seen: list[Any] = []
    assert watch(tmp_path, seen=seen) == 0
    assert seen == [{"step": 1}, {"step": 2}]
    assert (tmp_path / OWN / "log.txt").read_text() == "said\n"


def test_a_signal_asks_for_the_end_and_waits_for_it(tmp_path: Path) -> None:
    class Seen(list[Any]):
        def append(self, record: Any) -> None:
            super().append(record)
            if len(self) == 1:
                signal.raise_signal(signal.SIGTERM)

    seen, said = Seen(), list[str]()
    with pytest.raises(Interrupted, match="SIGTERM"):
        watch(tmp_path, "until stopped", seen=seen, said=said)
    assert seen == [{"step": 1}, {"step": 2}]
    assert said == ["stopping"]


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    class Seen(list[Any]):
        def append(self, record: Any) -> None:
            super().append(record)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    began = time.monotonic()
    with pytest.raises(Interrupted):
        watch(tmp_path, "until stopped", seen=Seen())
    assert time.monotonic() - began < 15


def test_before_the_first_step_one_signal_is_enough(tmp_path: Path) -> None:
    class Seen(list[Any]):
        def append(self, record: Any) -> None:
            super().append(record)
            signal.raise_signal(signal.SIGINT)

    began, said = time.monotonic(), list[str]()
    with pytest.raises(Interrupted, match="SIGINT"):
        watch(tmp_path, "until stopped", seen=Seen(), said=said, begun=False)
    assert time.monotonic() - began < 15
    assert not said, "no step is under way that could be waited for"


def test_a_merged_folder_becomes_a_checkpoint_of_weights(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    with pytest.raises(UserError, match=r"no config.json"):
        adopt_weights(tmp_path / "checkpoints", 4, saved)
    (saved / "config.json").write_text("{}")
    (saved / "model.safetensors").write_bytes(b"weights")
    folder = adopt_weights(tmp_path / "checkpoints", 4, saved)
    assert all_checkpoints(tmp_path / "checkpoints") == {4: folder}
    assert not saved.exists()
    (folder / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(UserError, match=r"model.safetensors"):
        all_checkpoints(tmp_path / "checkpoints")
