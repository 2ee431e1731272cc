"""Addresses and credentials in a recipe. A credential is written and stored as ``${NAME}`` and read when it is used.

A recipe is copied into run folders, reports, trackers and logs, so a literal credential is rejected when the recipe is
read. Imports no torch and no HTTP client.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from base64 import b64encode
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from forkrl.errors import UserError

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRETS = re.compile(
    r"(^|[._-])((api|access|private|secret)[_-]?key|token|secret|password|passwd|passphrase|pwd|credentials?"
    r"|auth|authorization|bearer|cookies?|headers)$",
    re.IGNORECASE,
)
"""Names of settings that hold credentials, directly or in nested values."""
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SHORTEST_BEGINNING = 6
"""Shortest beginning of a value that is hidden where a message is cut within the value."""
_REMEDY = "it would be stored with every run; write ${NAME} in its place (in single quotes in a shell) and export NAME"


def is_address(text: str) -> bool:
    """Whether a setting is the address of an HTTP server."""
    return text.lower().startswith(("http://", "https://"))


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine (localhost, 127.0.0.0/8, ::1), which a proxy would look for on itself."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def shown_url(url: str) -> str:
    """A URL for messages: without user, password and query."""
    scheme, _, host_and_path, _ = _split(url)
    return f"{scheme}://{host_and_path}"


def _split(url: str) -> tuple[str, str, str, str]:
    """Scheme, user and password, host and path, query and fragment of a URL, which may be invalid."""
    scheme, _, rest = url.partition("://")
    address, query = re.fullmatch(r"([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    authority, slash, path = address.partition("/")
    user, _, host = authority.rpartition("@")
    return scheme, user, f"{host}{slash}{path}", query


def reject_written_secrets(key: str, value: Any, *, secret: bool = False) -> None:
    """Reject literal credentials in a setting, and in the dicts and lists that it holds.

    They are the user, the password and the query values of an address, and any text or number under a name such as
    ``headers`` or ``api_key`` (or if ``secret`` is true), also in a list of ``name=value``.
    """
    secret = secret or bool(_SECRETS.search(key))
    if isinstance(value, dict):
        for name, item in value.items():
            reject_written_secrets(f"{key}.{name}", item, secret=secret)
    elif isinstance(value, list | tuple):
        for item in value:
            reject_written_secrets(key, item, secret=secret)
            name, equals, text = item.partition("=") if isinstance(item, str) else ("", "", "")
            if equals and not _ADDRESS.match(item):  # an override of verl
                reject_written_secrets(f"{key}.{name}", text)
    elif isinstance(value, str) and _ADDRESS.match(value):
        _, user, _, query = _split(value)
        name, _, password = user.partition(":")
        if user and not re.fullmatch(rf"({_REFERENCE.pattern})+", password or name):
            raise ValueError(f"{key}: the address has a user or a password written out; {_REMEDY}")
        if not all(map(_REFERENCE.search, filter(None, re.split("[?#&;]", query)))):
            raise ValueError(f"{key}: the address has a query with a value written out; {_REMEDY}")
    elif secret and not isinstance(value, bool | None) and value != "" and not _REFERENCE.search(str(value)):
        raise ValueError(f"{key}: is written out; {_REMEDY}")


class SecretValues:
    """Replaces ``${NAME}`` by environment variables, and removes their values from messages."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def resolve(self, key: str, value: Any) -> Any:
        """The setting with the values of the environment variables, also in nested dicts and lists."""
        if isinstance(value, dict):
            return {name: self.resolve(f"{key}.{name}", item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.resolve(key, item) for item in value]
        if not isinstance(value, str):
            return value
        if not is_address(value):
            return self._substitute(key, value)
        scheme, user, host_and_path, query = _split(value)
        resolved, query = (self._substitute(key, part, encoded=True) for part in (user, query))
        if resolved != user:  # a server may quote the header that they become
            self._names[b64encode(unquote(resolved).encode()).decode()] = user
        return f"{scheme}://{resolved}{'@' if user else ''}{self._substitute(key, host_and_path)}{query}"

    def hide(self, text: str) -> str:
        """The text with ``${NAME}`` in place of every value that was read.

        Messages are cut, so this also replaces the beginning of a value before the end, a quote, a bracket or ``…``.
        """
        values = sorted(self._names, key=len, reverse=True)
        for value in values:
            text = text.replace(value, self._names[value])
        for value in values:
            text = _hide_beginnings(text, value, self._names[value])
        return text

    def _substitute(self, key: str, text: str, *, encoded: bool = False) -> str:
        """Replace references by their values, percent-encoded where a URL's syntax needs it."""

        def value_of(match: re.Match[str]) -> str:
            value = os.environ.get(match[1], "")
            if not value:
                raise UserError(f"{key}: the environment variable {match[1]} is not set; export {match[1]}")
            quoted = (json.dumps(value)[1:-1], repr(value)[1:-1], repr(value.encode(errors="replace"))[2:-1])
            url_form = quote(value, safe="") if encoded else value
            self._names |= dict.fromkeys((value, *quoted, url_form), match[0])
            return url_form

        return _REFERENCE.sub(value_of, text)


def _hide_beginnings(text: str, value: str, name: str) -> str:
    """Replace what is left of a value where the text was cut, unless only a few characters are left."""
    if len(value) < _SHORTEST_BEGINNING:
        return text
    start = 0
    while (start := text.find(value[:_SHORTEST_BEGINNING], start)) >= 0:
        end = start + next(length for length in range(len(value), 0, -1) if text.startswith(value[:length], start))
        if text[end : end + 1] in ("", "…", "'", '"', ")"):
            text = text[:start] + name + text[end:]
            end = start + len(name)
        start = end
    return text
