"""What ``import forkrl`` promises: names, speed of import, and files that travel in the wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import forkrl
from forkrl.types import Rollout
from tests.foreign_machine import without_packages

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "matplotlib", "pyarrow", "datasets", "scipy")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "module", ["forkrl", "forkrl.config", "forkrl.errors", "forkrl.types", "forkrl.parallel.threads"]
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_every_public_name_resolves_to_its_own_definition() -> None:
    for name in set(forkrl.__all__) - {"__version__"}:
        assert getattr(forkrl, name).__name__ == name
    assert set(forkrl.__all__) <= set(dir(forkrl))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = forkrl.no_such_name


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("forkrl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    source = ROOT / "src"
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    expected = {str((ROOT / line).relative_to(source)) for line in tracked.splitlines() if (ROOT / line).is_file()}
    assert "forkrl/py.typed" in expected
    assert expected <= shipped
    assert any(name.endswith("entry_points.txt") for name in shipped)


LOGPROBS, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
CALLS = {
    "select_tokens": (LOGPROBS, MASK),
    "policy_loss": (LOGPROBS, LOGPROBS, torch.ones(2), MASK, MASK),
    "group_advantages": (LOGPROBS,),
    "overlong_penalty": (torch.ones(2, 3).int(), 8, 2),
    "token_stats": (LOGPROBS, torch.zeros(4, 3), torch.tensor([0, 1])),
    "overlap_ratio": (LOGPROBS, LOGPROBS, MASK),
    "entropy_change_by_percentile": (LOGPROBS, LOGPROBS, MASK, 2),
}


@pytest.mark.parametrize("function", CALLS)
def test_an_array_in_place_of_a_tensor_is_named(function: str) -> None:
    call, arguments = getattr(forkrl, function), CALLS[function]
    call(*arguments)
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            wrong = [*arguments[:place], argument.numpy(), *arguments[place + 1 :]]
            with pytest.raises(TypeError, match=r"^\w+: torch tensor expected, got numpy.ndarray; convert it with"):
                call(*wrong)
    with pytest.raises(TypeError, match="entropy: torch tensor expected, got list"):
        forkrl.select_tokens([0.1, 0.2], MASK)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scores: torch tensor expected"):
        forkrl.ForkTemperature(1, 1, 1)(None, np.zeros((1, 4)))  # type: ignore[arg-type]


def test_dataclasses_that_hold_tensors_compare_by_identity() -> None:
    """The generated ``==`` would take the truth value of a tensor with several elements, which raises."""
    one, other = (Rollout((1,), (2, 3), torch.zeros(2), torch.zeros(2), "", finished=True) for _ in range(2))
    assert one == one
    assert one != other
    arrays = {"Tensor", "DataFrame", "Series", "NDArray", "ndarray", "_Array"}
    for path in sorted((ROOT / "src" / "forkrl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            decorators = [text for text in map(ast.unparse, node.decorator_list) if text.startswith("dataclass")]
            annotations = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
            names = {getattr(part, "id", getattr(part, "attr", "")) for each in annotations for part in ast.walk(each)}
            if decorators and names & arrays:
                assert "eq=False" in decorators[0], f"{path}: {node.name}"


def test_version_is_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("forkrl") == forkrl.__version__


def test_a_gradient_step_runs_without_the_packages_of_the_command_line(tmp_path: Path) -> None:
    path = without_packages(tmp_path)
    code = "import forkrl.training.update, forkrl.rollout, forkrl.head, forkrl.method.batches; print('imported')"
    output = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert output.stdout.strip() == b"imported", output.stderr.decode()[-2000:]


def test_every_path_that_the_documentation_names_exists() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    named = [
        (page.name, path)
        for page in pages
        if page.name not in ("diary.md", "CHANGELOG.md")  # history
        for path in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|toml|md))`", page.read_text())
    ]
    assert len(named) > 20
    assert [each for each in named if not any((base / each[1]).exists() for base in (ROOT, ROOT / "src/forkrl"))] == []
