"""Every setting of a recipe with default and help: as Markdown (docs/recipes.md), or as a filtered list."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from forkrl.config import SftConfig, TrainConfig
from forkrl.config.recipe import item_section, own_fields, section_of, settings_of
from forkrl.config.sections import Section
from forkrl.errors import UserError

_INTRODUCTION = """\
# Recipes

Every setting of `forkrl train` and `forkrl sft`, as `forkrl train --settings` prints them. A recipe is a
TOML file with these sections; `section.key=value` on the command line replaces a value.

## Recipes of forkrl train

Defaults are the paper's setting wherever it has one."""
_SFT_INTRODUCTION = """\

## Recipes of forkrl sft

They train a base model for Countdown from random weights;
[`recipes/countdown-base.toml`](../recipes/countdown-base.toml) made the embedded one."""


def print_settings(words: Sequence[str]) -> None:
    """Print the settings whose key or help contains all words; into a file without words, the whole reference."""
    if not words and not sys.stdout.isatty():
        print(recipe_reference(), end="")
        return
    console, found = Console(highlight=False, width=None if sys.stdout.isatty() else 120), 0
    for command, schema in (("train", TrainConfig), ("sft", SftConfig)):
        rows = [(key, _default(field), _help(field)) for key, field in settings_of(schema)]
        rows = [row for row in rows if all(word.lower() in " ".join(row).lower() for word in words)]
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


def recipe_reference() -> str:
    """The page docs/recipes.md: a table for every section."""
    lines = [_INTRODUCTION, *_section(TrainConfig), _SFT_INTRODUCTION, *_section(SftConfig)]
    return "\n".join(lines) + "\n"


def _section(schema: type[Section], prefix: str = "") -> list[str]:
    """The table of a section's settings, then its subsections and listed tables."""
    sections = {name: kind for name, field in schema.model_fields.items() if (kind := section_of(field)) is not None}
    lines = _table({name: field for name, field in schema.model_fields.items() if name not in sections})
    for name, section in sections.items():
        lines += ["", f"### [{prefix}{name}]", *_section(section, f"{prefix}{name}.")]
    for name, field in schema.model_fields.items():
        if (listed := item_section(field.annotation)) is not None:
            lines += ["", f"### [[{prefix}{name}]]", *_table(own_fields(listed))]
    return lines


def _table(fields: dict[str, FieldInfo]) -> list[str]:
    rows = []
    for name, field in fields.items():
        default, reason = _default(field), _help(field).replace("|", "\\|")
        rows.append(
            f"| `{name}` | {default if field.default is None or field.is_required() else f'`{default}`'} | {reason} |"
        )
    return ["", "| setting | default | what it does |", "|---|---|---|", *rows]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "not set" if field.default is None else json.dumps(field.default)


def _help(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())
