"""verl's process: starts it, watches it, and ends it with everything it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forkrl.store.atomic import explained_write_errors
from forkrl.store.interruption import Interruption

POLL_S = 0.5
GRACE_S = 20.0
"""For Ray to end its own processes after verl's."""


def run_and_watch(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    log: Path,
    begun: Path,
    stop: Path,
    metrics: Path,
    known: int,
    on_metrics: Callable[[Mapping[str, Any]], None],
    on_stop: Callable[[], None],
) -> int:
    """Run verl to its end, and report every line it adds to the metrics.

    The first Ctrl-C, SIGTERM or SIGHUP asks it to end after the current step and to save; a second one ends it at
    once, and so does the first before any step has begun, when there is nothing to save.

    Args:
        command: verl's.
        environment: all of it.
        log: verl's output is appended to this file.
        begun: exists once verl trains.
        stop: created to ask for the end.
        metrics: the run's metrics.jsonl.
        known: number of its lines at the start.
        on_metrics: called with each new line.
        on_stop: called once the end was requested.

    Returns:
        verl's exit status.
    """
    interruption = Interruption()
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
                known += _tell(metrics, known, on_metrics)
        finally:
            _end(process)
        _tell(metrics, known, on_metrics)
    interruption.check()
    assert status is not None, "only an interrupted process has no status"
    return status


def _tell(metrics: Path, known: int, on_metrics: Callable[[Mapping[str, Any]], None]) -> int:
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
