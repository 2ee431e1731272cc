"""From a recipe to verl's command line, by the table in ``settings.py``. Imports neither verl, hydra nor torch.

hydra treats quoted text as literal, but OmegaConf resolves ``${...}`` twice in verl, so such text is rejected.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from forkrl.cluster.settings import REFUSED, TABLE, UNSET, Run, Value, VerlPaths, setting
from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.parallel.even_shares import require_even_shares

_OVERRIDE = re.compile(r"\+{0,2}(?P<key>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)=.*", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z/][\w./-]*", re.ASCII)
_WORDS = {"true", "false", "null", "none", "inf", "nan", "yes", "no", "on", "off"}
"""hydra or YAML give these another type unless they are quoted."""
_NAME = re.compile(r"[A-Za-z_]\w*")


def verl_command(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> list[str]:
    """The command to run; its environment needs ``verl_environment``."""
    overrides = verl_overrides(config, paths, stop_token_ids=stop_token_ids)
    return [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]


def verl_overrides(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> list[str]:
    """verl's settings for a recipe, followed by ``cluster.overrides``."""
    refuse_untranslatable(config)
    settings = verl_settings(config, paths, stop_token_ids=stop_token_ids)
    names = [key.lstrip("+") for key in settings]
    for text in config.cluster.overrides:
        if (match := _OVERRIDE.fullmatch(text.strip())) is None:
            raise UserError(
                f"cluster.overrides: {text!r} is not of the form section.key=value; write it as in "
                f'"actor_rollout_ref.rollout.enforce_eager=true"'
            )
        key = match["key"]
        if taken := [name for name in names if f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.")]:
            raise UserError(
                f"cluster.overrides: {text!r} sets what ForkRL sets itself ({taken[0]}); drop it, and see "
                f"docs/cluster-settings.md for the recipe's own setting"
            )
    return [override(key, value) for key, value in settings.items()] + [
        text.strip() for text in config.cluster.overrides
    ]


def verl_settings(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> dict[str, Value]:
    """Every verl setting that ForkRL sets. ``stop_token_ids``: all tokens that end a response."""
    run = Run(config, paths, stop_token_ids)
    values = {name: row.value(run) for row in TABLE for name in row.verl}
    return {name: value for name, value in values.items() if value is not UNSET}


def refuse_untranslatable(config: TrainConfig) -> None:
    """Raises UserError for settings that verl does not support."""
    for row in REFUSED:
        if row.refused is not None and row.refused(config):
            raise UserError(f"{row.recipe} = {json.dumps(setting(config, row.recipe), default=dict)}: {row.why}")
    tasks = [("task.", config.task), *((f"task.parts ({part.label}): ", part) for part in config.task.parts)]
    for place, task in tasks:
        if task.curriculum.promote_above is not None:
            raise UserError(
                f"{place}curriculum.promote_above = {task.curriculum.promote_above} follows the accuracy, and verl "
                f'draws from all prompts alike; set difficulty instead, or use runtime.trainer = "local"'
            )
    require_even_shares(config)


def refuse_unsuitable_prompts(config: TrainConfig, prompts: Mapping[str, int]) -> None:
    """Check the number of training prompts per source: verl draws from all rows alike, in epochs."""
    total, wanted = sum(prompts.values()), config.rollout.prompts_per_step
    if total < wanted:
        raise UserError(
            f"rollout.prompts_per_step = {wanted}, but the task has {total} prompts to train on, and verl needs enough "
            f"for one step; lower it, or add prompts"
        )
    weights = sum(part.weight for part in config.task.parts)
    for part in config.task.parts:
        share, asked = prompts.get(part.label, 0) / total, part.weight / weights
        if abs(share - asked) > 0.01:
            raise UserError(
                f"task.parts: {part.label} has weight {part.weight:g}, {asked:.1%} of the prompts, but "
                f"{prompts.get(part.label, 0)} of {total} rows, and verl draws from all rows alike; set the weights to "
                f'the parts\' numbers of rows, or use runtime.trainer = "local"'
            )


def override(key: str, value: Value) -> str:
    """``key=value``, quoted so that hydra reads back the same value; raises UserError for unsupported text."""
    return f"{key}={_literal(key, value)}"


def _literal(key: str, value: Value) -> str:
    if value is None:
        return "null"
    if isinstance(value, (str, Path)):
        return _quoted(key, str(value))
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{key} is not a number")
    if isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        if bad := next((name for name in value if not _NAME.fullmatch(name)), None):
            raise ValueError(f"{key}: {bad!r} is not an identifier")
        return "{" + ",".join(f"{name}:{_literal(key, inner)}" for name, inner in value.items()) + "}"
    return "[" + ",".join(_literal(key, inner) for inner in value) + "]"


def _quoted(key: str, text: str) -> str:
    """In hydra's single quotes only quotes, and backslashes before one, are escaped."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    if "${" in text or text == "???":
        raise UserError(f'{key.lstrip("+")} = {text!r}: verl would read it as a reference; use a name without "${{"')
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    return "'" + re.sub(r"\\+$", lambda match: match[0] * 2, escaped) + "'"
