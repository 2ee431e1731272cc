"""Every setting of a recipe, with its default and its reason, as Markdown. docs/recipes.md is this text."""

from __future__ import annotations

import json
from typing import Any

from forkrl.config import SftConfig, TrainConfig
from forkrl.config.recipe import item_section
from forkrl.config.sections import Section


def recipe_reference() -> str:
    """A table for every section of a recipe of either kind, read off the schemas themselves."""
    parts = [
        "# Recipes",
        "",
        "Every setting of `forkrl train` and `forkrl sft`, as `forkrl train --settings` prints them. A recipe is a",
        "TOML file with these sections; `section.key=value` on the command line replaces a value.",
        "",
        "## Recipes of forkrl train",
        "",
        "Defaults are the paper's setting wherever it has one.",
        *_tables(TrainConfig),
        "",
        "## Recipes of forkrl sft",
        "",
        "They make a base model for Countdown from random weights;",
        "[`recipes/countdown-base.toml`](../recipes/countdown-base.toml) made the embedded one.",
        *_tables(SftConfig),
    ]
    return "\n".join(parts) + "\n"


def _tables(schema: type[Section], prefix: str = "") -> list[str]:
    """The schema's own settings, and below them its sections, each under its heading."""
    sections = {name: kind for name, field in schema.model_fields.items() if (kind := _section(field)) is not None}
    lines = ["", "| setting | default | what it does |", "|---|---|---|"]
    for name, field in schema.model_fields.items():
        if name not in sections:
            lines.append(f"| `{name}` | {_value(field)} | {_reason(field)} |")
    for name, section in sections.items():
        lines += ["", f"### [{prefix}{name}]", *_tables(section, f"{prefix}{name}.")]
    for name, field in schema.model_fields.items():
        if (listed := item_section(field.annotation)) is not None:
            lines += ["", f"### [[{prefix}{name}]]", *_own_settings(listed)]
    return lines


def _own_settings(listed: type[Section]) -> list[str]:
    """What a listed table has beyond the settings of the section that it extends."""
    inherited = {name for base in listed.__mro__[1:] if issubclass(base, Section) for name in base.model_fields}
    lines = ["", "| setting | default | what it does |", "|---|---|---|"]
    return lines + [
        f"| `{name}` | {_value(field)} | {_reason(field)} |"
        for name, field in listed.model_fields.items()
        if name not in inherited
    ]


def _section(field: Any) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _value(field: Any) -> str:
    default = field.default
    return "not set" if default is None else f"`{json.dumps(default)}`"


def _reason(field: Any) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")
