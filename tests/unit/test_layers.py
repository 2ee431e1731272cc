"""Every module belongs to a layer and imports from its own package and from lower layers only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "forkrl"
LAYERS = (
    {"errors", "methods", "types", "stats"},
    {"config"},
    {"head", "method"},
    {"model"},
    {"parallel"},
    {"store"},
    {"report"},
    {"environments", "rewards"},
    {"tasks"},
    {"rollout"},
    {"training"},
    {"analysis", "evaluation", "planning"},
    {"cluster"},
    {"commands"},
    {"__init__", "cli"},
    {"__main__"},
)
"""From the lowest; packages of one layer do not import each other. ``assets`` holds data only."""
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def imports_of(part: str) -> set[tuple[str, str]]:
    """``(file, part)`` for every import from another part, also from within functions."""
    root = PACKAGE / part
    found = set()
    for file in sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "forkrl":
                names = [f"forkrl.{alias.name}" for alias in node.names if alias.name != "__version__"]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found |= {(file.name, name.split(".")[1]) for name in names if name.startswith("forkrl.")}
    return {(file, other) for file, other in found if other != part}


def test_every_module_belongs_to_a_layer() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts == set(RANK)


@pytest.mark.parametrize("part", sorted(RANK))
def test_a_part_imports_from_lower_layers_only(part: str) -> None:
    assert not [(file, other) for file, other in imports_of(part) if RANK[other] >= RANK[part]]


@pytest.mark.parametrize("package", ["transformers", "datasets", "pandas"])
def test_only_public_names_of_fast_moving_packages_are_imported(package: str) -> None:
    """Their releases move and rename what lies in submodules."""
    public = {package: None, "transformers.utils": {"logging", "find_adapter_config_file"}}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
                names = {alias.name for alias in node.names}
                assert node.module in public, f"{file.name}: {node.module}"
                assert names <= (public[node.module or ""] or names), f"{file.name}: {names} of {node.module}"
                assert not any(name.startswith("_") for name in names)
