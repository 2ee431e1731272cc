"""How a run of verl's ended, in one line for the user, and what is saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forkrl.cluster.merge import verl_checkpoints
from forkrl.cluster.record import ENDED, OWN
from forkrl.errors import NothingToLearn, TrainingHalted, UserError
from forkrl.store.interruption import Interrupted

_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Died|Timeout)\b.*")
"""The last line of a traceback. Errors that a warning quotes do not start a line."""
_OWN_ERROR = re.compile(r"forkrl\.errors\.\w+: (.*)")
_PROCESS = re.compile(r"\([^()]*pid=[^()]*\)\s*")
"""The prefix of a line that Ray forwards from another process."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def conclude(merge: Callable[[], None], checkpoints: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Merge what verl has saved, however the run inside ends; the error that ended it is raised.

    ``say`` prints the message of a merge that fails as well. An interruption gets the state of verl's ``checkpoints``
    as its outcome: unlike the local engine, verl may be stopped before or while it saves.
    """
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
    """Raise the reason why a run ended before its last step, if it did.

    Args:
        run_folder: the run's.
        status: verl's exit status.
        since: size of the log before this attempt.
    """
    own = run_folder / OWN
    ended = json.loads((own / ENDED).read_text(encoding="utf-8")) if (own / ENDED).is_file() else {}
    kind, message, step = ended.get("kind", ""), ended.get("message", ""), ended.get("step", 0)
    if kind == UserError.__name__:
        raise UserError(message)
    resume_hint = f"what was saved is intact; resume with: forkrl train --resume {run_folder}"
    if kind == NothingToLearn.__name__:
        raise NothingToLearn(f"step {step}: {message}; {resume_hint}")
    if kind == TrainingHalted.__name__:
        raise TrainingHalted(f"step {step}: {message}; {resume_hint}")
    if status:
        last = last_error(own / "log.txt", since)
        if "connect to Ray cluster" in last:
            raise UserError(
                f"cluster.address: {last}; start Ray there (ray start --head), with the same RAY_AUTH_MODE and token "
                f"as here (docs/cluster.md)"
            )
        raise TrainingHalted(f"verl ended with status {status}: {last}; its log is {own / 'log.txt'}; {resume_hint}")


def last_error(log: Path, since: int = 0) -> str:
    """The line of a log with the cause of its end: ForkRL's last error, else the last error, else the last line."""
    text = log.read_bytes()[since:].decode(errors="replace")
    lines = [_PROCESS.sub("", _COLOUR.sub("", line).strip(), count=1) for line in text.splitlines()]
    for pattern, group in ((_OWN_ERROR, 1), (_ERROR, 0)):
        for line in reversed(lines):
            if found := pattern.match(line):
                return found[group][:300]
    return next((line[:300] for line in reversed(lines) if line), "it printed nothing")
