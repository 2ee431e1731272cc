"""Evaluation responses from an OpenAI-compatible server, many requests at a time.

Each request asks for one response with its own seed, so a resumed evaluation asks for the same responses as an
uninterrupted one. docs/engines.md says how failures are handled.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import queue
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import httpx

from forkrl import __version__
from forkrl.config.secret_values import is_loopback
from forkrl.errors import UserError
from forkrl.evaluation.samplers import EvalSampling, Sampled, SampleRequest
from forkrl.evaluation.server_answers import (
    KEY_VARIABLE,
    Answer,
    Failure,
    Server,
    raise_for_access,
    read_json_object,
    read_response,
    request_body,
)

CONCURRENCY = 32
"""Default number of requests in flight."""
# Fields that switch off a server's own cuts of the distribution, by the name in ``owned_by``. Others may reject them.
_WHOLE_DISTRIBUTION: dict[Any, dict[str, float]] = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
}
_LONGEST_WAIT_S = 60.0
_CONNECT_S, _PROBE_S, _STOP_S = 10.0, 15.0, 5.0
_PROBE_BYTES = 16 * 1024 * 1024
_RESUME = "no response is lost: run the same command again to resume"


class ServerSampler:
    """Samples from a server that speaks OpenAI's ``/completions`` or ``/chat/completions``.

    Args:
        url: the server's address, with or without ``/v1``.
        model: as the server's ``/models`` lists it.
        prompt_format: "plain" sends ``Prompt.text`` as it is, "chat" sends it as one user message, to which the server
            applies its chat template.
        concurrency: requests in flight.
        api_key: None takes ``OPENAI_API_KEY`` from the environment; no message shows it.
        timeout_s: limit for one complete response.
        patience: failures of one request, or per request in flight without a response in between, that end sampling.
        first_wait_s: wait before the second try; it doubles with every try, up to a minute.
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

    def sample(self, requests: Sequence[SampleRequest], sampling: EvalSampling) -> Iterator[Sampled]:
        """Sample a response to every request, yielding each as it finishes, in any order.

        At most ``2 * concurrency`` responses are ahead of the caller. Closing the iterator abandons what is in flight.
        """
        if not requests:
            return
        sending = _Sending(self, requests, sampling)
        try:
            for _ in requests:
                yield sending.take()
        finally:
            sending.stop()


class _Sending:
    """A thread whose event loop keeps requests in flight.

    It needs its own thread because timeouts must not run out while the caller judges responses, and because a
    notebook's thread already runs an event loop.
    """

    def __init__(self, sampler: ServerSampler, requests: Sequence[SampleRequest], sampling: EvalSampling) -> None:
        self._sampler, self._server, self._sampling = sampler, sampler.server, sampling
        self._backlog = iter(requests)
        self._size = min(sampler.concurrency, len(requests))
        self._finished: queue.SimpleQueue[Sampled | BaseException] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._ahead = asyncio.Semaphore(2 * sampler.concurrency)
        self._stopped = asyncio.Event()
        self._failures_in_a_row = 0
        # A daemon, so that a half-read iterator does not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="forkrl-server-requests", daemon=True)
        self._thread.start()

    def take(self) -> Sampled:
        """The next response; raises whatever ended the sampling."""
        finished = self._finished.get()
        if isinstance(finished, BaseException):
            raise finished
        self._loop.call_soon_threadsafe(self._ahead.release)
        return finished

    def stop(self) -> None:
        """Abandon what is in flight and wait for the thread to end."""
        with contextlib.suppress(RuntimeError):  # the loop is closed if the thread ended by itself
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # ``take`` raises it again
            self._finished.put(error)

    async def _serve(self) -> None:
        limits = httpx.Limits(max_connections=self._size, max_keepalive_connections=self._size)
        options = _client_options(self._server)
        if not options["trust_env"] or not urllib.request.getproxies():  # a transport would replace the proxies
            options["transport"] = httpx.AsyncHTTPTransport(limits=limits, socket_options=_keep_alive())
        timeout = httpx.Timeout(self._sampler.timeout_s, connect=_CONNECT_S)
        async with httpx.AsyncClient(limits=limits, timeout=timeout, **options) as client:
            workers = [asyncio.create_task(self._work(client)) for _ in range(self._size)]
            await self._stopped.wait()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, client: httpx.AsyncClient) -> None:
        try:
            while True:
                await self._ahead.acquire()
                request = next(self._backlog, None)
                if request is None:
                    return
                self._finished.put(await self._ask(client, request))
        except Exception as error:  # ``take`` raises it again
            self._finished.put(error)

    async def _ask(self, client: httpx.AsyncClient, request: SampleRequest) -> Sampled:
        """The response to one request, tried again while patience lasts.

        A server that only asks for patience (429) counts towards the failures in a row, not towards the request's own.
        """
        body, patience = request_body(self._server, request, self._sampling), self._sampler.patience
        tries = own_failures = 0
        while True:
            try:
                answer = await self._post(client, request, body)
                response = read_response(self._server, request, self._sampling, answer)
            except Failure as failure:
                tries += 1
                own_failures += not failure.busy
                self._failures_in_a_row += 1
                last = f"the last with: {failure}; {_RESUME}"
                if own_failures >= patience:
                    raise UserError(
                        f"question {request.prompt.id}: {self._server.endpoint} failed {own_failures} times, {last}"
                    ) from failure
                if self._failures_in_a_row >= patience * self._size:
                    raise UserError(
                        f"{self._server.endpoint} failed {self._failures_in_a_row} times in a row, {last}"
                    ) from failure
                await asyncio.sleep(wait_s(tries, self._sampler.first_wait_s, failure.retry_after_s))
            else:
                self._failures_in_a_row = 0
                return response

    async def _post(self, client: httpx.AsyncClient, request: SampleRequest, body: bytes) -> Answer:
        limit, received = self._sampler.largest_answer, bytearray()
        try:
            async with (
                asyncio.timeout(self._sampler.timeout_s),
                client.stream("POST", self._server.endpoint, content=body) as response,
            ):
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if len(received) > limit:
                        raise UserError(
                            f"question {request.prompt.id}: {self._server.endpoint} answers with more than {limit:,} "
                            f"bytes; lower --max-tokens (now {self._sampling.max_response_tokens})"
                        )
                return Answer(response.status_code, response.headers, bytes(received))
        except TimeoutError as error:
            raise Failure(f"no complete answer within {self._sampler.timeout_s:g} s") from error
        except httpx.RequestError as error:
            raise Failure(self._server.shown(str(error) or type(error).__name__)) from error


def wait_s(tries: int, first_wait_s: float, retry_after_s: float) -> float:
    """Seconds until the next try: doubled each time, with jitter so that requests do not return all at once."""
    backoff = min(_LONGEST_WAIT_S, first_wait_s * 2.0 ** min(tries - 1, 30))
    return max(min(_LONGEST_WAIT_S, retry_after_s), backoff / 2) + random.random() * backoff / 2


def find_server(url: str, model: str, *, chat: bool, key: str | None) -> Server:
    """Ask ``/models``, below ``/v1`` or without it, and check that the model is there."""
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
        server = replace(server, base=bare)
        answer = _ask_models(server)
    cards = _model_cards(server, answer)
    server = replace(server, names=tuple(cards))
    _check_model(server)
    return replace(server, extras=_WHOLE_DISTRIBUTION.get(str(cards.get(model)), {}))


def _client_options(server: Server) -> dict[str, Any]:
    """Settings of every HTTP client: no redirects, the key in a header, no proxy to reach this machine."""
    headers = {"user-agent": f"forkrl/{__version__}", "accept-encoding": "identity", "content-type": "application/json"}
    if server.key:
        headers["authorization"] = f"Bearer {server.key}"
    return {"headers": headers, "follow_redirects": False, "trust_env": not is_loopback(server.base)}


def _ask_models(server: Server) -> Answer:
    """The answer of ``/models``, bounded in time and size."""
    ends, body = time.monotonic() + _PROBE_S, b""
    try:
        with (
            httpx.Client(timeout=_PROBE_S, **_client_options(server)) as client,
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


def _model_cards(server: Server, answer: Answer) -> dict[str, Any]:
    """The owner of every model that ``/models`` lists."""
    raise_for_access(server, answer)
    if answer.status != 200:
        remedy = "wait until it is ready" if answer.status == 503 else "give the address of an OpenAI-style server"
        raise UserError(f"--server {server.base}/models: {answer.status}, {server.said(answer.body)}; {remedy}")
    try:
        cards = read_json_object(server, answer).get("data")
    except Failure as failure:
        raise UserError(f"--server {server.base}/models: {failure}; is it an OpenAI-style server?") from failure
    return {
        card["id"]: card.get("owned_by")
        for card in (cards if isinstance(cards, list) else [])
        if isinstance(card, dict) and isinstance(card.get("id"), str)
    }


def _check_model(server: Server) -> None:
    """Reject a model that the server does not list: some servers silently answer with another one.

    A gateway may list patterns, Ollama omits ``:latest``, and a server that lists nothing cannot be checked.
    """
    model, names = server.model, server.names
    if not names or model in names or f"{model}:latest" in names:
        return
    if any("*" in name and fnmatchcase(model, name) for name in names):
        return
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(model.lower(), lower, n=1)
    hint = f"did you mean {server.shown(lower[close[0]])}? " if close else ""
    raise UserError(f"--server {server.base}: has no model {model}; {hint}it lists {server.listed}")


def _keep_alive() -> list[tuple[int, int, int]]:
    """Socket options that notice within two minutes that a machine is gone: a response may take an hour in silence."""
    timing = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    fine = [(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in timing if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *fine]
