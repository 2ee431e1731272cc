"""verl's process: started, watched, asked to stop, and gone with all that it started."""

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
"""For Ray to take its own processes down, once verl's has ended."""


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
    """Run verl to its end and tell of every line it adds to the metrics.

    The first Ctrl-C, SIGTERM or SIGHUP asks it to end after the step under way and to save; a second one ends it at
    once, and so does the first as long as no step has begun, when there is nothing to save.

    Args:
        command: verl's.
        environment: its whole environment.
        log: what it prints goes to the end of this file.
        begun: is there once verl does steps.
        stop: made to ask for the end.
        metrics: the run's metrics.jsonl.
        known: lines of it that are there already.
        on_metrics: called with each further line.
        on_stop: called once the end has been asked for, which may be minutes before it comes.

    Returns:
        The status that verl ended with.

    Raises:
        Interrupted: it was stopped.
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
    assert status is not None, "a process that was not stopped has ended by itself"
    return status


def _tell(metrics: Path, known: int, on_metrics: Callable[[Mapping[str, Any]], None]) -> int:
    """Hand on the whole lines after the first ``known``; how many they were."""
    *lines, _ = metrics.read_bytes().split(b"\n")
    for line in lines[known:]:
        on_metrics(json.loads(line))
    return max(0, len(lines) - known)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of verl's stays behind: its session, and what Ray had put into sessions of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
