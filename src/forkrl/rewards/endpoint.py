"""Gets scores from an HTTP server: POST ``{"answer", "response"}``, reply ``{"score", "answer"?}``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import httpx

from forkrl.config.secret_values import is_address, is_loopback, shown_url
from forkrl.errors import UserError
from forkrl.types import Judgement, VerifierSpec

_SHARE_OF_TIMEOUT = 0.8
"""Share of the pool's timeout given to the server; the rest is for reporting its failure."""
_BACKOFF_S = (0.2, 0.8)
"""Waits before the second and third attempts."""
_MAX_BODY = 1 << 16
"""Longest reply in bytes."""
_PROBE_S = 5.0


class EndpointError(Exception):
    """The server gave no score."""


class _TryAgain(Exception):
    """Another attempt may succeed: the connection broke, or the server is busy or restarting."""


def verify_at_endpoint(
    answer: str, response: str, *, url: str, timeout_s: float = 8.0, headers: Mapping[str, str] | None = None
) -> Judgement:
    """A server's score; ``timeout_s`` limits all attempts together and must be below the pool's timeout."""
    return _judgement(ask(url, {"answer": answer, "response": response}, headers or {}, timeout_s), url)


def ask(url: str, message: Mapping[str, Any], headers: Mapping[str, str], timeout_s: float) -> bytes:
    """The body of a server's reply to a POST of JSON; raises EndpointError after all attempts."""
    body = json.dumps(message).encode("ascii")  # can encode any Python string, including lone surrogates
    deadline = time.monotonic() + timeout_s
    for wait in (*_BACKOFF_S, None):
        try:
            return _post(url, body, dict(headers), deadline)
        except _TryAgain as error:
            if wait is None or time.monotonic() + wait >= deadline:
                raise EndpointError(f"{shown_url(url)} {error}") from None
            time.sleep(wait)
    raise AssertionError


def prepare_endpoint(
    spec: VerifierSpec, pool_timeout_s: float, setting: str = "task.verifier", options: str = "task.verifier_options"
) -> VerifierSpec:
    """Set a timeout below the pool's; raises UserError, which names the settings, if the server cannot be reached."""
    url = spec.options.get("url") or spec.options.get("server")
    setting = setting if "url" in spec.options else f"{options}.server"
    if not isinstance(url, str) or not is_address(url):
        raise UserError(f'{options}.server = {url!r} is not an address; write "http://host:port"')
    timeout_s = spec.options.get("timeout_s", _SHARE_OF_TIMEOUT * pool_timeout_s)
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < pool_timeout_s:
        raise UserError(
            f"{options}.timeout_s = {timeout_s!r} must lie between 0 and reward.timeout_s = "
            f"{pool_timeout_s:g}; leave it out to take {_SHARE_OF_TIMEOUT:.0%} of that"
        )
    try:
        httpx.options(url, timeout=_PROBE_S, trust_env=not is_loopback(url))
    except (httpx.TransportError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{setting} = {shown_url(url)!r} cannot be reached ({reason}); start the server, or correct the address"
        ) from None
    return replace(spec, options={**spec.options, "timeout_s": timeout_s})


@cache
def _client(*, use_proxies: bool) -> httpx.Client:
    return httpx.Client(follow_redirects=False, trust_env=use_proxies)


def _post(url: str, body: bytes, headers: dict[str, str], deadline: float) -> bytes:
    # No compression: a few kilobytes could unpack to gigabytes.
    sent = {"Content-Type": "application/json", "Accept-Encoding": "identity"} | headers
    client = _client(use_proxies=not is_loopback(url))  # the first call is slow; not the server's time
    left = max(deadline - time.monotonic(), 0.01)
    try:
        with client.stream("POST", url, content=body, headers=sent, timeout=left) as reply:
            if reply.status_code == 429 or reply.status_code >= 500:
                raise _TryAgain(f"answered {reply.status_code} {reply.reason_phrase}")
            if reply.status_code != 200:
                hint = "; redirects are not followed" if reply.is_redirect else ""
                raise EndpointError(f"{shown_url(url)} answered {reply.status_code} {reply.reason_phrase}{hint}")
            return _read(reply, url, deadline)
    except httpx.TimeoutException:
        raise EndpointError(f"{shown_url(url)} gave no answer in time") from None
    except httpx.TransportError as error:
        raise _TryAgain(f"could not be asked: {str(error) or type(error).__name__}") from None


def _read(reply: httpx.Response, url: str, deadline: float) -> bytes:
    body = b""
    for part in reply.iter_raw():
        body += part
        if len(body) > _MAX_BODY:
            raise EndpointError(f"{shown_url(url)} answered with more than {_MAX_BODY:,} bytes")
        if time.monotonic() > deadline:
            raise EndpointError(f"{shown_url(url)} gave no whole answer in time")
    return body


def _judgement(body: bytes, url: str) -> Judgement:
    try:
        reply: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise EndpointError(f"{shown_url(url)} answered with what is not JSON: {body[:60]!r}") from None
    score, answer = (reply.get("score"), reply.get("answer")) if isinstance(reply, dict) else (None, None)
    if not isinstance(score, int | float):
        raise EndpointError(f'{shown_url(url)} answered without a number as "score": {body[:60]!r}')
    if answer is not None and not isinstance(answer, str):
        raise EndpointError(f'{shown_url(url)} answered with an "answer" that is not text: {body[:60]!r}')
    return Judgement(float(score), answer)
