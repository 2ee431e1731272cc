"""Finding an OpenAI-compatible server: where its ``/models`` stands, whether it has the model, and what it understands.

Everything that can be wrong with an address, a key or a model's name is said here, before anything is sampled.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import httpx

from forkrl import __version__
from forkrl.config.loopback import is_loopback
from forkrl.errors import UserError
from forkrl.evaluation.server_answers import (
    KEY_VARIABLE,
    Answer,
    Failure,
    Server,
    listed,
    raise_for_key,
    raise_for_redirect,
    read_json_object,
    said,
    shown,
)

# Fields beside the standard's that keep a server's own defaults from cutting the distribution, by the name it gives
# itself in ``owned_by``. Other servers might refuse a request that holds them.
_WHOLE_DISTRIBUTION: dict[str, dict[str, float]] = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
}
_PROBE_S = 15.0
_PROBE_BYTES = 16 * 1024 * 1024


def find_server(url: str, model: str, *, chat: bool, key: str | None) -> Server:
    """Ask ``/models``, below ``/v1`` or without it, and check that the model is there.

    Args:
        url: with or without ``/v1``.
        model: as the server calls it.
        chat: through its chat template.
        key: None takes ``OPENAI_API_KEY`` if that is set.

    Raises:
        UserError: the address, the key or the model cannot be used.
    """
    bare = _checked_url(url)
    server = Server(bare, model, chat, _checked_key(key or os.environ.get(KEY_VARIABLE)))
    bases = [bare] if bare.endswith("/v1") else [f"{bare}/v1", bare]
    with httpx.Client(timeout=_PROBE_S, **client_options(server)) as client:
        for base in bases:
            server = replace(server, base=base)
            answer = _get(client, server)
            if answer.status in (404, 405) and base != bases[-1]:
                continue
            cards = _cards(server, answer)
            names = tuple(card["id"] for card in cards)
            _check_model(server, names)
            owner = next((card.get("owned_by") for card in cards if card["id"] == model), None)
            extras = _WHOLE_DISTRIBUTION.get(owner, {}) if isinstance(owner, str) else {}
            return replace(server, extras=extras, names=names)
    raise AssertionError("the last base always answers or raises")


def client_options(server: Server) -> dict[str, Any]:
    """How every HTTP client of a server is set up: no redirects, the key in a header, no proxy before this machine."""
    headers = {"user-agent": f"forkrl/{__version__}", "accept": "application/json", "accept-encoding": "identity"}
    if server.key:
        headers["authorization"] = f"Bearer {server.key}"
    headers["content-type"] = "application/json"
    return {"headers": headers, "follow_redirects": False, "trust_env": not is_loopback(server.base)}


def _checked_url(url: str) -> str:
    if "@" in url or "?" in url or "#" in url:
        # Not shown: what stands before the @ or after the ? may be a secret.
        raise UserError(f"--server: give an address without user, password and query; a key belongs in {KEY_VARIABLE}")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"--server {url!r}: no address ({error}); it looks like http://localhost:8000/v1") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"--server {url!r}: no address; it looks like http://localhost:8000/v1")
    return url.rstrip("/")


def _checked_key(key: str | None) -> str | None:
    """A key without the line break that comes along when it is read from a file; None for none."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY_VARIABLE}: holds characters that no HTTP header can; copy the key again")
    return key or None


def _get(client: httpx.Client, server: Server) -> Answer:
    """``/models``, within a deadline and a size whatever the server does."""
    deadline = time.monotonic() + _PROBE_S
    try:
        with client.stream("GET", f"{server.base}/models") as response:
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _PROBE_BYTES or time.monotonic() > deadline:
                    raise UserError(f"--server {server.base}/models: an endless answer; is it an OpenAI-style server?")
            return Answer(response.status_code, response.headers, body)
    except httpx.RequestError as error:
        raise UserError(
            f"--server {server.base}: cannot be reached ({shown(server, str(error) or type(error).__name__)}); "
            f"start it, or correct the address"
        ) from error


def _cards(server: Server, answer: Answer) -> list[Mapping[str, Any]]:
    """The entries of ``/models`` that have an id."""
    if 300 <= answer.status < 400:
        raise_for_redirect(server, answer)
    if answer.status in (401, 403):
        raise_for_key(server, answer)
    if answer.status != 200:
        remedy = "wait until it is ready" if answer.status == 503 else "give the address of an OpenAI-style server"
        raise UserError(f"--server {server.base}/models: {answer.status}, {said(server, answer.body)}; {remedy}")
    try:
        cards = read_json_object(server, answer).get("data")
    except Failure as failure:
        raise UserError(f"--server {server.base}/models: {failure}; is it an OpenAI-style server?") from failure
    entries: Sequence[Any] = cards if isinstance(cards, list) else []
    return [card for card in entries if isinstance(card, dict) and isinstance(card.get("id"), str)]


def _check_model(server: Server, names: tuple[str, ...]) -> None:
    """Refuse a model that the server does not list: some answer with another one and say nothing.

    A gateway may list patterns, Ollama leaves out ``:latest``, and a server that lists nothing cannot be checked.
    """
    model = server.model
    if not names or model in names or f"{model}:latest" in names:
        return
    if any("*" in name and fnmatchcase(model, name) for name in names):
        return
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(model.lower(), lower, n=1)
    hint = f"did you mean {shown(server, lower[close[0]])}? " if close else ""
    raise UserError(f"--server {server.base}: has no model {model}; {hint}it lists {listed(server, names)}")
