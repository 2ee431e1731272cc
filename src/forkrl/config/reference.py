"""Every setting of a recipe, with its default and its reason: as Markdown (docs/recipes.md), or as a filtered list."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from forkrl.config import SftConfig, TrainConfig
from forkrl.config.recipe import item_section
from forkrl.config.sections import Section
from forkrl.errors import UserError


def print_settings(words: Sequence[str]) -> None:
    """Print the settings whose key or reason contains all words; into a file without words, the whole reference."""
    if not words and not sys.stdout.isatty():
        print(recipe_reference(), end="")
        return
    console, found = Console(highlight=False, width=None if sys.stdout.isatty() else 120), 0
    for command, schema in (("train", TrainConfig), ("sft", SftConfig)):
        rows = [row for row in _rows(schema) if all(word.lower() in " ".join(row).lower() for word in words)]
        if rows:
            console.print(Text(f"forkrl {command}", style="bold"))
        for key, default, reason in rows:
            console.print(Text.assemble("  ", (key, "cyan"), " = ", (default, "green")))
            console.print(Padding(Text(reason, style="dim"), (0, 0, 0, 6)))
        found += len(rows)
    if not found:
        raise UserError(
            f"--settings {' '.join(words)}: no setting has that in its name or help; drop the word to see all"
        )


def _rows(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and reason of every setting."""
    for name, field in schema.model_fields.items():
        if (section := _section(field)) is not None:
            yield from _rows(section, f"{prefix}{name}.")
            continue
        yield _row(prefix + name, field)
        if (listed := item_section(field.annotation)) is not None:
            yield from (_row(f"{prefix}{name}.{own}", inner) for own, inner in _own_fields(listed).items())


def _row(key: str, field: Any) -> tuple[str, str, str]:
    return key, _value(field).strip("`"), " ".join((field.description or "").split())


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
    lines = _table({name: field for name, field in schema.model_fields.items() if name not in sections})
    for name, section in sections.items():
        lines += ["", f"### [{prefix}{name}]", *_tables(section, f"{prefix}{name}.")]
    for name, field in schema.model_fields.items():
        if (listed := item_section(field.annotation)) is not None:
            lines += ["", f"### [[{prefix}{name}]]", *_table(_own_fields(listed))]
    return lines


def _own_fields(listed: type[Section]) -> dict[str, Any]:
    """What a listed table has beyond the settings of the section that it extends."""
    inherited = {name for base in listed.__mro__[1:] if issubclass(base, Section) for name in base.model_fields}
    return {name: field for name, field in listed.model_fields.items() if name not in inherited}


def _table(settings: dict[str, Any]) -> list[str]:
    rows = [f"| `{name}` | {_value(field)} | {_reason(field)} |" for name, field in settings.items()]
    return ["", "| setting | default | what it does |", "|---|---|---|", *rows]


def _section(field: Any) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _value(field: Any) -> str:
    default = field.default
    return "not set" if default is None else f"`{json.dumps(default)}`"


def _reason(field: Any) -> str:
    return _row("", field)[2].replace("|", "\\|")
