"""All tests here run a real vLLM (``make test-vllm``) and are skipped where it is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

MISSING = importlib.util.find_spec("vllm") is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.skipif(MISSING, reason="vLLM is not installed here; run make test-vllm"))
