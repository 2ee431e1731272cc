"""verl's checkpoints, one file a rank, as Hugging Face folders: by verl's own merger, which writes bf16."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from forkrl.checkpoint import MANIFEST, adopt_weights
from forkrl.errors import UserError
from forkrl.run_folder import RunFolder

TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"global_step_(\d+)")


def verl_checkpoints(folder: Path) -> dict[int, Path]:
    """verl's whole checkpoints by step, oldest first: those its tracker has come to, that still have shards."""
    tracker = folder / TRACKER
    newest = int(tracker.read_text()) if tracker.is_file() else -1
    steps = {int(match[1]): path for path in folder.glob("global_step_*") if (match := _STEP.fullmatch(path.name))}
    return {step: steps[step] for step in sorted(steps) if step <= newest and any((steps[step] / "actor").glob("*.pt"))}


def merge_checkpoints(run: RunFolder, own: Path, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Write ``checkpoints/step-N`` for each of verl's checkpoints that has none, and drop those verl has dropped.

    Args:
        run: the run folder.
        own: verl's checkpoints.
        environment: of verl's processes.
        say: told of each.

    Raises:
        UserError: verl's merger fails; its shards are intact.
    """
    found = verl_checkpoints(own)
    for step, folder in found.items():
        if (run.checkpoints / f"step-{step}" / MANIFEST).is_file():
            continue
        say(f"merging the checkpoint of step {step}")
        target = own / f"merging-{step}"
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
        command += ["--local_dir", str(folder / "actor"), "--target_dir", str(target)]
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise UserError(f"{folder}: verl's merger failed ({last}); the shards are intact, run: {' '.join(command)}")
        adopt_weights(run.checkpoints, step, target)
    for folder in run.checkpoints.glob("step-*"):
        if int(folder.name.removeprefix("step-")) not in found:
            shutil.rmtree(folder)
