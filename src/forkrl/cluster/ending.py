"""How a run of verl's ended, in one line for the user, and what is left of it."""

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
"""As a traceback ends. Errors that a warning quotes stand further along a line."""
_OWN_ERROR = re.compile(r"forkrl\.errors\.\w+: (.*)")
_PROCESS = re.compile(r"\([^()]*pid=[^()]*\)\s*")
"""Before a line that Ray hands on from another process."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def conclude(merge: Callable[[], None], checkpoints: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Merge what verl has saved, however the run inside ends.

    What ended it is what is raised; a merge that fails besides is told in a line of its own. An interruption learns
    what there is to go on from: unlike the local engine, verl may be stopped before it has saved, or while it does.

    Args:
        merge: raises UserError or OSError where it cannot.
        checkpoints: verl's own, which a resumed run goes on from.
        say: prints a line.
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
    except UserError as error:  # ended while verl wrote down which is the newest
        return f"but {error}"
    return "before anything was saved" if newest is None else f"with step {newest} saved"


def explain_end(run_folder: Path, status: int, *, since: int = 0) -> None:
    """Say why a run ended that did not come to its last step; nothing where it did.

    Args:
        run_folder: the run's.
        status: that verl ended with.
        since: bytes of the log that are of attempts before this one.

    Raises:
        UserError: verl was asked for something that it cannot do.
        TrainingHalted: anything else.
    """
    own = run_folder / OWN
    ended = json.loads((own / ENDED).read_text(encoding="utf-8")) if (own / ENDED).is_file() else {}
    kind, message, step = ended.get("kind", ""), ended.get("message", ""), ended.get("step", 0)
    if kind == UserError.__name__:
        raise UserError(message)
    way_on = f"what was saved is intact; go on with: forkrl train --resume {run_folder}"
    if kind == NothingToLearn.__name__:
        raise NothingToLearn(f"step {step}: {message}; {way_on}")
    if kind == TrainingHalted.__name__:
        raise TrainingHalted(f"step {step}: {message}; {way_on}")
    if status:
        last = last_error(own / "log.txt", since)
        if "connect to Ray cluster" in last:
            raise UserError(
                f"cluster.address: {last}; start Ray there (ray start --head), with the same RAY_AUTH_MODE and token "
                f"as here (docs/cluster.md)"
            )
        raise TrainingHalted(f"verl ended with status {status}: {last}; its log is {own / 'log.txt'}; {way_on}")


def last_error(log: Path, since: int = 0) -> str:
    """The line of a log that names why it ends: ForkRL's last error, else the last of all, else its last line."""
    text = log.read_bytes()[since:].decode(errors="replace")
    lines = [_PROCESS.sub("", _COLOUR.sub("", line).strip(), count=1) for line in text.splitlines()]
    for pattern, group in ((_OWN_ERROR, 1), (_ERROR, 0)):
        for line in reversed(lines):
            if found := pattern.match(line):
                return found[group][:300]
    return next((line[:300] for line in reversed(lines) if line), "it printed nothing")
