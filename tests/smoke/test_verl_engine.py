"""``forkrl train --trainer verl``: one run on two ranks without a GPU, interrupted and resumed several times.

Starting verl takes most of a minute, so all tests here read the same story: a rank is killed between two saves, then
the sampler in the middle of a step, then the user stops the run, then it finishes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forkrl.store.run_folder import RunFolder
from tests.once import once
from tests.verl_cpu.preloaded import preloaded
from tests.verl_here import needs_verl

pytestmark = needs_verl
STALL_TIMEOUT_S = 400.0
STEPS = 8
VERIFIER = '''"""Countdown's verifier, but for one response in some, on which it never comes back."""

from forkrl.rewards.countdown import verify_countdown


def verify(answer, response):
    while len(response) % 11 == 5:
        pass
    return verify_countdown(answer, response)
'''
RECIPE = f"""\
seed = 0
[task]
name = "dataset"
data = "prompts.jsonl"
held_out_rows = 8
verifier = "slow_verifier:verify"
[rollout]
prompts_per_step = 4
group_size = 4
max_prompt_tokens = 16
max_response_tokens = 96
[reward]
overlong_cache = 32
timeout_s = 0.5
workers = 2
[dynamic_sampling]
max_generation_batches = 8
[selection]
scope = "rollout_batch"
entropy = "rollout"
[loss]
old_logprobs = "trainer"
sampler_correction = "masked"
sampler_cap = 3.0
[optimizer]
lr = 3e-4
weight_decay = 0.0
warmup_steps = 6
schedule = "linear"
min_lr_ratio = 0.1
[training]
steps = {STEPS}
mini_batch_prompts = 2
micro_batch_tokens = 1024
[eval]
every = 0
problems = 8
samples = 2
[checkpoint]
every = 2
[log]
rollouts_every = 2
rollouts_sampled = 8
trackers = ["tensorboard"]
[runtime]
device = "cpu"
[cluster]
gpus_per_node = 2
overrides = ["+ray_kwargs.ray_init.runtime_env.py_executable='{{python}}'"]
"""


@dataclass
class Attempt:
    """A process of ``forkrl train`` that runs."""

    process: subprocess.Popen[str]
    folder: Path
    forks: int
    """The process whose children are Ray's workers (``tests/verl_cpu/preloaded.py``)."""

    def wait_for(self, what: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Until the run's metrics say so."""
        deadline = time.monotonic() + STALL_TIMEOUT_S
        while not what(metrics_of(self.folder)):
            assert time.monotonic() < deadline and self.process.poll() is None, self.end()
            time.sleep(0.1)

    def kill_inside(self, name: str) -> None:
        """SIGKILL to a Ray process of this run, by the beginning of its title."""
        import psutil

        own = psutil.Process(self.forks).children()
        named = [each for each in own if (each.cmdline() or [""])[0].startswith(f"ray::{name}")]
        assert named, [(each.cmdline() or [each.name()])[0] for each in own]
        named[-1].kill()

    def end(self) -> dict[str, Any]:
        output = self.process.communicate(timeout=STALL_TIMEOUT_S)[0]
        return {"code": self.process.returncode, "output": output}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_of(metrics: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in metrics if "reward/accuracy" in record]


def left_behind(folder: Path, forks: int) -> list[str]:
    """Processes of a run that still exist."""
    import psutil

    deadline = time.monotonic() + 20  # Ray's workers end a moment after Ray
    while (workers := psutil.Process(forks).children()) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = [str(each) for each in workers]
    for each in psutil.process_iter(["cmdline"]):
        words = " ".join(each.info["cmdline"] or [])
        if str(folder) in words:
            found.append(words[:200])
    return found


@dataclass
class Ended:
    """One process of ``forkrl train``, as it ended."""

    code: int
    output: str


@dataclass
class Story:
    folder: Path
    rank_killed: Ended
    after_rank_killed: list[dict[str, Any]]
    sampler_killed: Ended
    interrupted: Ended
    after_interruption: list[dict[str, Any]]
    finished: Ended
    left_behind: list[str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    place, told = once(tmp_path_factory, "verl-engine", tell)
    return Story(
        folder=place / "run",
        rank_killed=Ended(**told["rank_killed"]),
        after_rank_killed=told["after_rank_killed"],
        sampler_killed=Ended(**told["sampler_killed"]),
        interrupted=Ended(**told["interrupted"]),
        after_interruption=told["after_interruption"],
        finished=Ended(**told["finished"]),
        left_behind=told["left_behind"],
    )


def tell(place: Path) -> dict[str, Any]:
    with preloaded(environment_in(place)) as python:
        write_world(place, python.executable)
        return tell_with(place, python.pid)


def tell_with(place: Path, forks: int) -> dict[str, Any]:
    folder = place / "run"

    rank_killed = start(place, forks, "recipe.toml", "--trainer", "verl", "--out", "run")
    rank_killed.wait_for(lambda metrics: 3 in steps_of(metrics))
    rank_killed.kill_inside("WorkerDict")
    told: dict[str, Any] = {"rank_killed": rank_killed.end(), "after_rank_killed": metrics_of(folder)}

    sampler_killed = start(place, forks, "--resume", "run")
    sampler_killed.wait_for(lambda metrics: steps_of(metrics)[-1:] == [4] or len(steps_of(metrics)) > 3)
    sampler_killed.kill_inside("CpuServer")
    told |= {"sampler_killed": sampler_killed.end()}

    done = max(steps_of(metrics_of(folder)))
    interrupted = start(place, forks, "--resume", "run")
    interrupted.wait_for(lambda metrics: max(steps_of(metrics), default=0) == min(done + 1, STEPS - 1))
    interrupted.process.send_signal(signal.SIGINT)
    told |= {"interrupted": interrupted.end(), "after_interruption": metrics_of(folder)}

    told |= {"finished": start(place, forks, "--resume", "run").end()}
    return told | {"left_behind": left_behind(folder, forks)}


def write_world(place: Path, python: str) -> None:
    from forkrl.tasks.countdown import countdown_task

    prompts = countdown_task().train[:96]
    rows = [json.dumps({"prompt": prompt.text, "answer": prompt.answer}) for prompt in prompts]
    (place / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (place / "slow_verifier.py").write_text(VERIFIER)
    (place / "recipe.toml").write_text(RECIPE.format(python=python))


def start(place: Path, forks: int, *arguments: str) -> Attempt:
    process = subprocess.Popen(
        [sys.executable, "-m", "forkrl", "train", *arguments],
        cwd=place, env=environment_in(place), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Attempt(process, place / "run", forks)


def environment_in(place: Path) -> dict[str, str]:
    """Where the verifier and verl's platform without a GPU can be imported."""
    repository = Path(__file__).parents[2]
    folders = [str(repository / "src"), str(repository), str(place)]
    own = {"PYTHONPATH": os.pathsep.join(folders), "VERL_USE_EXTERNAL_MODULES": "tests.verl_cpu.register"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1"}


def test_a_killed_rank_ends_the_run_with_a_line_that_says_how_to_resume(story: Story) -> None:
    last = story.rank_killed.output.strip().splitlines()[-1]
    assert story.rank_killed.code == 1, story.rank_killed.output
    assert last.startswith("forkrl: training stopped") and "forkrl train --resume" in last and "log.txt" in last


def test_so_does_a_killed_sampler(story: Story) -> None:
    last = story.sampler_killed.output.strip().splitlines()[-1]
    assert story.sampler_killed.code == 1, story.sampler_killed.output
    assert last.startswith("forkrl: training stopped") and "forkrl train --resume" in last


def test_ctrl_c_saves_the_finished_steps(story: Story) -> None:
    assert story.interrupted.code == 130, story.interrupted.output
    saved = max(steps_of(story.after_interruption))
    assert f"with step {saved} saved; continue with: forkrl train --resume" in story.interrupted.output
    assert story.finished.code == 0, story.finished.output
    first = next(line for line in story.finished.output.splitlines() if line.startswith("step "))
    assert first.startswith(f"step {max(steps_of(story.after_interruption)) + 1}/{STEPS}")


def test_resuming_loses_the_unsaved_steps_and_nothing_else(story: Story) -> None:
    assert steps_of(story.after_rank_killed) == [1, 2, 3]
    metrics = metrics_of(story.folder)
    assert steps_of(metrics) == list(range(1, STEPS + 1))
    kept = [record for record in metrics if record["step"] <= 2]
    assert kept == [record for record in story.after_rank_killed if record["step"] <= 2]
    assert [record["step"] for record in metrics if "eval/accuracy" in record] == [0, STEPS]


def test_no_process_stays_behind(story: Story) -> None:
    assert not story.left_behind


def test_metrics_have_the_names_of_a_local_run(story: Story) -> None:
    local = {
        "reward/accuracy", "reward/mean", "response/length", "response/truncated_fraction", "entropy/mean",
        "entropy/threshold", "entropy/selected_mean", "entropy/unselected_mean", "selection/kept_fraction",
        "selection/kept_fraction_positive", "selection/kept_fraction_negative", "loss/policy", "loss/clip_fraction",
        "loss/approx_kl", "loss/ratio_max", "loss/kl", "loss/entropy", "grad/norm", "optimizer/lr", "rollout/tokens",
        "rollout/tokens_per_s", "time/rollout_s", "time/update_s", "time/step_s", "sampling/generation_batches",
        "sampling/groups_kept", "sampling/dropped_all_right", "sampling/dropped_all_wrong", "verifier/failures",
        "rollout/logprob_gap_max", "rollout/logprob_gap_k3", "rollout/logprob_gap_beyond_2x",
    }  # fmt: skip
    for record in metrics_of(story.folder):
        if "reward/accuracy" in record:
            assert local <= record.keys()
            assert record["selection/kept_fraction"] == pytest.approx(0.2, abs=0.01)
            assert record["entropy/selected_mean"] > record["entropy/threshold"] > record["entropy/unselected_mean"]
            assert record["reward/mean"] <= record["reward/accuracy"] + 1
            assert 0 < record["rollout/logprob_gap_mean"] < 1e-4  # fp32 on both sides
            assert record["rollout/sampler_weight_mean"] == pytest.approx(1, abs=1e-4)
            assert record["rollout/sampler_weight_cut"] == 0


def test_warm_up_and_decay_continue_through_every_resume(story: Story) -> None:
    from forkrl.config import OptimizerConfig
    from forkrl.method.schedule import share_of_lr

    settings = OptimizerConfig(warmup_steps=6, schedule="linear", min_lr_ratio=0.1)
    done, expected, rates = 0, [], []
    for record in metrics_of(story.folder):
        if "reward/accuracy" in record:
            # Two groups a gradient step; a step whose prompts are spent has fewer than four.
            steps = -(-int(record["sampling/groups_kept"]) // 2)
            progress = [(record["step"] - 1 + index / steps) / STEPS for index in range(steps)]
            shares = [share_of_lr(settings, done + index + 1, progress[index], 2 * STEPS) for index in range(steps)]
            expected.append(3e-4 * sum(shares) / steps)
            rates.append(record["optimizer/lr"])
            done += steps
    assert rates == pytest.approx(expected, rel=1e-6)


def test_a_verifier_that_hangs_is_killed_and_counted(story: Story) -> None:
    assert sum(record.get("verifier/failures_timeout", 0) for record in metrics_of(story.folder)) > 0


def test_rollouts_have_entropies_and_the_selection(story: Story) -> None:
    with RunFolder.open(story.folder) as run:
        assert run.rollout_names == [
            "eval-000000", f"eval-{STEPS:06d}", *[f"train-{step:06d}" for step in range(2, STEPS + 1, 2)]
        ]  # fmt: skip
        before, after = (run.read_rollouts(f"eval-{step:06d}") for step in (0, STEPS))
        # Held-out prompts come in the order of the file each time, so that a report can set them side by side.
        assert [row["prompt_id"] for row in before] == [row["prompt_id"] for row in after]
        rows = run.read_rollouts("train-000002")
        assert len(rows) == 8
        entropies = [value for row in rows for value in row["entropy"]]
        chosen = [value for row in rows for value in row["selected"]]
        assert min(e for e, c in zip(entropies, chosen, strict=True) if c) >= max(
            e for e, c in zip(entropies, chosen, strict=True) if not c
        )
        for row in rows:
            assert "".join(row["tokens"][: len(row["response"])]) == row["response"]
            assert row["advantage"] is not None and row["prompt"] and row["prompt_id"]


def test_the_merged_model_evaluates(story: Story) -> None:
    assert {path.name for path in (story.folder / "checkpoints").iterdir()} == {f"step-{STEPS - 2}", f"step-{STEPS}"}
    command = [sys.executable, "-m", "forkrl", "eval", str(story.folder), "--problems", "8", "--samples", "2"]
    command += ["--out", "evaluated"]
    place = story.folder.parent
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=place, env=environment_in(place), timeout=STALL_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout


def test_the_run_has_report_provenance_and_its_tracker(story: Story) -> None:
    assert (story.folder / "report.html").is_file()
    provenance = tomllib.loads((story.folder / "config.toml").read_text())["provenance"]
    assert provenance["engine"] == "verl" and provenance["verl"]
    assert list(story.folder.rglob("*tfevents*"))
