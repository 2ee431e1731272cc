"""Run verl's process: watch it, end it, explain its end, and merge its checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forkrl.cluster.record import BEGUN, ENDED, OWN, STOP
from forkrl.errors import NothingToLearn, TrainingHalted, UserError, first_line
from forkrl.store.atomic import explained_write_errors
from forkrl.store.checkpoint import MANIFEST, adopt_weights
from forkrl.store.interruption import Interrupted, Interruption
from forkrl.store.run_folder import RunFolder

POLL_S = 0.5
GRACE_S = 20.0
"""Time for Ray to end its own processes after verl's."""
LOG = "log.txt"
TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"global_step_(\d+)")
_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Died|Timeout)\b.*")
"""The last line of a traceback. An error quoted in a warning does not start a line."""
_OWN_ERROR = re.compile(r"forkrl\.errors\.\w+: (.*)")
_PREFIX = re.compile(r"\([^()]*pid=[^()]*\)\s*")
"""Starts a line that Ray forwards from another process."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def run_and_watch(
    command: Sequence[str],
    environment: Mapping[str, str],
    run_folder: Path,
    known: int,
    on_metrics: Callable[[Mapping[str, Any]], None],
    on_stop: Callable[[], None],
) -> int:
    """Run verl to its end, report each new line of metrics.jsonl after the first ``known``, and return the exit status.

    The first stop signal makes verl save and end after the current step (``on_stop``); a second, or one before any
    step, ends it at once.
    """
    log, begun, stop = (run_folder / OWN / name for name in (LOG, BEGUN, STOP))
    metrics, interruption = run_folder / "metrics.jsonl", Interruption()
    with explained_write_errors(log), log.open("ab") as output:
        process = subprocess.Popen(
            list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    with interruption:
        try:
            while (status := process.poll()) is None:
                if interruption.signalled_again or (interruption.signalled and not begun.exists()):
                    break
                if interruption.signalled and not stop.exists():
                    stop.touch()
                    on_stop()
                time.sleep(POLL_S)
                known += _report(metrics, known, on_metrics)
        finally:
            _end(process)
        _report(metrics, known, on_metrics)
    interruption.check()
    assert status is not None, "only an interrupted process has no status"
    return status


def _report(metrics: Path, known: int, on_metrics: Callable[[Mapping[str, Any]], None]) -> int:
    """Report complete lines after the first ``known``; returns their number."""
    *lines, _ = metrics.read_bytes().split(b"\n")
    for line in lines[known:]:
        on_metrics(json.loads(line))
    return max(0, len(lines) - known)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End verl's session; Ray then ends the processes in its own sessions."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def conclude(merge: Callable[[], None], checkpoints: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Merge verl's checkpoints however the run inside ends, then re-raise its error; ``say`` reports a failed merge."""
    try:
        yield
    except BaseException as ended:
        if isinstance(ended, Interrupted):
            ended.outcome = _what_is_saved(checkpoints)
        try:
            merge()
        except (UserError, OSError) as error:
            say(f"verl's checkpoints were not merged: {error}")
        raise
    merge()


def _what_is_saved(checkpoints: Path) -> str:
    try:
        newest = max(verl_checkpoints(checkpoints), default=None)
    except UserError as error:  # ended while verl wrote its tracker
        return f"but {error}"
    return "before anything was saved" if newest is None else f"with step {newest} saved"


def explain_end(run_folder: Path, status: int, *, since: int = 0) -> None:
    """Raise the reason why a run ended early, if it did. ``since``: size of the log at the start."""
    own = run_folder / OWN
    ended = json.loads((own / ENDED).read_text(encoding="utf-8")) if (own / ENDED).is_file() else {}
    kind, message = ended.get("kind", ""), ended.get("message", "")
    if kind == UserError.__name__:
        raise UserError(message)
    resume_hint = f"what was saved is intact; resume with: forkrl train --resume {run_folder}"
    for error in (NothingToLearn, TrainingHalted):
        if kind == error.__name__:
            raise error(f"step {ended.get('step', 0)}: {message}; {resume_hint}")
    if status:
        last = last_error(own / LOG, since)
        if "connect to Ray cluster" in last:
            raise UserError(
                f"cluster.address: {last}; start Ray there (ray start --head), with the same RAY_AUTH_MODE and token "
                f"as here (docs/cluster.md)"
            )
        raise TrainingHalted(f"verl ended with status {status}: {last}; its log is {own / LOG}; {resume_hint}")


def last_error(log: Path, since: int = 0) -> str:
    """Why a run ended: the log's last ForkRL error, else the last error, else the last line."""
    text = log.read_bytes()[since:].decode(errors="replace")
    lines = [_PREFIX.sub("", _COLOUR.sub("", line).strip(), count=1) for line in text.splitlines()]
    for pattern, group in ((_OWN_ERROR, 1), (_ERROR, 0)):
        for line in reversed(lines):
            if found := pattern.match(line):
                return found[group][:300]
    return next((line[:300] for line in reversed(lines) if line), "it printed nothing")


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
    """Checkpoints that verl has started to write, by step, oldest first."""
    found = {int(match[1]): path for path in folder.glob("global_step_*") if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def merge_checkpoints(
    run: RunFolder, own: Path, environment: Mapping[str, str], say: Callable[[str], None], *, keep: int
) -> None:
    """Merge the newest ``keep`` of verl's checkpoints in ``own`` to ``checkpoints/step-N``, and delete older ones.

    verl's merger writes bf16. verl itself does not delete checkpoints from before a resume.
    """
    complete = verl_checkpoints(own)
    kept = dict(list(complete.items())[-keep:])
    for step in complete.keys() - kept.keys():
        shutil.rmtree(complete[step])
    for step, folder in kept.items():
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
        if int(folder.name.removeprefix("step-")) not in kept:
            shutil.rmtree(folder)
