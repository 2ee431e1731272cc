"""One launcher and one tiny world a session; a copy of the world for tests that change it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.smoke.world import Launcher, World, copy_world, make_template


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make_template(folder)
    return folder


@pytest.fixture(scope="module")
def world(launcher: Launcher, template: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Shared by the tests of a module, each in run folders of its own."""
    return copy_world(template, tmp_path_factory.mktemp("world"), launcher)


@pytest.fixture
def own_world(launcher: Launcher, template: Path, tmp_path: Path) -> World:
    """For a test that changes model, data or recipe."""
    return copy_world(template, tmp_path / "world", launcher)
