"""Writing files so that a kill, a power cut or a full disk leaves the old one or the new one, never half of either.

Write next to the target, fsync, rename over it, fsync the folder that holds the name.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forkrl.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Rust libraries (safetensors, tokenizers) raise their own exceptions and keep errno in the text alone.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def write_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, durably and all at once."""
    with explained_write_errors(path):
        temporary = temporary_beside(path)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` as UTF-8, durably and all at once. Raises UserError as ``write_bytes`` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Put ``value`` at ``path`` as JSON, durably and all at once, with null for NaN and infinity, which JSON lacks.

    Raises UserError as ``write_bytes`` does.
    """
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def temporary_beside(path: Path) -> Path:
    """The name under which ``path`` is written. It is fixed, so what a kill leaves behind is reused, not piled up."""
    return path.with_name(f".{path.name}.writing")


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses while ``path`` is written into one line for the user."""
    try:
        yield
    except Exception as error:
        code = _errno_of(error)
        if code is None:
            raise
        reason = os.strerror(code)
        remedy = (
            "the disk is full: free some space there"
            if code in _FULL
            else "check that the folder is there and may be written"
        )
        raise UserError(
            f"{path}: cannot be written ({reason}); what was saved before is intact; {remedy}, then resume"
        ) from error


def _errno_of(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _RUST_ERRNO.search(str(error))
    return int(found[1]) if found else None
