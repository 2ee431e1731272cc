"""Evaluation responses from an OpenAI-compatible server, many requests at a time.

One request per response, each with its own seed, so a resumed evaluation sends the same requests as an uninterrupted
one. docs/engines.md describes how failures are handled.
"""

from __future__ import annotations

import asyncio
import difflib
import os
import queue
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, Literal

import httpx

from forkrl.errors import UserError
from forkrl.evaluation.samplers import EvalSampling, Sampled, Sampler, SampleRequest
from forkrl.evaluation.server_answers import KEY_VARIABLE, Answer, Failure, Server, read_response, request_body

CONCURRENCY = 32
"""Default number of requests in flight."""
# Fields that disable a server's own truncation of the distribution, by ``owned_by``; other servers may reject them.
_WHOLE_DISTRIBUTION: dict[Any, dict[str, float]] = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
}
_LONGEST_WAIT_S = 60.0
_CONNECT_S, _PROBE_S, _STOP_S = 10.0, 15.0, 5.0
_PROBE_BYTES = 16 * 1024 * 1024


class ServerSampler(Sampler):
    """Samples from an OpenAI-compatible server: "plain" prompts as they are, "chat" as one user message.

    Args:
        url: with or without ``/v1``.
        api_key: None uses ``OPENAI_API_KEY`` from the environment; never shown in messages.
        timeout_s: limit for one complete response.
        patience: failures of one request, or per request in flight without a response in between, before giving up.
        first_wait_s: wait before the first retry; doubles with every retry, up to a minute.
        largest_answer: bytes.
    """

    name = "server"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        prompt_format: Literal["plain", "chat"],
        concurrency: int = CONCURRENCY,
        api_key: str | None = None,
        timeout_s: float = 3600.0,
        patience: int = 8,
        first_wait_s: float = 1.0,
        largest_answer: int = 64 * 1024 * 1024,
    ) -> None:
        self.server = find_server(url, model, chat=prompt_format == "chat", key=api_key)
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.patience = patience
        self.first_wait_s = first_wait_s
        self.largest_answer = largest_answer
        self._in_flight = self._failures_in_a_row = 0

    def sample(
        self, requests: Sequence[SampleRequest], sampling: EvalSampling, grid: Sequence[SampleRequest] = ()
    ) -> Iterator[Sampled]:
        """At most ``2 * concurrency`` responses ahead of the caller; closing the iterator abandons those in flight."""
        if not requests:
            return
        client, slots = self._open_client(), asyncio.Semaphore(self.concurrency)
        self._in_flight, self._failures_in_a_row = min(self.concurrency, len(requests)), 0
        finished: queue.SimpleQueue[Future[Sampled]] = queue.SimpleQueue()
        # A thread: timeouts must not run out while the caller judges responses, and a notebook's thread already runs
        # an event loop. A daemon: a half-read iterator must not keep the process alive.
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="forkrl-server-requests", daemon=True)
        thread.start()
        asked = (
            asyncio.run_coroutine_threadsafe(self._respond(client, slots, each, sampling), loop) for each in requests
        )
        try:
            for future in islice(asked, 2 * self.concurrency):
                future.add_done_callback(finished.put)
            for _ in requests:
                response = finished.get().result()
                for future in islice(asked, 1):
                    future.add_done_callback(finished.put)
                yield response
        finally:
            abandoned, _ = wait([asyncio.run_coroutine_threadsafe(_abandon(client), loop)], _STOP_S)
            if abandoned:  # skip if the interpreter is exiting and has stopped the thread
                loop.call_soon_threadsafe(loop.stop)
                thread.join()
                loop.close()

    def _open_client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        options = self.server.client_options()
        if not options["trust_env"] or not urllib.request.getproxies():  # a transport would replace the proxies
            options["transport"] = httpx.AsyncHTTPTransport(limits=limits, socket_options=_keep_alive())
        return httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(self.timeout_s, connect=_CONNECT_S), **options)

    async def _respond(
        self, client: httpx.AsyncClient, slots: asyncio.Semaphore, request: SampleRequest, sampling: EvalSampling
    ) -> Sampled:
        """Request one response, with retries; 429 counts towards consecutive failures, not the request's own."""
        tries = own_failures = 0
        async with slots:
            while True:
                try:
                    response = read_response(
                        self.server, request, sampling, await self._post(client, request, sampling)
                    )
                except Failure as failure:
                    tries += 1
                    own_failures += not failure.busy
                    self._failures_in_a_row += 1
                    last = f"the last with: {failure}; no response is lost: run the same command again to resume"
                    if own_failures >= self.patience:
                        raise UserError(
                            f"question {request.prompt.id}: {self.server.endpoint} failed {own_failures} times, {last}"
                        ) from failure
                    if self._failures_in_a_row >= self.patience * self._in_flight:
                        raise UserError(
                            f"{self.server.endpoint} failed {self._failures_in_a_row} times in a row, {last}"
                        ) from failure
                    await asyncio.sleep(wait_s(tries, self.first_wait_s, failure.retry_after_s))
                else:
                    self._failures_in_a_row = 0
                    return response

    async def _post(self, client: httpx.AsyncClient, request: SampleRequest, sampling: EvalSampling) -> Answer:
        received, body = bytearray(), request_body(self.server, request, sampling)
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                client.stream("POST", self.server.endpoint, content=body) as response,
            ):
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if len(received) > self.largest_answer:
                        raise UserError(
                            f"question {request.prompt.id}: {self.server.endpoint} answers with more than "
                            f"{self.largest_answer:,} bytes; lower --max-tokens (now {sampling.max_response_tokens})"
                        )
                return Answer(response.status_code, response.headers, bytes(received))
        except TimeoutError as error:
            raise Failure(f"no complete answer within {self.timeout_s:g} s") from error
        except httpx.RequestError as error:
            raise Failure(self.server.shown(str(error) or type(error).__name__)) from error


async def _abandon(client: httpx.AsyncClient) -> None:
    """Cancel every request and close the connections."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()


def wait_s(tries: int, first_wait_s: float, retry_after_s: float) -> float:
    """Seconds until the next retry: doubled each time, with jitter to spread the requests."""
    backoff = min(_LONGEST_WAIT_S, first_wait_s * 2.0 ** min(tries - 1, 30))
    return max(min(_LONGEST_WAIT_S, retry_after_s), backoff / 2) + random.random() * backoff / 2


def find_server(url: str, model: str, *, chat: bool, key: str | None) -> Server:
    """Query ``/models``, below ``/v1`` or without it, and check that the model is listed."""
    if "@" in url or "?" in url or "#" in url:  # not shown: it may hold a secret
        raise UserError(f"--server: give an address without user, password and query; a key belongs in {KEY_VARIABLE}")
    try:
        valid = httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        valid = False
    if not valid:
        raise UserError(f"--server {url!r}: not an address; it looks like http://localhost:8000/v1")
    key = (key or os.environ.get(KEY_VARIABLE) or "").strip()  # a key read from a file ends with a line break
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY_VARIABLE}: holds characters that an HTTP header cannot; copy the key again")
    bare = url.rstrip("/")
    server = Server(bare if bare.endswith("/v1") else f"{bare}/v1", model, chat, key or None)
    answer = _ask_models(server)
    if answer.status in (404, 405) and server.base != bare:
        server.base = bare
        answer = _ask_models(server)
    owners = _owners(server, answer)
    server.names = tuple(owners)
    server.extras = _WHOLE_DISTRIBUTION.get(str(owners.get(model)), {})
    _require_model(server)
    return server


def _ask_models(server: Server) -> Answer:
    """The answer of ``/models``, bounded in time and size."""
    ends, body = time.monotonic() + _PROBE_S, b""
    try:
        with (
            httpx.Client(timeout=_PROBE_S, **server.client_options()) as client,
            client.stream("GET", f"{server.base}/models") as response,
        ):
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _PROBE_BYTES or time.monotonic() > ends:
                    raise UserError(f"--server {server.base}/models: an endless answer; is it an OpenAI-style server?")
            return Answer(response.status_code, response.headers, body)
    except httpx.RequestError as error:
        reason = server.shown(str(error) or type(error).__name__)
        raise UserError(
            f"--server {server.base}: cannot be reached ({reason}); start it, or correct the address"
        ) from error


def _owners(server: Server, answer: Answer) -> dict[str, Any]:
    """The owner of every model that ``/models`` lists."""
    server.require_access(answer)
    if answer.status != 200:
        remedy = "wait until it is ready" if answer.status == 503 else "give the address of an OpenAI-style server"
        raise UserError(f"--server {server.base}/models: {answer.status}, {server.said(answer.body)}; {remedy}")
    try:
        cards = server.json_object(answer).get("data")
    except Failure as failure:
        raise UserError(f"--server {server.base}/models: {failure}; is it an OpenAI-style server?") from failure
    found = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
    return {card["id"]: card.get("owned_by") for card in found if isinstance(card.get("id"), str)}


def _require_model(server: Server) -> None:
    """Reject a model that the server does not list (if it lists any): some servers silently substitute another."""
    model, names = server.model, server.names
    accepted = any(name in (model, f"{model}:latest") or ("*" in name and fnmatchcase(model, name)) for name in names)
    if accepted or not names:
        return
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(model.lower(), lower, n=1)
    hint = f"did you mean {server.shown(lower[close[0]])}? " if close else ""
    raise UserError(f"--server {server.base}: has no model {model}; {hint}it lists {server.listed}")


def _keep_alive() -> list[tuple[int, int, int]]:
    """TCP keep-alive that detects a dead machine within two minutes: a response may take an hour without traffic."""
    timing = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    fine = [(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in timing if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *fine]
