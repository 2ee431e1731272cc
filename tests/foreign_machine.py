"""A machine with PyTorch and transformers where ForkRL was never installed: most of its dependencies are missing."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
MISSING = ("pydantic", "rich", "math_verify", "matplotlib", "datasets", "pyarrow", "tomli_w", "trl", "verl")

_START = f"""
import importlib.machinery as machinery

find = machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {MISSING} else find(name, path, target)

machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def without_packages(folder: Path) -> str:
    """A ``PYTHONPATH`` under which Python starts as if the packages were not there; ForkRL is found as sources."""
    (folder / "sitecustomize.py").write_text(_START)
    return os.pathsep.join(map(str, (folder, ROOT / "src", ROOT)))
