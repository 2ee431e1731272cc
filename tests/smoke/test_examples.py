"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTS = {
    "forks_in_python.py": ["overlap of the top fifth"],
    "guess_number.py": [],  # an environment: tests/unit/test_environments.py
    "own_methods.py": ["loss/policy", "selection/kept_fraction"],
    "own_verifier.py": [
        "function\n  pi: 'It is about 3.14' VerifierResult(score=1.0, failure='', answer='3.14')",
        "server\n  pi: 'It is about 3.14' VerifierResult(score=1.0, failure='', answer='3.14')",
        "failures: {'error': 1}",
    ],
    "train_in_python.py": ["step 2: 0.", "selection/kept_fraction", "response"],
}
WARNS = {
    "own_verifier.py": [
        "prompt odd: ValueError: could not convert string to float: 'not a number'",
        "answered 422 could not convert string to float",
    ],
}
WRITES = {"forks_in_python.py": "histogram.svg"}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if name == "guess_number.py":
        pytest.importorskip("verifiers")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for text in PRINTS[name]:
        assert text in done.stdout
    for text in WARNS.get(name, []):
        assert text in done.stderr
    if name in WRITES:
        assert (tmp_path / WRITES[name]).stat().st_size > 1000
