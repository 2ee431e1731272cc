"""``forkrl train --trainer verl``: run verl in its own process, which records metrics itself (``record.py``)."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer

import forkrl
from forkrl.cluster.data import write_prompts, write_verifiers
from forkrl.cluster.process import (
    GRACE_S,
    LOG,
    TRACKER,
    begun_checkpoints,
    conclude,
    explain_end,
    merge_checkpoints,
    run_and_watch,
    verl_checkpoints,
)
from forkrl.cluster.record import BEGUN, ENDED, OWN, PROGRESS, STOP
from forkrl.cluster.settings import EXTERNAL, VerlPaths, verl_environment
from forkrl.cluster.translate import refuse_unsuitable_prompts, refuse_untranslatable, verl_command
from forkrl.config import TrainConfig
from forkrl.config.recipe import recipe_toml
from forkrl.errors import UserError, first_line
from forkrl.method.trial import try_methods
from forkrl.model.locations import model_location
from forkrl.model.policy import require_positions
from forkrl.model.prompt_tokens import prompt_token_ids
from forkrl.model.stop_tokens import load_generation_config, stop_token_ids
from forkrl.model.support import require_fixed_frequencies, require_no_adapter
from forkrl.report.progress import TrainingDisplay, describe_selection
from forkrl.rewards import open_verifier
from forkrl.rewards.code import with_sandbox
from forkrl.store.atomic import explained_write_errors
from forkrl.store.checkpoint import MANIFEST
from forkrl.store.provenance import commit, new_run_id, refuse_other_data
from forkrl.store.resuming import accepted_changes
from forkrl.store.run_folder import RunFolder, refuse_occupied
from forkrl.tasks import open_task
from forkrl.training.tracking import TrackedRun, open_trackers, require_trackers
from forkrl.types import Task

CONNECT_TIMEOUT_S = 10.0
INSTALL = "pip install 'forkrl[verl]'"


class Prepared(NamedTuple):
    """What a recipe names, loaded and checked."""

    task: Task
    stop_token_ids: tuple[int, ...]
    model: str


def require_verl() -> None:
    missing = [name for name in ("verl", "ray", "transfer_queue", "hydra") if find_spec(name) is None]
    if missing:
        raise UserError(f'runtime.trainer = "verl" needs {missing[0]}, which is not installed: {INSTALL}')


def _require_ray(address: str) -> None:
    """Raises UserError if nothing listens at ``host:port``: Ray would try for minutes before it logs an error."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:  # "auto" and the like, which Ray resolves at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cluster.address = {address!r}: no Ray cluster answers there ({error}); start one with ray start --head, "
            f"or drop the address to start one on this machine"
        ) from error


def train_on_cluster(config: TrainConfig, out: Path, *, resume: Path | None = None) -> None:
    """Train in a new folder, or from the newest checkpoint of ``resume``."""
    require_verl()
    require_trackers(config.log.trackers)
    _require_ray(config.cluster.address)
    path = resume or out
    if resume is None:
        refuse_occupied(out)  # before reading all prompts
    else:
        accepted_changes(resume, config, ())
        if _is_finished(config, resume):
            print(f"{resume} is finished (step {config.training.steps}); a run by verl cannot be extended")
            return
    prepared = prepare(config)
    files = _paths(path.resolve(), prepared.model)
    command = _checked_command(config, files, prepared)
    environment, log = child_environment(config), path / OWN / LOG
    with ExitStack() as stack:
        folder = _open_folder(config, prepared.task, out, resume)
        stack.callback(folder.close)
        start = 0 if resume is None else _rewind(folder)
        _write_files(config, prepared, files, fresh=resume is None)
        tracked = TrackedRun(path, recipe_toml(config), folder.provenance["run_id"], start)
        try:
            tracker = stack.enter_context(open_trackers(config.log.trackers, tracked))
        except BaseException:
            if resume is None:
                folder.remove()
            raise
        if resume is not None and not _evaluation_due(config, folder, start):
            command.append("trainer.val_before_train=False")
        known, logged = len(folder.read_metrics()), log.stat().st_size if log.is_file() else 0
        folder.close()  # verl's trainer takes its lock
        header = f"{describe_selection(config)}; by verl on {_described_machines(config)}"
        floor = config.log.entropy_floor
        display = stack.enter_context(TrainingDisplay(config.training.steps, start, entropy_floor=floor, header=header))
        display.message(f"verl starts, which takes a minute; its log: {log}")

        def show(record: Mapping[str, Any]) -> None:
            values = {name: value for name, value in record.items() if value is not None}
            display.update(values)
            tracker.log(int(values.pop("step")), values)

        def merge() -> None:
            display.phase("merge")
            with _reopen(path) as run:
                merge_checkpoints(run, files.checkpoints, environment, display.message, keep=config.checkpoint.keep)

        def say_stopping() -> None:
            display.message("verl ends after this step; interrupt again to end it at once")

        with conclude(merge, files.checkpoints, display.message):
            status = run_and_watch(command, environment, path, known, show, say_stopping)
            explain_end(path, status, since=logged)


def dry_run(config: TrainConfig, out: Path) -> str:
    """The command of ``train_on_cluster``, one setting per line; raises the same errors."""
    prepared = prepare(config)
    files = _paths(out.resolve(), prepared.model)
    command = _checked_command(config, files, prepared)
    environment = [f"{name}={shlex.quote(value)}" for name, value in verl_environment(config).items()]
    written = ", ".join(shlex.quote(str(path)) for path in (files.train, files.held_out, files.verifiers))
    return (
        f"# Reads files that forkrl train --trainer verl writes before it starts verl, and writes to the run folder:\n"
        f"# {files.run_folder}, with {written}\n"
    ) + " \\\n  ".join([*environment, shlex.join(command[:3]), *map(shlex.quote, command[3:])])


def _checked_command(config: TrainConfig, files: VerlPaths, prepared: Prepared) -> list[str]:
    """verl's command; raises UserError for an override that verl, if installed, does not accept."""
    command = verl_command(config, files, stop_token_ids=prepared.stop_token_ids)
    verl = find_spec("verl")
    if config.cluster.overrides and verl is not None and verl.submodule_search_locations is not None:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException

        settings = Path(next(iter(verl.submodule_search_locations))) / "trainer" / "config"
        try:
            with initialize_config_dir(str(settings), version_base=None):
                compose("ppo_trainer", command[3:])
        except HydraException as error:
            raise UserError(
                f"cluster.overrides = {list(config.cluster.overrides)}: verl cannot take them ({first_line(error)}); "
                f'add a setting that its files do not have as "+section.key=value"'
            ) from error
    return command


def prepare(config: TrainConfig) -> Prepared:
    """Load and check the tokenizer, prompts and verifiers."""
    if config.runtime.device == "cpu" and not os.environ.get(EXTERNAL):
        raise UserError(
            f'runtime.device = "cpu" with runtime.trainer = "verl" is for ForkRL\'s tests, which add a platform and a '
            f'sampler to verl ({EXTERNAL}=tests.verl_cpu.register); set it to "auto", or runtime.trainer = "local"'
        )
    refuse_untranslatable(config)
    try_methods(config.selection, config.weights, config.loss)
    model = model_location(config.model.path)
    require_no_adapter(model, None, config.model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        generation, model_config = load_generation_config(model), AutoConfig.from_pretrained(model)
    except Exception as error:  # a damaged or foreign folder can raise anything inside the library
        raise UserError(
            f"model.path = {config.model.path!r} has no usable tokenizer or config.json: {first_line(error)}"
        ) from error
    require_fixed_frequencies(model_config, config.model.path)
    task = open_task(config.task, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens)
    lengths = [len(prompt_token_ids(tokenizer, prompt)) for prompt in (*task.train, *task.held_out)]
    require_positions(model_config, max(lengths), config.rollout.max_response_tokens)
    refuse_unsuitable_prompts(config, Counter(prompt.source for prompt in task.train))
    with open_verifier(with_sandbox(task.verifiers, config.sandbox), config.reward):
        pass  # reports a verifier that cannot be imported here instead of inside an actor
    return Prepared(task, stop_token_ids(tokenizer, generation, config.rollout.stop), model)


def child_environment(config: TrainConfig) -> dict[str, str]:
    """This process's environment, plus what verl and Ray need to import the same code."""
    environment = {**os.environ, **verl_environment(config)}
    source = str(Path(forkrl.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment.setdefault("HYDRA_FULL_ERROR", "1")
    if config.runtime.device == "cpu":
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray refuses more GPUs than it lists
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _paths(run_folder: Path, model: str) -> VerlPaths:
    own = run_folder / OWN
    return VerlPaths(
        model=model,
        train=own / "train.parquet",
        held_out=own / "held_out.parquet",
        verifiers=own / "verifiers.json",
        checkpoints=own / "checkpoints",
        run_folder=run_folder,
    )


def _open_folder(config: TrainConfig, task: Task, out: Path, resume: Path | None) -> RunFolder:
    if resume is not None:
        folder = RunFolder.open(resume)
        refuse_other_data(folder, config, task.fingerprint)
        return folder
    provenance = {
        "engine": "verl",
        "forkrl": forkrl.__version__,
        **{name: metadata.version(name) for name in ("verl", "torch", "transformers", "ray")},
        "python": platform.python_version(),
        "commit": commit(),
        "data_fingerprint": task.fingerprint,
        "command": shlex.join(["forkrl", *sys.argv[1:]]),
        "run_id": new_run_id(),
    }
    return RunFolder.create(out, recipe_toml(config), provenance)


def _reopen(path: Path) -> RunFolder:
    """The folder, once verl's trainer has released its lock; it outlives its driver briefly."""
    deadline = time.monotonic() + GRACE_S
    while True:
        try:
            return RunFolder.open(path)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _is_finished(config: TrainConfig, folder: Path) -> bool:
    """Whether a run's last step was trained, evaluated and merged."""
    last = config.training.steps
    if not (folder / "checkpoints" / f"step-{last}" / MANIFEST).is_file():
        return False
    with RunFolder.open(folder) as run:
        return _is_evaluated(run, last)


def _is_evaluated(folder: RunFolder, step: int) -> bool:
    return any(record.get("step") == step and "eval/accuracy" in record for record in folder.read_metrics())


def _evaluation_due(config: TrainConfig, folder: RunFolder, step: int) -> bool:
    due = step in (0, config.training.steps) or (config.eval.every > 0 and step % config.eval.every == 0)
    return due and not _is_evaluated(folder, step)


def _write_files(config: TrainConfig, prepared: Prepared, files: VerlPaths, *, fresh: bool) -> None:
    """Write what verl reads; a resumed run keeps its prompts and their order."""
    task, own = prepared.task, files.run_folder / OWN
    with explained_write_errors(files.run_folder):
        own.mkdir(exist_ok=True)
        for name in (STOP, ENDED, BEGUN):
            (own / name).unlink(missing_ok=True)
    if fresh or not files.train.is_file():
        write_prompts(files.train, task.train, task.name)
        write_prompts(files.held_out, task.held_out[: config.eval.problems], task.name)
    verifiers = with_sandbox(task.verifiers, config.sandbox)
    write_verifiers(files.verifiers, verifiers, config.reward, max_response_tokens=config.rollout.max_response_tokens)


def _rewind(folder: RunFolder) -> int:
    """Delete everything after verl's newest complete checkpoint; returns its step, or 0."""
    own = folder.path / OWN / "checkpoints"
    complete = verl_checkpoints(own)
    for step, leftover in begun_checkpoints(own).items():
        if step > max(complete, default=0):
            shutil.rmtree(leftover)
    if not complete:
        (own / TRACKER).unlink(missing_ok=True)
        folder.discard_after(-1, 0)
        return 0
    step = max(complete)
    try:
        progress = json.loads((complete[step] / PROGRESS).read_text(encoding="utf-8"))
        size = int(progress["metrics_bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{complete[step] / PROGRESS}: cannot be read ({first_line(error)}); write {step - 1} or an older step "
            f"into {own / TRACKER} to resume from there"
        ) from error
    line, newline, _ = (folder.path / "metrics.jsonl").read_bytes()[size:].partition(b"\n")
    if newline and b'"eval/accuracy"' in line and json.loads(line).get("step") == step:
        size += len(line + newline)  # keep the evaluation logged after the checkpoint
    folder.discard_after(step, size)
    return step


def _described_machines(config: TrainConfig) -> str:
    cluster, what = config.cluster, "CPU ranks (for tests)" if config.runtime.device == "cpu" else "GPUs"
    where = f"the Ray cluster at {cluster.address}" if cluster.address else "this machine"
    return f"{cluster.nodes} x {cluster.gpus_per_node} {what} of {where}"
