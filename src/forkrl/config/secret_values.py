"""Credentials in a recipe: written and stored as ``${NAME}``, and read from the environment where they are used.

A recipe is copied into run folders, reports, trackers and logs. So a credential written out in it is rejected when the
recipe is read, and nothing has to be redacted later. Imports no torch and no HTTP client.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from base64 import b64encode
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote

from forkrl.errors import UserError

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRETS = re.compile(
    r"(^|[._-])((api|access|private|secret)[_-]?key|token|secret|password|passwd|passphrase|pwd|credentials?"
    r"|auth|authorization|bearer|cookies?|headers)$",
    re.IGNORECASE,
)
"""Names of settings that hold credentials, themselves or in what is beneath them."""
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_LEAST_SHOWN = 6
"""Characters of a value that a message may show where it was cut within the value."""
_REMEDY = "it would be stored with every run; write ${NAME} in its place (in single quotes in a shell) and export NAME"


def is_address(text: str) -> bool:
    """Whether a setting is the address of an HTTP server."""
    return text.lower().startswith(("http://", "https://"))


def shown_url(url: str) -> str:
    """A URL as messages show it: without user, password and query."""
    scheme, _, place, _ = _split(url)
    return f"{scheme}://{place}"


def _split(url: str) -> tuple[str, str, str, str]:
    """Scheme, user and password, host and path, query and fragment; of a URL that may be invalid."""
    scheme, _, rest = url.partition("://")
    place, query = re.fullmatch(r"([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    authority, slash, path = place.partition("/")
    user, _, host = authority.rpartition("@")
    return scheme, user, f"{host}{slash}{path}", query


def reject_written_secrets(key: str, value: Any) -> None:
    """Reject credentials that are written out in a setting: of an address the user, the password and the values of its
    query; and all text and numbers in a setting, or beneath one, with a name such as ``headers`` or ``api_key``.
    """

    def reject(place: str, fault: str) -> None:
        raise ValueError(f"{place}: {fault}; {_REMEDY}")

    _replace_secrets(key, value, reject)


def without_written_secrets(key: str, value: Any) -> Any:
    """The setting with ``…`` for every credential that is written out in it, as older versions stored them."""
    return _replace_secrets(key, value, lambda *_: None)


def without_secrets_in_command(command: str) -> str:
    """The same for a command line with settings as ``key=value``."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    shown = list(map(_shown_word, words))
    return command if shown == words else shlex.join(shown)


def _shown_word(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", key):
        return str(without_written_secrets("", word))
    # A table or a list in TOML's syntax is left out as a whole.
    in_table = value[:1] in ("{", "[") and re.search(
        r"://\S*[@?]|headers|key|token|secret|passw|auth", value, re.IGNORECASE
    )
    if in_table or ("headers." in key.lower() and not _REFERENCE.search(value)):
        return f"{key}=…"
    return f"{key}={without_written_secrets(key, value)}"


def _replace_secrets(key: str, value: Any, found: Callable[[str, str], None], *, secret: bool = False) -> Any:
    """The value with ``…`` for its credentials; ``found`` is called with the place and the fault of each."""
    secret = secret or bool(_SECRETS.search(key))
    if isinstance(value, dict):
        return {
            name: _replace_secrets(f"{key}.{name}" if key else name, item, found, secret=secret)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_replace_secrets(key, item, found, secret=secret) for item in value]
    if isinstance(value, str) and _ADDRESS.match(value):
        scheme, user, place, query = _split(value)
        name, _, password = user.partition(":")
        if user and not re.fullmatch(rf"({_REFERENCE.pattern})+", password or name):
            found(key, "the address has a user or a password written out")
            user = "…"
        if not all(map(_REFERENCE.search, filter(None, re.split("[?#&;]", query)))):
            found(key, "the address has a query with a value written out")
            query = "?…"
        return f"{scheme}://{user}{'@' if user else ''}{place}{query}"
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
    if secret and is_plain and not _REFERENCE.search(str(value)):
        found(key, "is written out")
        return "…"
    return value


class SecretValues:
    """Replaces ``${NAME}`` by the environment's values, and removes these values from messages."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def resolve(self, key: str, value: Any) -> Any:
        """The setting with the environment's values, in tables and lists too."""
        if isinstance(value, dict):
            return {name: self.resolve(f"{key}.{name}", item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.resolve(key, item) for item in value]
        if not isinstance(value, str):
            return value
        if not is_address(value):
            return _REFERENCE.sub(lambda match: self._read(key, match[1]), value)
        scheme, user, place, query = _split(value)
        # Values are percent-encoded where the syntax of a URL would break on them.
        user, query = (_REFERENCE.sub(lambda match: self._encoded(key, match[1]), part) for part in (user, query))
        place = _REFERENCE.sub(lambda match: self._read(key, match[1]), place)
        if _REFERENCE.search(_split(value)[1]):  # a server may repeat the header that they become
            self._names[b64encode(unquote(user).encode()).decode()] = _split(value)[1]
        return f"{scheme}://{user}{'@' if user else ''}{place}{query}"

    def hide(self, text: str) -> str:
        """The text with every value that was read replaced by the ``${NAME}`` it came from.

        So is the beginning of one at the end of the text or before a quote, a bracket or ``…``: messages are cut.
        """
        values = sorted(self._names, key=len, reverse=True)
        for value in values:
            text = text.replace(value, self._names[value])
        for value in values:
            text = _hide_beginnings(text, value, self._names[value])
        return text

    def _read(self, key: str, name: str) -> str:
        value = os.environ.get(name, "")
        if not value:
            raise UserError(f"{key}: the environment variable {name} is not set; export {name}")
        # As messages quote it, too.
        for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1], repr(value.encode(errors="replace"))[2:-1]):
            self._names[form] = f"${{{name}}}"
        return value

    def _encoded(self, key: str, name: str) -> str:
        encoded = quote(self._read(key, name), safe="")
        self._names[encoded] = f"${{{name}}}"
        return encoded


def _hide_beginnings(text: str, value: str, name: str) -> str:
    """The text with ``name`` for what a cut has left of the value, if that is more than a few characters."""
    beginning, start = value[:_LEAST_SHOWN], 0
    while len(beginning) == _LEAST_SHOWN and (start := text.find(beginning, start)) >= 0:
        end = start + next(length for length in range(len(value), 0, -1) if text.startswith(value[:length], start))
        if text[end : end + 1] in ("", "…", "'", '"', ")"):
            text = text[:start] + name + text[end:]
            end = start + len(name)
        start = end
    return text
