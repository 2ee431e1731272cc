"""What verl loads in every process that imports it: the names that ForkRL adds to verl's registries.

Found by the entry point ``verl.plugins``, or by ``VERL_USE_EXTERNAL_MODULES=forkrl.cluster.plugin`` where ForkRL is not
installed but on PYTHONPATH. It runs at the end of ``import verl``: what is imported here is loaded everywhere.
"""

from __future__ import annotations

import importlib
import logging

try:
    # Imported as modules: one of them may be what is importing verl, and then its names do not exist yet.
    importlib.import_module("forkrl.cluster.agent_loop")  # registers forkrl_exact_prompt
    importlib.import_module("forkrl.cluster.trainer")  # registers forkrl, forkrl_colocate_async, forkrl_separate_async
except Exception:
    # verl logs the error of a plug-in found by its entry point at DEBUG, and continues without it.
    logging.getLogger("forkrl").exception("ForkRL's plug-in for verl cannot be loaded, so its trainers are missing")
    raise
