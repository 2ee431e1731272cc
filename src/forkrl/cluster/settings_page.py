"""docs/cluster-settings.md, printed from ``correspondence.py``: ``python -m forkrl.cluster.settings_page``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forkrl.cluster.correspondence import ELSEWHERE, FIXED, REFUSED, TRANSLATED

_HEAD = """\
# Recipes on verl, setting by setting

What becomes of a recipe under `runtime.engine = "verl"` (verl 0.9.1). This page is printed from the program's own table
(`python -m forkrl.cluster.settings_page > docs/cluster-settings.md`), which tests hold against the schema of recipes,
against what verl is handed, and against verl's own configuration files.
"""
_FOOT = """
Everything else is verl's default, and open to `cluster.overrides`:

```toml
[cluster]
overrides = [
    "actor_rollout_ref.rollout.enforce_eager=true",
    "actor_rollout_ref.rollout.max_num_batched_tokens=16384",
]
```

verl reads `${...}` in any text as a reference to another setting, and no escape of it survives: a path with `${` in
it is refused. All other characters reach verl as they are.
"""


def settings_page() -> str:
    """The whole page."""
    return _HEAD + "\n".join(
        [
            "",
            "## Handed on",
            "",
            "A `+` marks settings that verl's files do not have: those of ForkRL's plug-in, and some of libraries.",
            *_table(
                ("recipe", "verl", "remarks"), ((_code(row.recipe), _code(*row.verl), row.remark) for row in TRANSLATED)
            ),
            "",
            "## Refused",
            "",
            "One line names the setting, its value and the remedy, before anything is started.",
            *_table(("recipe", "values", "why"), ((_code(row.recipe), row.values, row.reason) for row in REFUSED)),
            "",
            "## Acted on by ForkRL itself",
            *_table(("recipe", "where"), ((_code(row.recipe), row.where) for row in ELSEWHERE)),
            "",
            "## Set whatever the recipe says",
            *_table(("verl", "value", "why"), ((_code(row.verl), row.value, row.reason) for row in FIXED)),
            _FOOT,
        ]
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _code(*keys: str) -> str:
    return ", ".join(f"`{key}`" for key in keys)


if __name__ == "__main__":
    print(settings_page(), end="")
