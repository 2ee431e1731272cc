"""Errors that a command reports without a traceback, and text that is safe to print on a terminal."""

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
    """An error the user must fix. The command line prints it as one line and exits with code 2.

    It says what is wrong, where, and how to fix it: "recipe.toml: loss.clip_hgh is not a setting; did you mean
    loss.clip_high?".
    """


class TrainingHalted(Exception):
    """Training cannot continue, for example because of a NaN loss. Earlier checkpoints are unchanged; exit code 1."""


class WorkerLost(TrainingHalted):
    """A worker process has died. The run can be resumed from its checkpoints."""


class NothingToLearn(TrainingHalted):
    """No group of responses has a gradient. The weights are sound, so the finished steps are saved."""


def printable(text: str) -> str:
    """Text without control characters: escape is shown as ``\\x1b``.

    Model output may contain sequences that recolour, retitle or overwrite a terminal, or reorder a line. Newline and
    tab are escaped too, so that a response cannot forge a line of the log.
    """
    return "".join(_escaped(char) if acts_unseen(char) else char for char in text)


def acts_unseen(char: str) -> bool:
    """Whether a character is invisible and affects the display; newline and tab are among them."""
    return unicodedata.category(char) in _UNSAFE_CATEGORIES


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an exception's text, for a message of one line; its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def notice(text: str) -> None:
    """Print something the user should know, on standard error. Control characters are made visible."""
    first, *others = (printable(line) for line in text.splitlines())
    write_line(sys.stderr, "\n".join([f"forkrl: {first}", *others]))


def write_line(stream: TextIO, text: str) -> None:
    """Print a line and flush; what the stream's encoding lacks is escaped, so that a C locale cannot end a run."""
    encoding = stream.encoding or "utf-8"
    with lost_terminal_ignored():
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()


@contextmanager
def lost_terminal_ignored() -> Iterator[None]:
    """Ignore EIO: a closed terminal also sends SIGHUP, on which the run finishes its step and saves."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
