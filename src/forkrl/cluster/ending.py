"""How a run of verl's ended, in one line for the user."""

from __future__ import annotations

import json
import re
from pathlib import Path

from forkrl.cluster.record import ENDED, OWN
from forkrl.errors import NothingToLearn, TrainingHalted, UserError

_ERROR = re.compile(r"(?:^|\s)((?:[A-Za-z_]+\.)*[A-Z][A-Za-z]*(?:Error|Exception|Died|Timeout)\b.*)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def explain_end(run_folder: Path, status: int) -> None:
    """Say why a run ended that did not come to its last step; nothing where it did.

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
        last = last_error(own / "log.txt")
        if "connect to Ray cluster" in last:
            raise UserError(
                f"cluster.address: {last}; start Ray there (ray start --head), with the same RAY_AUTH_MODE and token "
                f"as here (docs/cluster.md)"
            )
        raise TrainingHalted(f"verl ended with status {status}: {last}; its log is {own / 'log.txt'}; {way_on}")


def last_error(log: Path) -> str:
    """The last line of a log that names an error; else its last line."""
    lines = [_COLOUR.sub("", line).strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    for line in reversed(lines[-2000:]):
        if found := _ERROR.search(line):
            return found[1][:300]
    return next((line[:300] for line in reversed(lines) if line), "it printed nothing")
