"""Tests whose body runs on the pretend accelerator, which must have a process of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.smoke.world import Launcher


def on_accelerator(body: Callable[..., None]) -> Callable[..., None]:
    """A test of that name and parameters (what JSON can hold), whose body runs in a child of the launcher."""

    def test(accelerated: Launcher, **arguments: Any) -> None:
        where = [body.__module__, body.__name__]
        outcome = accelerated.start(Path.cwd(), test=where, arguments=arguments).wait()
        assert outcome.code == 0, outcome.stdout + outcome.stderr

    own = inspect.signature(body)
    launcher = inspect.Parameter("accelerated", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    test.__signature__ = own.replace(parameters=[launcher, *own.parameters.values()])  # type: ignore[attr-defined]
    test.body = body  # type: ignore[attr-defined]
    return test
