"""verl's checkpoints, one file per rank, merged into Hugging Face folders by verl's own merger, which writes bf16."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from forkrl.errors import UserError, first_line
from forkrl.store.checkpoint import MANIFEST, adopt_weights
from forkrl.store.run_folder import RunFolder

TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"global_step_(\d+)")


def verl_checkpoints(folder: Path) -> dict[int, Path]:
    """verl's complete checkpoints by step, oldest first: up to the step in its tracker, with shards."""
    tracker, begun = folder / TRACKER, begun_checkpoints(folder)
    sharded = [step for step, path in begun.items() if any((path / "actor").glob("*.pt"))]
    newest = -1
    if tracker.is_file() or len(sharded) > 1:
        try:
            newest = int(tracker.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{tracker}: does not name the newest checkpoint ({first_line(error)}); write "
                f"{max(sharded, default=0)} into it, or the step of an older one"
            ) from error
    return {step: begun[step] for step in sharded if step <= newest}


def begun_checkpoints(folder: Path) -> dict[int, Path]:
    """Those that verl has started to write, by step, oldest first."""
    found = {int(match[1]): path for path in folder.glob("global_step_*") if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def merge_checkpoints(
    run: RunFolder, own: Path, environment: Mapping[str, str], say: Callable[[str], None], *, keep: int
) -> None:
    """Write ``checkpoints/step-N`` for the newest ``keep`` of verl's checkpoints in ``own``, and delete older ones.

    verl deletes only those that the same process wrote, not those from before a resume.
    """
    whole = verl_checkpoints(own)
    found = dict(list(whole.items())[-keep:])
    for step in whole.keys() - found.keys():
        shutil.rmtree(whole[step])
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
