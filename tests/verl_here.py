"""Whether verl is installed. It takes seconds to import, so tests import it, and what imports it, when they run."""

from __future__ import annotations

import importlib.util

import pytest

_MISSING = importlib.util.find_spec("verl") is None
needs_verl = [pytest.mark.verl, pytest.mark.skipif(_MISSING, reason='needs the extra "verl"')]
"""For ``pytestmark``."""
