"""Errors that a command reports without a traceback, and output that is safe to print on a terminal."""

from __future__ import annotations

import errno
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# Control, format (zero-width, bidirectional), surrogate, private use, unassigned, line and paragraph separator.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


class UserError(Exception):
    """An error the user must fix: one line that says what is wrong, where, and how to fix it. Exit code 2."""


class TrainingHalted(Exception):
    """Training cannot continue, for example because of a NaN loss. Earlier checkpoints are unchanged; exit code 1."""


class WorkerLost(TrainingHalted):
    """A worker process has died. The run can be resumed from its checkpoints."""


class EngineLost(TrainingHalted):
    """The process that samples has failed. The weights are sound, so the finished steps are saved."""


class NothingToLearn(TrainingHalted):
    """No group of responses has a gradient. The weights are sound, so the finished steps are saved."""


@contextmanager
def out_of_memory_names(setting: str, value: object) -> Iterator[None]:
    """Turn running out of memory (CPU or CUDA) into TrainingHalted with the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingHalted(f"out of memory ({first_line(error)}); lower {setting} = {value}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CPU or a CUDA device."""
    # torch.OutOfMemoryError by name, because this module must not import torch; on a CPU it is a RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def printable(text: str) -> str:
    """Text with control characters escaped, newline and tab included: model output may forge or overwrite log lines."""
    return "".join(_escaped(char) if acts_unseen(char) else char for char in text)


def acts_unseen(char: str) -> bool:
    """Whether a character is invisible and affects the display, as newline and tab do."""
    return unicodedata.category(char) in _UNSAFE_CATEGORIES


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an exception's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def notice(text: str) -> None:
    """Print a message for the user on standard error, control characters escaped."""
    first, *others = (printable(line) for line in text.splitlines())
    write_line(sys.stderr, "\n".join([f"forkrl: {first}", *others]))


def write_line(stream: TextIO, text: str, end: str = "\n") -> None:
    """Print a line and flush. Characters that the stream's encoding lacks are escaped."""
    encoding = stream.encoding or "utf-8"
    with lost_terminal_ignored():
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + end)
        stream.flush()


@contextmanager
def lost_terminal_ignored() -> Iterator[None]:
    """Ignore EIO: closing a terminal also sends SIGHUP, on which the run finishes its step and saves."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
