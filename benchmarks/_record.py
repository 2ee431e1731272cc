"""What every benchmark result carries: the machine, the versions, the commit, the command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import forkrl
from forkrl.parallel.threads import available_cores, processor
from forkrl.store.atomic import write_text

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("FORKRL_RESULTS", ROOT / "benchmarks" / "results"))
"""The variable is how one benchmark collects what others write (benchmarks/gpu)."""


def describe_setting() -> dict[str, Any]:
    """Enough to know what the figures of a result can be compared with."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _commit(),
        "device": device,
        "processor": processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {"forkrl": forkrl.__version__}  # its sources may be there without being installed
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }


def write_result(name: str, setting: dict[str, Any], cases: list[dict[str, Any]]) -> Path:
    """Write ``benchmarks/results/NAME.json``, all at once: what has been measured survives a kill."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_text(path, json.dumps({"setting": setting, "cases": cases}, indent=2) + "\n")
    return path


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")
