"""Where a run's numbers come from: versions, commit, data, machine."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import forkrl
from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.parallel.workers import Workers
from forkrl.store.run_folder import RunFolder
from forkrl.types import Task


def describe_provenance(task: Task, workers: Workers) -> dict[str, Any]:
    """Versions, commit, data, threads and device, to reproduce a result."""
    return {
        "forkrl": forkrl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "data_fingerprint": task.fingerprint,
        "workers": workers.count,
        "threads": torch.get_num_threads(),
        "device": str(workers.policy.device),
        "command": shlex.join(["forkrl", *sys.argv[1:]]),
    }


def changed_arithmetic(then: Mapping[str, Any], workers: Workers, more: Mapping[str, str]) -> str:
    """What changed of everything that affects the last bits of a result, as one phrase; empty if nothing.

    ``more``: what else does, by its name in the provenance.
    """
    now = {
        "workers": workers.count,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **more,
    }
    changed = {name: value for name, value in now.items() if then.get(name) != value}
    return ", ".join(f"{name} {value} instead of {then.get(name, 'unknown')}" for name, value in changed.items())


def refuse_other_data(folder: RunFolder, config: TrainConfig, fingerprint: str) -> None:
    """Close the folder and raise UserError if a resumed run has other prompts."""
    before = folder.provenance.get("data_fingerprint")
    if before != fingerprint:
        folder.close()
        raise UserError(
            f"--resume {folder.path}: the prompts of task.{config.task.name} are not those the run began with "
            f"(fingerprint {str(before)[:12]} then, {fingerprint[:12]} now); restore the data, or start a new run"
        )


def commit() -> str:
    """The commit of a source checkout, marked if dirty; empty for an installed package."""
    source = Path(__file__).resolve().parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def new_run_id() -> str:
    """A unique id, drawn without the seeded generators."""
    return uuid.uuid4().hex[:12]
