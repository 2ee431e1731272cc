"""``forkrl train`` with ``rollout.engine = "vllm"``: a whole run, and one that is killed, stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.processes import is_running, wait_until

LIMIT_S = 900.0
STEPS = 4
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
[training]
steps = {STEPS}
mini_batch_prompts = 4
micro_batch_tokens = 4096
[eval]
every = 0
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


def bits(run: Path) -> dict[str, Any]:
    """The metrics but for the clock, and the weights."""
    left_out = ("time/", "rollout/tokens_per_s")
    timeless = [{key: value for key, value in each.items() if not key.startswith(left_out)} for each in metrics(run)]
    return {"metrics": timeless, "weights": (run / f"checkpoints/step-{STEPS}/model.safetensors").read_bytes()}


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
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(0 < record["rollout/logprob_gap_max"] < 1e-4 for record in steps)
    assert [record["step"] for record in metrics(whole) if "eval/accuracy" in record] == [0, STEPS]
    assert tomllib.loads((whole / "config.toml").read_text())["provenance"]["vllm"] >= "0.32"
    assert "vllm" in (whole / "report.html").read_text()


def test_a_killed_engine_ends_the_run_in_one_line_and_nothing_is_lost(folder: Path, whole: Path) -> None:
    started = Started(folder, "recipe.toml", "--out", "killed")
    run = folder / "killed"
    assert wait_until(lambda: len(steps_of(run)) >= 1 or started.process.poll() is not None, LIMIT_S)
    os.kill(started.vllm(), signal.SIGKILL)
    code, _, err = started.wait()
    done = len(steps_of(run))
    assert code == 1 and 1 <= done < STEPS, err
    assert err == (
        f"forkrl: training stopped at step {done + 1}: the process of vLLM was killed by SIGKILL, as the system does "
        f"when memory runs out; continue with: forkrl train --resume killed\n"
    )
    assert (run / f"checkpoints/step-{done}").is_dir()

    resumed = Started(folder, "--resume", "killed")
    vllm = resumed.vllm()
    assert wait_until(lambda: len(steps_of(run)) > done, LIMIT_S)
    resumed.process.send_signal(signal.SIGINT)
    code, _, err = resumed.wait()
    assert not is_running(vllm)
    assert code == 130 and err.endswith("continue with: forkrl train --resume killed\n"), err

    last = Started(folder, "--resume", "killed")
    vllm = last.vllm()
    code, _, err = last.wait()
    assert code == 0, err
    assert not is_running(vllm)
    assert bits(run) == bits(whole)
