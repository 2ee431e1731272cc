"""The page of a training run, written beside its data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forkrl.config import PartConfig, TrainConfig
from forkrl.config.recipe import recipe_toml
from forkrl.report import run_forks, summary
from forkrl.report.page import Page, write_page
from forkrl.report.run_data import RunData, read_run
from forkrl.report.run_sections import figure_sections
from forkrl.report.visible_text import visible


def write_run_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all, and return its path.

    Reads only config.toml, metrics.jsonl and rollouts/*.parquet. What is missing or damaged is said in the page.

    Raises:
        UserError: the folder is no run, or the page cannot be written.
    """
    run = read_run(Path(run_dir), run_forks.MAX_TRAIN_STEPS)
    return write_page(Path(run_dir) / "report.html", run_page(run))


def run_verdict(run_dir: Path) -> str:
    """The sentence that heads the report: accuracy before and after, with intervals, and what it took."""
    return summary.verdict(read_run(Path(run_dir), max_train_files=0))


def run_page(run: RunData) -> Page:
    """What the page says of a run."""
    return Page(
        name=run.name,
        kind="training run",
        verdict=summary.verdict(run),
        figures=figure_sections(run),
        status=summary.status(run),
        notes=run.notes,
        cards=summary.cards(run),
        forks=run_forks.run_forks(run),
        settings=_settings(run),
        provenance=sorted((key, _plain(value)) for key, value in run.provenance.items() if key != "command"),
        command=str(run.provenance.get("command", "")),
        reproduce=reproducing_command(run.settings),
        source="this run folder's config.toml, metrics.jsonl and rollouts/",
    )


def reproducing_command(settings: dict[str, Any]) -> str:
    """A command line that resolves to the same recipe: every setting that differs from the defaults, as an override."""
    defaults = recipe_toml(TrainConfig())
    of_part = recipe_toml(PartConfig())
    overrides = []
    for section, table in settings.items():
        if not isinstance(table, dict):
            overrides += [] if defaults.get(section) == table else [f"{section}={_plain(table)}"]
            continue
        known = defaults.get(section, {})
        if section == "task" and isinstance(table.get("parts"), list):
            table = {**table, "parts": [_changed(part, of_part) for part in table["parts"]]}
        overrides += [f"{section}.{key}={_plain(value)}" for key, value in table.items() if known.get(key) != value]
    return " ".join(["forkrl train", *(shlex.quote(visible(override)) for override in overrides)])


def _settings(run: RunData) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Sections of (key, value, differs from the default), settings outside any section first."""
    defaults = recipe_toml(TrainConfig())
    loose = [
        (key, _plain(value), defaults.get(key) != value)
        for key, value in run.settings.items()
        if not isinstance(value, dict)
    ]
    tables = [
        (section, [(key, _plain(value), defaults.get(section, {}).get(key) != value) for key, value in table.items()])
        for section, table in run.settings.items()
        if isinstance(table, dict)
    ]
    return ([("run", loose)] if loose else []) + [table for table in tables if table[1]]


def _changed(table: Any, defaults: Mapping[str, Any]) -> Any:
    """What a table sets to something else than its default."""
    if not isinstance(table, dict):
        return table
    return {key: value for key, value in table.items() if defaults.get(key) != value}


def _plain(value: Any) -> str:
    """The value as TOML writes it on one line; text bare."""
    return value if isinstance(value, str) else _inline(value)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)
