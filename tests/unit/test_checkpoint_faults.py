"""Kills, power cuts and full disks in the middle of a save, for real, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from forkrl.errors import UserError
from forkrl.store.checkpoint import latest_checkpoint
from tests.kill_points import SUPPORTED
from tests.tiny_state import tiny_state

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = ("first", "next", "again", "littered")
needs_ptrace = pytest.mark.skipif(not SUPPORTED, reason="system calls are traced on Linux, x86_64 and aarch64")


def run_script(*arguments: str, prefix: tuple[str, ...] = ()) -> Any:
    """What a script of ``tests`` prints, as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    command = [*prefix, sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves is the same, and fsync does not wait for a disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() and os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def killed(fast_folder: Path) -> Any:
    return run_script("tests.kill_points", str(fast_folder / "few"), "20")


@needs_ptrace
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_point_leaves_the_old_or_the_new_checkpoint_whole(killed: Any, name: str) -> None:
    old, new = killed["everywhere"][name]["old"], killed["everywhere"][name]["new"]
    found = [point["manifest"] for point in killed["everywhere"][name]["points"]]
    assert found[0] == old
    assert found[-1] == new
    switch = found.index(new)
    assert set(found[:switch]) == {old}
    assert set(found[switch:]) == {new}, "once saved, a checkpoint stays"


@needs_ptrace
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_next_save_after_a_kill_clears_away_what_it_left(killed: Any, name: str) -> None:
    expected = ["step-10"] if name == "next" else ["step-5"]
    for point in killed["everywhere"][name]["points"]:
        assert point["after_retry"] == expected, point["after"]


@needs_ptrace
@pytest.mark.parametrize("name", SCENARIOS)
def test_half_a_checkpoint_never_stands_under_its_own_name(killed: Any, name: str) -> None:
    for point in killed["everywhere"][name]["points"]:
        assert point["halves"] == [], point["after"]


@needs_ptrace
def test_the_kill_points_include_writes_made_outside_python(killed: Any) -> None:
    for name in SCENARIOS:
        written = [operation for operation in killed["everywhere"][name]["operations"] if operation["call"] == "write"]
        assert any(operation["size"] > 4096 and "config" not in operation["path"] for operation in written)
        assert len(killed["everywhere"][name]["points"]) > 40


@needs_ptrace
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_cut_finds_all_data_on_the_disk_before_its_name_and_before_anything_old_goes(
    killed: Any, name: str
) -> None:
    unsynced: set[str] = set()
    checkpoints, named, old_gone = "", False, False
    for operation in killed["everywhere"][name]["operations"]:
        call, path = operation["call"], operation["path"]
        if call == "fsync":
            unsynced.discard(path)
        elif call in ("write", "openat", "ftruncate"):
            unsynced |= {path, str(Path(path).parent)}
        elif call == "mkdir":
            unsynced |= {path}
            checkpoints = str(Path(path).parent) if Path(path).name.startswith(".saving-") else checkpoints
        elif call in ("rename", "renameat") and Path(path).name.startswith(".saving-"):
            assert not {item for item in unsynced if item.startswith(path)}
            named, unsynced = True, {checkpoints}
        elif call in ("unlinkat", "rename") and named:
            assert checkpoints not in unsynced, "the new name has to be durable before anything old is removed"
            old_gone = True
        elif call in ("rename", "renameat") and path in unsynced:
            unsynced = (unsynced - {path}) | {operation["target"]}
    assert named
    assert old_gone == (name != "first")


def assert_the_newest_is_never_lost(outcomes: list[dict[str, Any]]) -> None:
    durable = -1
    for outcome in outcomes:
        found = -1 if outcome["found"] is None else outcome["found"]
        assert found in (durable, outcome["number"]), outcome
        assert found == outcome["number"] or not outcome["finished"], outcome
        durable = found
    killed = sum(not outcome["finished"] for outcome in outcomes)
    assert 0 < killed < len(outcomes)


@needs_ptrace
def test_saves_killed_one_after_another_never_lose_the_newest_checkpoint(killed: Any) -> None:
    assert len(killed["random"]) == 20
    assert_the_newest_is_never_lost(killed["random"])


@needs_ptrace
@pytest.mark.slow
def test_a_thousand_random_kills_never_lose_the_newest_checkpoint(fast_folder: Path) -> None:
    assert_the_newest_is_never_lost(run_script("tests.kill_points", str(fast_folder / "many"), "1000")["random"])


def private_mounts() -> tuple[str, ...] | None:
    """A command that lets what follows it mount a file system that only it sees, if this machine allows that."""
    for flags in (("--mount",), ("--mount", "--user", "--map-root-user")):
        command = ("unshare", *flags)
        if shutil.which("unshare") is None:
            return None
        try_it = [*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if subprocess.run(try_it, capture_output=True, check=False).returncode == 0:
            return command
    return None


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    prefix = private_mounts()
    if prefix is None:
        pytest.skip("this machine does not let the tests mount a small disk")
    return run_script("tests.full_disk", str(tmp_path_factory.mktemp("disk")), prefix=prefix)


@pytest.mark.parametrize(("unit", "old", "new"), [("page", "step-5", "step-10"), ("file", "step-10", "step-15")])
def test_a_disk_that_fills_up_anywhere_in_a_save_keeps_the_old_checkpoint(
    full_disk: Any, unit: str, old: str, new: str
) -> None:
    *refused, saved = full_disk[unit]["attempts"]
    assert len(refused) >= 10, "every page and every file is a point where the disk can be full"
    for attempt in refused:
        assert attempt["found"] == old
        assert attempt["unchanged"]
        assert f"/checkpoints/{new}: cannot be written (No space left on device)" in attempt["message"]
        assert "what was saved before is intact" in attempt["message"]
        assert "free some space" in attempt["message"]
    assert saved["found"] == new
    assert full_disk[unit]["left"][0] == new


def test_a_full_disk_leaves_metrics_in_whole_lines_and_nothing_half_written(full_disk: Any) -> None:
    seen = full_disk["run_folder"]
    for what, file in [("metrics", "metrics.jsonl"), ("rollouts", "train-000001.parquet"), ("create", "another")]:
        assert f"{file}: cannot be written (No space left on device)" in seen["messages"][what]
    assert 0 < seen["logged"] == seen["lines"]
    assert seen["torn"] == ""
    assert seen["new_files"] == ["another", "another/.lock"]


@pytest.mark.parametrize("code", [28, 122])  # no space left, quota exceeded
@pytest.mark.parametrize("where", ["model", "tokenizer", "trainer", "rename"])
def test_a_save_that_the_system_refuses_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: int
) -> None:
    state = tiny_state()
    state.save(tmp_path, 5)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    match where:
        case "model":
            monkeypatch.setattr(state.model, "save_pretrained", refuse)
        case "tokenizer":
            monkeypatch.setattr(state.tokenizer, "save_pretrained", refuse)
        case "trainer":
            monkeypatch.setattr("forkrl.store.training_state.save_file", refuse)
        case "rename":
            monkeypatch.setattr("forkrl.store.checkpoint._swap_in", refuse)
    with pytest.raises(UserError, match=r"step-5: cannot be written .*intact.*the disk is full"):
        state.save(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-5"
