"""What must be settled before any test imports anything, and what tests of every kind share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.smoke.world import Launcher

# Triton decides when it is imported whether its kernels are compiled or interpreted. Without an accelerator only the
# interpreter can run them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """What runs commands and tests in processes with a pretend accelerator."""
    from tests.pretend_accelerator import missing
    from tests.smoke.world import Launcher

    if reason := missing():
        pytest.skip(f"no pretend accelerator: {reason}")
    launcher = Launcher(tmp_path_factory.mktemp("accelerated"), accelerator=True)
    yield launcher
    launcher.close()
