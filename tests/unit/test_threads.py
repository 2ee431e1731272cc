"""Thread settings: defaults that the user can override, and nothing that torch has to be loaded for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from forkrl.errors import UserError
from forkrl.parallel.threads import available_cores, configure_environment, configure_threads


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_environment_is_filled_in_and_the_users_value_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "before")  # so that the fixture restores them
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    configure_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["GOMP_SPINCOUNT"] == "0"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_threads_come_from_the_recipe_then_the_environment_then_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert configure_threads(2) == torch.get_num_threads() == 2
    assert configure_threads() == torch.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert configure_threads() == available_cores()


@pytest.mark.parametrize("text", ["many", "0", "-2"])
def test_a_senseless_number_of_threads_is_one_clear_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(UserError, match="OMP_NUM_THREADS"):
        configure_threads()
    assert configure_threads(1) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_available_cores_respect_the_cores_granted() -> None:
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{core}}})\n"
        "from forkrl.parallel.threads import available_cores\n"
        "print(available_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
