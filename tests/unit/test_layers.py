"""Arrows point one way: nouns, leaves, compositions, the loop, the command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "forkrl"
NOUNS = {"types", "config", "recipe", "errors"}
LEAVES = {
    "advantages", "arguments", "atomic", "batching", "interruption", "objectives", "planning", "progress",
    "recipe_reference", "report", "rewards", "selectors", "threads", "token_stats", "tracking",
}  # fmt: skip
STORES = {"checkpoint", "run_folder"}
# Small leaves that other leaves stand on.
SHARED = {
    "atomic": STORES | {"report"},
    "processes": {"rewards"},
    "intervals": {"analysis", "report", "permutation"},
    "permutation": {"report"},
    "secret_values": {"config", "rewards", "report"},
    "messages": {"progress"},
    "loopback": {"rewards"},
    "plan_arguments": {"arguments"},
    "gym_entries": {"rewards", "gym_questions"},
    "even_shares": {"planning"},
    "locations": {"planning"},
}


def imports_of(part: str) -> set[str]:
    """The first names below ``forkrl`` that a module or package imports, itself left out."""
    root = PACKAGE / part
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name.startswith("forkrl.")}
    return found - {part}


@pytest.mark.parametrize("part", sorted(NOUNS | LEAVES | STORES | set(SHARED)))
def test_a_leaf_knows_only_the_nouns(part: str) -> None:
    assert imports_of(part) <= NOUNS | {shared for shared, users in SHARED.items() if part in users}


def test_only_the_command_line_knows_the_loop() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {part for part in parts if "loop" in imports_of(part)} == {"cli"}


def test_the_story_fits_on_a_few_screens() -> None:
    assert len((PACKAGE / "loop.py").read_text().splitlines()) <= 150


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
