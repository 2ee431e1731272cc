"""Credentials in a recipe: written and stored as ``${NAME}``, and read from the environment where they are used.

A recipe is copied into run folders, reports, trackers and logs. So a credential written out in it is rejected when the
recipe is read, and nothing has to be redacted later. Imports no torch and no HTTP client.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import quote

from forkrl.errors import UserError

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_NAME = re.compile(r"(^|[._-])(api_?key|access_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_REMEDY = "it would be stored with every run; write ${NAME} in its place (in single quotes in a shell) and export NAME"


def is_address(text: str) -> bool:
    """Whether a setting is the address of an HTTP server."""
    return text.startswith(("http://", "https://"))


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
    """Reject credentials that are written out in a setting: of a URL the user, the password and the values of its
    query; of a table called ``headers`` its values; and the text of a setting with a name such as ``api_key``.

    Raises:
        ValueError: names the setting and the remedy, and does not show the value.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            if key.rpartition(".")[2] == "headers" and not (isinstance(item, str) and _REFERENCE.search(item)):
                raise ValueError(f"{key}.{name}: the value of a header is written out; {_REMEDY}")
            reject_written_secrets(f"{key}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            reject_written_secrets(key, item)
    elif isinstance(value, str) and is_address(value):
        _, user, _, query = _split(value)
        if user and not _REFERENCE.search(user):
            raise ValueError(f"{key}: the address has a user or a password written out; {_REMEDY}")
        if not all(map(_REFERENCE.search, filter(None, re.split("[?#&;]", query)))):
            raise ValueError(f"{key}: the address has a query with a value written out; {_REMEDY}")
    elif isinstance(value, str) and value and _SECRET_NAME.search(key) and not _REFERENCE.search(value):
        raise ValueError(f"{key}: is written out; {_REMEDY}")


class SecretValues:
    """Replaces ``${NAME}`` by the environment's values, and removes these values from messages."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def resolve(self, key: str, value: Any) -> Any:
        """The setting with the environment's values, in tables and lists too.

        Raises:
            UserError: a variable is not set; names the setting and the variable.
        """
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
        return f"{scheme}://{user}{'@' if user else ''}{place}{query}"

    def hide(self, text: str) -> str:
        """The text with every value that was read replaced by the ``${NAME}`` it came from."""
        for value in sorted(self._names, key=len, reverse=True):
            text = text.replace(value, self._names[value])
        return text

    def _read(self, key: str, name: str) -> str:
        value = os.environ.get(name, "")
        if not value:
            raise UserError(f"{key}: the environment variable {name} is not set; export {name}")
        self._names[value] = f"${{{name}}}"
        return value

    def _encoded(self, key: str, name: str) -> str:
        encoded = quote(self._read(key, name), safe="")
        self._names[encoded] = f"${{{name}}}"
        return encoded
