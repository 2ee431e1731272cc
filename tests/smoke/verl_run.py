"""Runs verl's own command line without a GPU, on ForkRL's testing aids, and leaves no process behind.

Settings are lists of hydra overrides; the last one of a name wins. A run costs more than a minute, most of it start-up:
share one among the tests of a module.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from forkrl.cluster.data import write_prompts, write_verifiers
from forkrl.config import RewardConfig
from forkrl.model.locations import model_location
from forkrl.tasks.countdown import countdown_task
from forkrl.types import Prompt, VerifierSpec
from tests.once import once
from tests.verl_cpu.preloaded import preloaded

REPOSITORY = Path(__file__).parents[2]
MAX_RESPONSE_TOKENS = 64
OVERLONG_CACHE = 16
_MARK = "FORKRL_TEST_VERL_RUN"
_STALL_TIMEOUT_S = 20.0
_RAY_TOO_SLOW = "The current node timed out during startup"
"""Ray gives its own processes 30 s to start. On a machine with much else to do that may not do; once more, then."""


@dataclass(frozen=True)
class VerlFiles:
    """What a run reads, and where it writes."""

    folder: Path
    train: list[Prompt]
    held_out: list[Prompt]
    verifiers: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verifiers", self.folder / "verifiers.json")


@dataclass(frozen=True)
class VerlOutcome:
    """How a run ended. ``code`` is None where it had to be ended; ``leftovers`` counts processes killed after it."""

    code: int | None
    output: str
    metrics: list[dict[str, Any]]
    leftovers: int
    seconds: float

    @property
    def end(self) -> str:
        """The last lines, for the message of a failed assertion."""
        return "\n".join(self.output.splitlines()[-60:])


def write_countdown(
    folder: Path,
    *,
    train: int = 64,
    held_out: int = 4,
    verifiers: Mapping[str, VerifierSpec] | None = None,
    reward: RewardConfig | None = None,
) -> VerlFiles:
    """Countdown prompts and their verifier, as files for verl."""
    task = countdown_task()
    files = VerlFiles(folder, list(task.train[:train]), list(task.held_out[:held_out]))
    write_prompts(folder / "train.parquet", files.train, task.name)
    write_prompts(folder / "held_out.parquet", files.held_out, task.name)
    write_verifiers(
        files.verifiers,
        task.verifiers if verifiers is None else verifiers,
        RewardConfig(overlong_cache=OVERLONG_CACHE) if reward is None else reward,
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )
    return files


def stock_overrides(files: VerlFiles, *, ranks: int = 1) -> list[str]:
    """Verl's own synchronous trainer on ``ranks`` ranks: GRPO on Countdown, with all of ForkRL around it.

    ``+forkrl.*`` holds what agent loop and reward manager read; a ForkRL trainer wants more.
    """
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        "trainer.v1.trainer_mode=sync",
        *_hardware(ranks),
        f"actor_rollout_ref.model.path={model_location('embedded:countdown-base')}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"data.train_files={files.folder}/train.parquet",
        f"data.val_files={files.folder}/held_out.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=16",
        f"data.max_response_length={MAX_RESPONSE_TOKENS}",
        "data.dataloader_num_workers=0",
        "data.filter_overlong_prompts=False",
        f"{rollout}.n=4",
        f"{rollout}.agent.num_workers=1",
        f"{rollout}.agent.default_agent_loop=forkrl_exact_prompt",
        f"{rollout}.calculate_log_probs=True",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={16 // ranks}",
        "algorithm.adv_estimator=grpo",
        f"{actor}.optim.lr=1e-3",
        f"{actor}.ppo_mini_batch_size=2",
        f"{actor}.ppo_micro_batch_size_per_gpu={8 // ranks}",
        "reward.num_workers=1",
        "reward.reward_manager.source=importlib",
        "reward.reward_manager.module.path=pkg://forkrl.cluster.rewards",
        "reward.reward_manager.name=ForkRewardManager",
        "+forkrl.stop_token_ids=[]",
        f"+forkrl.verifiers={files.verifiers}",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=True",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={files.folder}/checkpoints",
        f"trainer.rollout_data_dir={files.folder}/rollouts",
        f"trainer.validation_data_dir={files.folder}/validation",
        'trainer.logger=["console","file"]',
        f"hydra.run.dir={files.folder}/hydra",
    ]


def _hardware(ranks: int) -> list[str]:
    """No GPU: as many logical ones for Ray as there are ranks, FSDP2 in fp32, and ForkRL's sampler."""
    actor = "actor_rollout_ref.actor"
    return [
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={ranks}",
        "trainer.nnodes=1",
        "actor_rollout_ref.rollout.name=forkrl_cpu",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        f"{actor}.strategy=fsdp2",
        f"{actor}.fsdp_config.strategy=fsdp2",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.use_torch_compile=False",
        f"+{actor}.fsdp_config.mixed_precision.param_dtype=fp32",
        "ray_kwargs.ray_init.num_cpus=16",
        f"+ray_kwargs.ray_init.num_gpus={ranks}",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init.object_store_memory=300000000",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "transfer_queue.backend.SimpleStorage.total_storage_size=4096",
    ]


def run_once(
    factory: pytest.TempPathFactory, name: str, overrides: Callable[[VerlFiles], Sequence[str]], **how: Any
) -> tuple[VerlFiles, VerlOutcome]:
    """Countdown's files and a run on them, the same one for all of pytest's processes."""

    def run(folder: Path) -> dict[str, Any]:
        files = write_countdown(folder)
        return asdict(run_verl(overrides(files), folder, **how))

    folder, said = once(factory, name, run)
    task = countdown_task()
    return VerlFiles(folder, list(task.train[:64]), list(task.held_out[:4])), VerlOutcome(**said)


def run_verl(
    overrides: Sequence[str], folder: Path, *, timeout_s: float = 600.0, environment: Mapping[str, str] | None = None
) -> VerlOutcome:
    """Run ``verl.trainer.main_ppo`` to its end, or end it; nothing of it runs on afterwards. One run at a time.

    Args:
        overrides: hydra overrides.
        folder: for its output and its metrics.
        timeout_s: seconds until it is ended.
        environment: variables to add to those of a run without a GPU.
    """
    with (Path(tempfile.gettempdir()) / "forkrl-test-verl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = _run_once(overrides, folder, timeout_s, dict(environment or {}))
        if outcome.code and _RAY_TOO_SLOW in outcome.output:
            outcome = _run_once(overrides, folder, timeout_s, dict(environment or {}))
    return outcome


def _run_once(overrides: Sequence[str], folder: Path, timeout_s: float, environment: dict[str, str]) -> VerlOutcome:
    began = time.monotonic()
    # A socket's path is limited to about a hundred characters, so Ray's folder cannot be in pytest's.
    ray_folder = Path(tempfile.mkdtemp(prefix="fk-", dir="/tmp"))
    mark, metrics = uuid4().hex, folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    variables = cpu_environment() | environment
    with preloaded(variables) as python:
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
        command += [f"+ray_kwargs.ray_init._temp_dir={ray_folder}"]
        command += [f"+ray_kwargs.ray_init.runtime_env.py_executable='{python.executable}'"]
        try:
            with (folder / "output.txt").open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=variables | {_MARK: mark, "VERL_FILE_LOGGER_PATH": str(metrics)},
                    cwd=folder,
                    start_new_session=True,
                )
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout_s)
                code = process.poll()
        finally:
            leftovers = _end_all(mark, stall_timeout_s=0.0 if process.poll() is None else _STALL_TIMEOUT_S)
            process.wait()
            shutil.rmtree(ray_folder, ignore_errors=True)
    return VerlOutcome(
        code=code,
        output=(folder / "output.txt").read_text(errors="replace"),
        metrics=read_lines(metrics) if metrics.exists() else [],
        leftovers=leftovers,
        seconds=time.monotonic() - began,
    )


def cpu_environment() -> dict[str, str]:
    """Variables of a run without a GPU, which imports what this process can import."""
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    folders = [str(REPOSITORY / "src"), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(folders),
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # verl registers FSDP for cuda and npu alone
        "VERL_USE_EXTERNAL_MODULES": "tests.verl_cpu.register,forkrl.cluster.plugin",
        "OMP_NUM_THREADS": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "HYDRA_FULL_ERROR": "1",
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _end_all(mark: str, stall_timeout_s: float) -> int:
    """Kill what still carries the mark in its environment, once it has had time to end by itself; how many."""
    deadline = time.monotonic() + stall_timeout_s
    while (found := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    killed = len(found)
    while found:  # again and again: one may have started another meanwhile
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        found = _marked(mark)
    return killed


def _marked(mark: str) -> list[int]:
    """Processes, zombies apart, that were started with the mark in their environment."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found
