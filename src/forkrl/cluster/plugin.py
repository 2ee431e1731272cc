"""What verl loads, in every process that imports it: the names that ForkRL adds to verl's registries.

By the entry point ``verl.plugins``, or by ``VERL_USE_EXTERNAL_MODULES=forkrl.cluster.plugin`` where ForkRL is not
installed but on PYTHONPATH. It runs at the end of ``import verl``: what is imported here is loaded everywhere.
"""

from __future__ import annotations

import importlib
import logging
import os

_REGISTERING = (
    "forkrl.cluster.agent_loop",  # agent loop forkrl_exact_prompt
    "forkrl.cluster.trainer",  # trainer modes forkrl, forkrl_colocate_async, forkrl_separate_async
)
"""Modules that register something while they are imported. Names are not taken out of them: one of them may be what is
importing verl, and then it is not finished yet."""


def _load() -> None:
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from forkrl.cluster import cpu_testing

        cpu_testing.install()  # first: the modules below ask for the platform while they load
    for name in _REGISTERING:
        importlib.import_module(name)


try:
    _load()
except Exception:
    # Of a plug-in found by its entry point verl notes the error where nobody looks, and goes on without the plug-in.
    logging.getLogger("forkrl").exception("ForkRL's plug-in for verl cannot be loaded, so its trainers are missing")
    raise
