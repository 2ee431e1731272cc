"""The files that a checkpoint's parts are in; one that cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from forkrl.errors import UserError, first_line


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Refuses numbers that JSON has no word for."""
    path.write_text(json.dumps(value, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError where there is none."""
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object")
    return value


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a file, by name. Raises UserError where it holds none."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({first_line(error)})") from error
