"""Atomic writes: fsync a temporary file, rename it over the target, fsync the folder."""

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
# Rust libraries (safetensors, tokenizers) raise their own exceptions, with errno only in the text.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` durably and atomically. Raises UserError if the system refuses."""
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
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with null for NaN and infinity."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def temporary_beside(path: Path) -> Path:
    """Temporary name for writing ``path``; fixed, so that a killed write leaves at most one file."""
    return path.with_name(f".{path.name}.writing")


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turn operating system errors while ``path`` is written into a UserError."""
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
            f"{path}: cannot be written ({reason}); what was saved before is intact; {remedy}, "
            f"then resume or start again"
        ) from error


def _errno_of(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _RUST_ERRNO.search(str(error))
    return int(found[1]) if found else None
