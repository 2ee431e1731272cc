"""The accelerator's benchmark, on the CPU at tiny sizes, as on a machine where ForkRL was never installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.backward import WAYS
from benchmarks.gpu.__main__ import FULL, SMALL, Part, compare_with_peer, run_part
from benchmarks.gpu.steps import RATIO, SHAPES, build_settings, extrapolate_rollout, matrix_weights
from forkrl.config import TrainConfig
from tests.foreign_machine import without_packages


def run_small(tmp_path: Path, *modules: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": without_packages(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--only", *modules], env=environment, capture_output=True)
    parts: list[dict[str, Any]] = json.loads((tmp_path / "gpu-small.json").read_text())["parts"]
    return parts


def test_parts_run_where_nothing_is_installed(tmp_path: Path) -> None:
    limits, steps, head, backward = run_small(tmp_path, "gpu.limits", "gpu.steps", "head", "backward")
    assert not limits["failed"] and not backward["failed"]
    assert {case["way"] for case in backward["results"]["backward"]["cases"]} == set(WAYS)
    rates = [next(rate for key, rate in case.items() if key != "what") for case in limits["results"]["limits"]["cases"]]
    assert len(rates) == 4 and all(rate > 0 for rate in rates)
    cases = {case["stage"]: case for case in steps["results"]["steps-tiny-16"]["cases"]}
    assert list(cases) == ["rollout", "update, dense", "step, dense", "update, forks_only", "step, forks_only"]
    assert cases["rollout"]["tokens_per_s"] > 0
    assert cases["step, dense"]["tokens_per_s"] > 0 and cases["update, dense"]["share"] > 0
    ways = {case["way"]: case for case in head["results"]["head"]["cases"]}
    assert ways["ours, chunked"]["best_peer_with_entropy"] == "materialised"
    assert "No module named 'verl'" in ways["verl"]["failed"]


@pytest.mark.parametrize("part", [*FULL, *SMALL], ids=lambda part: part.name)
def test_every_part_takes_the_arguments_it_is_given(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator's nine minutes would be lost on."""
    module = importlib.import_module(f"benchmarks.{part.module}")
    monkeypatch.setattr(sys, "argv", [part.module, "--device", "cuda", *shlex.split(part.arguments)])
    assert module.parse_options().device == "cuda"


def test_ways_of_decoding_stand_beside_each_other_and_a_missing_one_says_so(tmp_path: Path) -> None:
    (decode,) = run_small(tmp_path, "decode")
    assert not decode["failed"]
    cases = {case["way"]: case for case in decode["results"]["decode"]["cases"]}
    assert list(cases) == ["forkrl", "generate", "generate, continuous batching", "vLLM"]
    assert all(cases[way]["tokens"] == [16] for way in ("forkrl", "generate"))
    assert cases["vLLM"]["failed"].startswith("vLLM cannot be imported here (")


def test_a_peer_that_is_missing_is_told_and_is_no_failure(tmp_path: Path) -> None:
    (peer,) = run_small(tmp_path, "gpu.peer")
    missing = {"stage": "step", "failed": "trl is not installed: pip install trl==1.16.0"}
    assert peer["results"]["peer-tiny-16"]["cases"] == [missing] and not peer["failed"]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason='needs the extra "bench"')
def test_the_peer_takes_the_same_step() -> None:
    outcome = run_part(Part("gpu.peer", "--shape tiny --response 16", 60), "cpu", 60)
    assert not outcome["failed"]
    cases = {case["stage"]: case for case in outcome["results"]["peer-tiny-16"]["cases"]}
    assert list(cases) == ["rollout", "update", "step"]
    seconds = [case["seconds"] for case in cases.values()]
    assert all(value > 0 for value in seconds) and sum(seconds[:2]) == pytest.approx(seconds[2])
    assert cases["step"]["tokens_per_s"] == pytest.approx(16 * 16 / seconds[2])


def test_our_stages_stand_beside_the_peers_of_the_same_shape_and_length() -> None:
    def outcome(name: str, **seconds: float) -> dict[str, Any]:
        cases = [{"stage": key.replace("_", ", "), "seconds": value, "peak_bytes": 1} for key, value in seconds.items()]
        return {"results": {name: {"cases": [*cases, {"stage": "update, late", "failed": "out of memory"}]}}}

    ours = [outcome("steps-a-16", rollout=2.0, step_dense=4.0, step_few=3.0), outcome("steps-b-16", rollout=9.0)]
    rows = compare_with_peer([*ours, outcome("peer-a-16", rollout=6.0, update=1.0, step=6.0)])
    assert [(row["of"], row["stage"], row["ratio"]) for row in rows] == [
        ("a-16", "rollout", 3.0), ("a-16", "step, dense", 1.5), ("a-16", "step, few", 2.0),
    ]  # fmt: skip
    assert compare_with_peer(ours) == []


def test_two_windows_stand_for_a_whole_rollout() -> None:
    """Where each token takes longer than the one before by as much."""

    def seconds(prompt: int, tokens: int) -> float:
        return 5.0 + sum(1.0 + 0.01 * (prompt + before) for before in range(1, tokens))

    told = extrapolate_rollout(seconds, response=200, window=8)
    assert told["seconds"] == pytest.approx(seconds(64, 200), rel=1e-3)
    assert told["seconds_per_token"]["early"] < told["seconds_per_token"]["late"]


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
