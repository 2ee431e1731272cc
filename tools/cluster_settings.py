"""Prints docs/cluster-settings.md from the table: ``python tools/cluster_settings.py > docs/cluster-settings.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forkrl.cluster.settings import ELSEWHERE, REFUSED, TABLE

PAGE = """\
# Recipes on verl, setting by setting

How a recipe is translated for `runtime.trainer = "verl"` (verl 0.9.1). This page is generated from the program's own
table (`python tools/cluster_settings.py > docs/cluster-settings.md`), which tests compare with the schema of recipes,
with what verl is given, and with verl's own configuration files.

## Translated

A `+` marks settings that verl's files do not have: those of ForkRL's plug-in, and some of libraries.

{translated}

## Refused

One line names the setting, its value and the remedy, before anything starts.

{refused}

## Handled by ForkRL itself

{elsewhere}

## Set for every recipe

{fixed}

Everything else is verl's default, and open to `cluster.overrides`:

```toml
[cluster]
overrides = [
    "actor_rollout_ref.rollout.enforce_eager=true",
    "actor_rollout_ref.rollout.max_num_batched_tokens=16384",
]
```

verl reads `${{...}}` in any text as a reference to another setting, and no escape of it survives: a path with `${{` in
it is refused. All other characters reach verl unchanged.
"""


def settings_page() -> str:
    """The whole page."""
    return PAGE.format(
        translated=_table(
            ("recipe", "verl", "remarks"),
            ((_code(row.recipe), _code(row.verl), row.remark) for row in TABLE if row.recipe),
        ),
        refused=_table(("recipe", "values", "why"), ((_code([row.recipe]), row.values, row.why) for row in REFUSED)),
        elsewhere=_table(("recipe", "where"), ((_code([key]), where) for key, where in ELSEWHERE.items())),
        fixed=_table(
            ("verl", "value", "why"), ((_code(row.verl), row.shown, row.remark) for row in TABLE if not row.recipe)
        ),
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _code(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


if __name__ == "__main__":
    print(settings_page(), end="")
