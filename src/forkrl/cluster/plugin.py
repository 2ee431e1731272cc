"""Registers ForkRL's trainers and agent loop at the end of ``import verl``, so its imports are loaded everywhere.

Found by the entry point ``verl.plugins``, or by ``VERL_USE_EXTERNAL_MODULES`` if ForkRL is only on PYTHONPATH.
"""

from __future__ import annotations

import importlib
import logging

try:
    # Imported as modules: one of them may itself be importing verl, and its names do not exist yet.
    importlib.import_module("forkrl.cluster.agent_loop")  # registers forkrl_exact_prompt
    importlib.import_module("forkrl.cluster.trainer")  # registers forkrl, forkrl_colocate_async, forkrl_separate_async
except Exception:
    # verl logs the error of a plug-in found by its entry point at DEBUG, and continues without it.
    logging.getLogger("forkrl").exception("ForkRL's plug-in for verl cannot be loaded, so its trainers are missing")
    raise
