"""``forkrl train`` with ``rollout.engine = "vllm"``: a whole run, and one whose vLLM is killed again and again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forkrl.cli import main
from forkrl.rollout.vllm_engine import VllmEngine
from tests.processes import is_running, wait_until

LIMIT_S = 900.0
STEPS = 6
RECIPE = f"""\
seed = 3
[task]
name = "countdown"
[rollout]
engine = "vllm"
prompts_per_step = 8
group_size = 4
max_prompt_tokens = 24
max_response_tokens = 64
max_sequences = 64
[reward]
overlong_cache = 0
[dynamic_sampling]
enabled = false
[selection]
entropy = "rollout"
[optimizer]
lr = 1e-3
[loss]
old_logprobs = "trainer"
[training]
steps = {STEPS}
mini_batch_prompts = 4
micro_batch_tokens = 4096
[eval]
every = 1
problems = 8
[checkpoint]
every = 1
[log]
rollouts_every = 1
[runtime]
device = "cpu"
threads = 1
"""


class Started:
    """``forkrl train`` in a process of its own."""

    def __init__(self, folder: Path, *argv: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forkrl", "train", *argv],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def vllm(self) -> int:
        """The process id of its vLLM, once it runs."""
        assert wait_until(lambda: self._vllm() is not None, LIMIT_S)
        return self._vllm() or 0

    def _vllm(self) -> int | None:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in children.read_text().split():
            if "vllm_process" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
        return None

    def wait(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out, err


def metrics(run: Path) -> list[dict[str, Any]]:
    if not (path := run / "metrics.jsonl").exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run) if "reward/mean" in record]


def bits(run: Path, weights: str = f"checkpoints/step-{STEPS}/model.safetensors") -> dict[str, Any]:
    """The metrics but for the clock, and the weights."""
    left_out = ("time/", "rollout/tokens_per_s")
    timeless = [{key: value for key, value in each.items() if not key.startswith(left_out)} for each in metrics(run)]
    return {"metrics": timeless, "weights": (run / weights).read_bytes()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run from start to end."""
    started = Started(folder, "recipe.toml", "--out", "whole")
    code, out, err = started.wait()
    assert code == 0, err
    assert "; sampling with vLLM\n" in out
    assert err == "", "vLLM's own messages are for nobody"
    return folder / "whole"


def test_a_run_names_its_engine_and_samples_from_what_it_trains(whole: Path) -> None:
    steps = steps_of(whole)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(0 < record["rollout/logprob_gap_max"] < 1e-4 for record in steps)
    assert [record["step"] for record in metrics(whole) if "eval/accuracy" in record] == list(range(STEPS + 1))
    assert tomllib.loads((whole / "config.toml").read_text())["provenance"]["vllm"] >= "0.32"
    assert "vllm" in (whole / "report.html").read_text()


class Kill(NamedTuple):
    """Where vLLM is killed: as it is asked, after a part of its answer, or after the whole.

    ``asked``: which request of its kind in this process; the first sync and generate are of the probe.
    """

    request: str
    asked: int
    after: str
    steps: int
    """Finished and saved by then, in all."""


KILLS = {
    "generating": Kill("generate", 5, "part", steps=1),  # probe, evaluation, step 1, evaluation, step 2
    "updating": Kill("generate", 2, "answer", steps=2),  # probe, step 2
    "syncing": Kill("sync", 3, "nothing", steps=3),  # probe, evaluation, after step 3
    "evaluating": Kill("generate", 2, "part", steps=3),  # probe, evaluation after step 3
}
KILLED = "the process of vLLM was killed by SIGKILL, as the system does when memory runs out"


def kill_vllm(monkeypatch: pytest.MonkeyPatch, kill: Kill) -> None:
    ask, asked = VllmEngine._ask, Counter[str]()

    def deadly(engine: VllmEngine, *message: Any) -> Iterator[Any]:
        request = message[0] if isinstance(message[0], str) else "open"
        asked[request] += 1
        due = (request, asked[request]) == (kill.request, kill.asked)
        if due and kill.after == "nothing":
            engine._child.process.kill()
        for part in ask(engine, *message):
            if due and kill.after == "part":
                engine._child.process.kill()
            yield part
        if due and kill.after == "answer":
            engine._child.process.kill()

    monkeypatch.setattr(VllmEngine, "_ask", deadly)


def train(folder: Path, *argv: str) -> int:
    with contextlib.chdir(folder):
        return main(["train", *argv])


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """A run that each test continues where the one before it has left it."""
    return folder / "killed"


def test_killed_while_it_opens_it_leaves_no_run(
    killed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_vllm(monkeypatch, Kill("open", 1, "nothing", steps=0))
    assert train(killed.parent, "recipe.toml", "--out", "killed") == 2
    assert capsys.readouterr().err == (
        f'forkrl: rollout.engine = "vllm" cannot run Qwen3ForCausalLM: {KILLED}; lower rollout.kv_cache_gib, or '
        f'set rollout.engine = "torch"\n'
    )
    assert not killed.exists()


@pytest.mark.parametrize("moment", KILLS)
def test_killed_the_finished_steps_are_saved(
    moment: str, killed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill = KILLS[moment]
    kill_vllm(monkeypatch, kill)
    assert (
        train(killed.parent, *(["--resume", "killed"] if killed.exists() else ["recipe.toml", "--out", "killed"])) == 1
    )
    assert capsys.readouterr().err == (
        f"forkrl: training stopped at step {kill.steps + 1}: {KILLED}; continue with: forkrl train --resume killed\n"
    )
    assert len(steps_of(killed)) == kill.steps
    assert (killed / f"checkpoints/step-{kill.steps}").is_dir()


def test_after_all_that_it_equals_an_uninterrupted_run(folder: Path, whole: Path, killed: Path) -> None:
    done = len(steps_of(killed))
    stopped = Started(folder, "--resume", "killed")
    vllm = stopped.vllm()
    assert wait_until(lambda: len(steps_of(killed)) > done, LIMIT_S)
    stopped.process.send_signal(signal.SIGINT)
    code, _, err = stopped.wait()
    assert not is_running(vllm)
    assert code == 130 and err.endswith("continue with: forkrl train --resume killed\n"), err

    last = Started(folder, "--resume", "killed")
    vllm = last.vllm()
    code, _, err = last.wait()
    assert code == 0, err
    assert not is_running(vllm)
    assert bits(killed) == bits(whole)


def test_an_adapter_is_trained_and_resumed_exactly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("recipe.toml", "training.steps=3", "eval.every=0", "lora.rank=4", "optimizer.lr=1e-2")
    assert train(folder, *argv, "--out", "adapter") == 0
    assert all(0 < record["rollout/logprob_gap_max"] < 1e-4 for record in steps_of(folder / "adapter"))
    with monkeypatch.context() as patched:
        kill_vllm(patched, Kill("sync", 3, "nothing", steps=1))  # probe, evaluation, after step 1
        assert train(folder, *argv, "--out", "adapter-killed") == 1
    assert KILLED in capsys.readouterr().err
    assert train(folder, "--resume", "adapter-killed") == 0
    whole, resumed = (
        bits(folder / name, "checkpoints/step-3/adapter_model.safetensors") for name in ("adapter", "adapter-killed")
    )
    assert resumed == whole
