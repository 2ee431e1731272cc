"""Settings as verl's command line takes them: hydra's ``key=value``.

Two parsers read a value: hydra's grammar of overrides, where quoted text is literal, and OmegaConf, where ``${...}`` is
a reference to another setting. verl resolves references twice, so no escape survives; such a text is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from forkrl.cluster.settings import Value
from forkrl.errors import UserError

_OVERRIDE = re.compile(r"\+{0,2}(?P<key>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)=.*", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z/][\w./-]*", re.ASCII)
_WORDS = {"true", "false", "null", "none", "inf", "nan", "yes", "no", "on", "off"}
"""hydra or YAML give these another type unless they are quoted."""
_NAME = re.compile(r"[A-Za-z_]\w*")


def override(key: str, value: Value) -> str:
    """``key=value``, quoted so that hydra reads back the same value; raises UserError for a text it cannot hold."""
    return f"{key}={_literal(key, value)}"


def overridden_key(text: str) -> str:
    """The setting, without its ``+``, that a user's own override sets; raises UserError where there is none."""
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
        text = str(value)
        bare = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
        return text if bare else _quoted(key, text)
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
    """In hydra's single quotes only quotes are escaped, and the backslashes before one."""
    if "${" in text or text == "???":
        raise UserError(f'{key.lstrip("+")} = {text!r}: verl would read it as a reference; use a name without "${{"')
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    return "'" + re.sub(r"\\+$", lambda match: match[0] * 2, escaped) + "'"
