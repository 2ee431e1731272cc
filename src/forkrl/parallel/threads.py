"""CPU threads that survive a loaded machine. Measurements and reasons: docs/threads.md. Imports no torch."""

from __future__ import annotations

import os

from forkrl.errors import UserError

# Read once, by the OpenMP runtime or by tokenizers, when they are first loaded: hence before torch.
_ENVIRONMENT = {
    # Threads that wait sleep. By default they spin, and take the core from the very thread they wait for.
    "OMP_WAIT_POLICY": "PASSIVE",
    # GNU's OpenMP, which PyTorch's Linux wheels carry, spins a while even so unless told not to at all.
    "GOMP_SPINCOUNT": "0",
    # Its threads would not survive the fork of a verifier process, and prompts are tokenized once.
    "TOKENIZERS_PARALLELISM": "false",
}


def configure_environment() -> None:
    """Set what the numeric libraries read at load time; a variable that the user has set is kept.

    Call it before torch is imported: afterwards it has no effect on this process, only on its children.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def available_cores() -> int:
    """Cores this process may run on: fewer than the machine has under taskset, a container or a batch system."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def configure_threads(num_threads: int = 0) -> int:
    """Set the number of threads of one torch operation; return it.

    Args:
        num_threads: 0 takes ``OMP_NUM_THREADS`` where it is set, else one a core.
    """
    import torch

    chosen = num_threads or _threads_of_environment() or available_cores()
    torch.set_num_threads(chosen)
    return chosen


def _threads_of_environment() -> int:
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not text:
        return 0
    if not text.isdigit() or int(text) == 0:
        raise UserError(f"OMP_NUM_THREADS = {text!r} is not a number of threads; unset it, or set runtime.threads")
    return int(text)
