"""Work that several tests look at, done once for all of pytest's worker processes.

A fixture of a module is made anew in every process that gets a test of the module; what takes minutes must not be.
"""

from __future__ import annotations

import fcntl
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """A folder of that name and what ``make`` said of it, as JSON holds it; who comes second waits for the first.

    Raises:
        AssertionError: ``make`` failed, in whichever process it ran.
    """
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, result = shared / name, shared / f"{name}.json"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            folder.mkdir()
            try:
                made = {"made": make(folder)}
            except Exception:
                made = {"failed": traceback.format_exc()}
            result.write_text(json.dumps(made))
    said = json.loads(result.read_text())
    assert "failed" not in said, said["failed"]
    return folder, said["made"]
