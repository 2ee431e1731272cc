"""Cores, and CPU thread settings for a loaded machine (docs/threads.md). Imports no torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from forkrl.errors import UserError

# OpenMP and tokenizers read these once, at load time.
_ENVIRONMENT = {
    # Waiting threads sleep. By default they spin, and take the core from the thread they wait for.
    "OMP_WAIT_POLICY": "PASSIVE",
    # GNU's OpenMP, in PyTorch's Linux wheels, still spins for a while unless the count is 0.
    "GOMP_SPINCOUNT": "0",
    # Threads do not survive the fork of a verifier process, and prompts are tokenized only once.
    "TOKENIZERS_PARALLELISM": "false",
}


def configure_environment() -> None:
    """Set what numeric libraries read at load time, unless the user has. Call before importing torch."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def available_cores() -> int:
    """Cores this process may use: fewer than the machine has under taskset, a container or a batch system."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def configure_threads(num_threads: int = 0) -> int:
    """Set and return torch's intra-op threads; 0: ``OMP_NUM_THREADS``, else one per core."""
    import torch

    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not num_threads and text:
        if not text.isdigit() or int(text) == 0:
            raise UserError(f"OMP_NUM_THREADS = {text!r} is not a number of threads; unset it, or set runtime.threads")
        num_threads = int(text)
    num_threads = num_threads or available_cores()
    torch.set_num_threads(num_threads)
    return num_threads
