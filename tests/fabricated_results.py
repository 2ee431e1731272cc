"""Results of a command, made up: what its page is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl.store.results import Results


def made_up_results(
    command: str, facts: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], **settings: Any
) -> Results:
    """Results of ``forkrl COMMAND`` with these facts and tables; more settings than the model's name."""
    return Results(
        folder=Path(command),
        schema=f"forkrl-{command}/0",
        command=f"forkrl {command} m",
        settings={"model": "m", "seed": 0, "temperature": 1.0, **settings},
        headline="Found.",
        notes=[],
        facts=dict(facts),
        tables=dict(tables),
        versions={"torch": "2"},
    )
