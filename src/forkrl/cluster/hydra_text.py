"""Settings as verl's command line takes them: hydra's ``key=value`` texts.

A value goes through two readers: hydra's grammar of overrides, where a quoted text is taken as it stands, and
OmegaConf, where ``${...}`` in any text is a reference to another setting. verl resolves references twice, so no escape
of them survives; such a text is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from forkrl.errors import UserError

Value: TypeAlias = "bool | int | float | str | Path | Sequence[Value] | Mapping[str, Value] | None"
_OVERRIDE = re.compile(r"\+{0,2}(?P<key>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)=.*", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_]\w*")


def override(key: str, value: Value) -> str:
    """``key=value``, the value so quoted that hydra reads back the same one.

    Args:
        key: a setting of verl, with a ``+`` before it where verl's own files have none of that name.
        value: a path counts as its text; a table's names are identifiers.

    Raises:
        UserError: a text that hydra cannot hold.
    """
    return f"{key}={_literal(key, value)}"


def overridden_key(text: str) -> str:
    """The setting that a user's own override is of, without its ``+``.

    Raises:
        UserError: not of the form ``section.key=value``.
    """
    if (match := _OVERRIDE.fullmatch(text.strip())) is None:
        raise UserError(
            f"cluster.overrides: {text!r} is not of the form section.key=value; write it as in "
            f'"actor_rollout_ref.rollout.enforce_eager=true"'
        )
    return match["key"]


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
            raise ValueError(f"{key}: {bad!r} is no identifier")
        return "{" + ",".join(f"{name}:{_literal(key, inner)}" for name, inner in value.items()) + "}"
    return "[" + ",".join(_literal(key, inner) for inner in value) + "]"


def _quoted(key: str, text: str) -> str:
    """In hydra's single quotes only a quote is escaped, and the backslashes that stand before one."""
    if "${" in text or text == "???":
        raise UserError(
            f'{key.lstrip("+")} = {text!r} would be read as a reference by verl; take a name without "${{" in it'
        )
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    return "'" + re.sub(r"\\+$", lambda match: match[0] * 2, escaped) + "'"
