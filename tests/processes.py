"""What the tests ask about processes of this machine."""

import time
from collections.abc import Callable
from pathlib import Path


def state(pid: int) -> str | None:
    """One letter, as in ``proc(5)``; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between opening and reading
        return None


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return state(pid) not in (None, "Z")


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> bool:
    """Whether a condition came true within the limit."""
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
