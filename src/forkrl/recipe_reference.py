"""Every setting of a recipe, with its default and its reason, as Markdown. docs/recipes.md is this text."""

from __future__ import annotations

import json
from typing import Any

from forkrl.config import Section, TrainConfig


def recipe_reference() -> str:
    """A table for every section of a training recipe, read off the schema itself."""
    root = {name: field for name, field in TrainConfig.model_fields.items() if not _is_section(field.annotation)}
    parts = [
        "# Recipes",
        "",
        "Every setting of `forkrl train`, as `forkrl train --settings` prints it. A recipe is a TOML file with these",
        "sections; `section.key=value` on the command line replaces a value. Defaults are the paper's setting wherever",
        "it has one.",
        "",
        *_table(root),
    ]
    for name, field in TrainConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            parts += ["", f"## [{name}]", "", *_table(field.annotation.model_fields)]
    return "\n".join(parts) + "\n"


def _table(fields: dict[str, Any]) -> list[str]:
    return [
        "| setting | default | what it does |",
        "|---|---|---|",
        *(f"| `{name}` | {_value(field)} | {_reason(field)} |" for name, field in fields.items()),
    ]


def _value(field: Any) -> str:
    default = field.default
    return "not set" if default is None else f"`{json.dumps(default)}`"


def _reason(field: Any) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
