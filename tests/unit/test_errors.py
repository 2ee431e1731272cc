"""Errors and hostile text in one line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from forkrl.cli import main
from forkrl.errors import TrainingHalted, first_line, out_of_memory_names, printable
from forkrl.model.policy import Policy
from forkrl.model.support import require_supported
from tests.models import random_policy


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb"), "a"),
        (ValueError("\n  a\n"), "a"),
        (ValueError(""), "ValueError"),
        (OSError(28, "No space"), "[Errno 28] No space"),
        (ValueError("x" * 500), "x" * 300),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8), lambda: torch.zeros(2**58)],
)
def test_running_out_of_memory_names_the_setting(allocate: Callable[[], object]) -> None:
    with (
        pytest.raises(TrainingHalted, match=r"^out of memory \(.*\); lower rollout.max_sequences = 256$"),
        out_of_memory_names("rollout.max_sequences", 256),
    ):
        allocate()


def out_of_memory(*_: object) -> int:
    return torch.empty(2**60, dtype=torch.uint8).numel()


def test_a_command_that_runs_out_of_memory_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("forkrl.commands.doctor.run_doctor", out_of_memory)
    assert main(["doctor"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("forkrl: out of memory (") and "lower runtime.workers or rollout.max_sequences" in line


def test_a_model_for_which_there_is_no_memory_is_not_called_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy()
    monkeypatch.setattr(Policy, "logits", out_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        require_supported(policy, "model")


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("can't allocate memory")])
def test_other_errors_are_not_called_out_of_memory(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), out_of_memory_names("rollout.max_sequences", 256):
        raise error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_the_accelerator_s_memory_counts_too(error: Exception) -> None:
    with (
        pytest.raises(TrainingHalted, match=r"CUDA out of memory.*lower training.micro_batch_tokens = 8192"),
        out_of_memory_names("training.micro_batch_tokens", 8192),
    ):
        raise error


def test_printable_escapes_what_acts_and_nothing_else() -> None:
    text = "a é\x1b[2J\u202e\ue000\U000e0041\n\t"
    assert printable(text) == r"a é\x1b[2J\u202e\ue000\U000e0041\x0a\x09"
