"""The accelerator's benchmark, on the CPU at tiny sizes, as on a machine where ForkRL was never installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.__main__ import Part, run_part
from benchmarks.gpu.steps import RATIO, SHAPES, build_settings, matrix_weights
from forkrl.config import TrainConfig
from tests.foreign_machine import without_packages


def run_small(tmp_path: Path, *modules: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": without_packages(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--only", *modules], env=environment, capture_output=True)
    parts: list[dict[str, Any]] = json.loads((tmp_path / "gpu-small.json").read_text())["parts"]
    return parts


def test_parts_run_where_nothing_is_installed(tmp_path: Path) -> None:
    limits, steps, head = run_small(tmp_path, "gpu.limits", "gpu.steps", "head")
    assert not limits["failed"]
    rates = [next(rate for key, rate in case.items() if key != "what") for case in limits["results"]["limits"]["cases"]]
    assert len(rates) == 4 and all(rate > 0 for rate in rates)
    cases = {case["stage"]: case for case in steps["results"]["steps-tiny-16"]["cases"]}
    assert list(cases) == ["rollout", "update, dense", "step, dense", "update, forks_only", "step, forks_only"]
    assert cases["step, dense"]["tokens_per_s"] > 0 and 0 < cases["update, dense"]["share"] < 1
    ways = {case["way"]: case for case in head["results"]["head"]["cases"]}
    assert ways["ours, chunked"]["best_peer_with_entropy"] == "materialised"
    assert "No module named 'verl'" in ways["verl"]["failed"]


@pytest.mark.parametrize(
    ("part", "seconds", "failed"),
    [
        (Part("no_such_part", "", 9), 9, "No module named benchmarks.no_such_part"),
        (Part("gpu.limits", "--size 3", 9), 9, "unrecognized arguments"),
        (Part("gpu.steps", "--shape 0.6B", 9), 5, "ran over its 5 s"),
        (Part("gpu.limits", "", 9), 1, "no time was left"),
    ],
)
def test_a_part_that_fails_says_why(part: Part, seconds: float, failed: str) -> None:
    assert failed in run_part(part, "cpu", seconds)["failed"]


def test_the_settings_of_a_step_are_those_of_a_recipe() -> None:
    """They are written out there because recipes need pydantic."""
    default, given = TrainConfig(), build_settings("dense", 32768)
    for name, section in vars(given).items():
        assert isinstance(section, SimpleNamespace)
        changed = {"scope": "mini_batch"} if name == "selection" else {}
        expected = {key: changed.get(key, getattr(getattr(default, name), key)) for key in vars(section)}
        assert vars(section) == expected
    assert default.selection.ratio == RATIO


def test_the_shapes_have_the_parameters_of_their_names() -> None:
    assert matrix_weights(SHAPES["0.6B"]) == pytest.approx(0.6e9, rel=0.01)
    assert matrix_weights(SHAPES["8B"]) == pytest.approx(7.57e9, rel=0.01)  # its input embedding is looked up, 0.62e9
