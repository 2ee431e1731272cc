"""Evaluation responses from an OpenAI-compatible server, many requests at a time.

Each request asks for one response with its own seed, so a resumed evaluation asks for the same responses as an
uninterrupted one. docs/engines.md says how failures are handled.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import email.utils
import json
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, Literal, NamedTuple, NoReturn

import httpx

from forkrl import __version__
from forkrl.config.loopback import is_loopback
from forkrl.errors import UserError, printable
from forkrl.evaluation.samplers import EvalSampling, Sampled, Sampler, SampleRequest, request_seed

CONCURRENCY = 32
"""Default number of requests in flight."""
KEY_VARIABLE = "OPENAI_API_KEY"
# Fields that switch off a server's own cuts of the distribution, by the name in ``owned_by``. Others may reject them.
_WHOLE_DISTRIBUTION: dict[Any, dict[str, float]] = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
}
_LONGEST_WAIT_S = 60.0
_CONNECT_S, _PROBE_S, _STOP_S = 10.0, 15.0, 5.0
_PROBE_BYTES = 16 * 1024 * 1024
_QUOTED_CHARACTERS = 300  # of a server's answer in a message: a proxy may answer with a whole page
_LISTED_MODELS = 8
_RETRIED = frozenset({408, 409, 425, 429})
_ENDED = frozenset({"stop", "eos_token", "stop_sequence", "content_filter", "tool_calls", "function_call"})
_SURROGATE = re.compile("[\ud800-\udfff]")


class Answer(NamedTuple):
    """A complete HTTP answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Failure(Exception):
    """A failure that may pass. ``busy``: the server asked for patience, which does not count against the request."""

    def __init__(self, reason: str, *, busy: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.busy = busy
        self.retry_after_s = retry_after_s


@dataclass
class Server:
    """Where and how to ask. ``extras`` are non-standard fields that this server understands, ``names`` its models."""

    base: str
    model: str
    chat: bool
    key: str | None = field(default=None, repr=False)
    extras: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ()

    @property
    def endpoint(self) -> str:
        return f"{self.base}/chat/completions" if self.chat else f"{self.base}/completions"

    @property
    def listed(self) -> str:
        """The first few model names in one line."""
        more = f" and {len(self.names) - _LISTED_MODELS} more" if len(self.names) > _LISTED_MODELS else ""
        return ", ".join(map(self.shown, self.names[:_LISTED_MODELS])) + more or "it lists none"

    def client_options(self) -> dict[str, Any]:
        """Settings of every HTTP client: no redirects, the key in a header, no proxy to reach this machine."""
        headers = {
            "user-agent": f"forkrl/{__version__}", "accept-encoding": "identity", "content-type": "application/json",
        }  # fmt: skip
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        return {"headers": headers, "follow_redirects": False, "trust_env": not is_loopback(self.base)}

    def shown(self, text: str) -> str:
        """Server text that is safe in a message: one short line, no control characters, and never the key."""
        if self.key:
            text = text.replace(self.key, "[key]")
        line = printable(" ".join(text.split()))
        return line if len(line) <= _QUOTED_CHARACTERS else f"{line[:_QUOTED_CHARACTERS]}…"

    def said(self, body: bytes) -> str:
        """What an answer says, as a one-line quote: the error's message, a page's title, or the beginning."""
        text = body[: 64 * 1024].decode("utf-8", "replace").strip()
        if not text:
            return "an empty answer"
        if text.startswith("<"):
            title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
            return f'an HTML page titled "{self.shown(title[1])}"' if title else "an HTML page"
        with contextlib.suppress(ValueError, RecursionError):
            text = _message(json.loads(text)) or text
        return f'"{self.shown(text)}"'

    def require_access(self, answer: Answer) -> None:
        """Raise a UserError if the server wants another key or redirects to an address that nobody named."""
        if 300 <= answer.status < 400:
            target = self.shown(answer.headers.get("location", "nowhere"))
            raise UserError(f"--server {self.base}: {answer.status}, redirects to {target}; give the final address")
        if answer.status in (401, 403):
            remedy = f"it rejects the key in {KEY_VARIABLE}" if self.key else f"put its key in {KEY_VARIABLE}"
            raise UserError(f"--server {self.base}: {answer.status}, {self.said(answer.body)}; {remedy}")

    def json_object(self, answer: Answer) -> dict[str, Any]:
        """The body as a JSON object; raises Failure if it is not one."""
        try:
            content = json.loads(answer.body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise Failure(f"an answer that is not JSON ({self.said(answer.body)})") from error
        if not isinstance(content, dict):
            raise Failure(f"an answer that is not a JSON object ({self.said(answer.body)})")
        return content


class ServerSampler(Sampler):
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
        self._in_flight = self._failures_in_a_row = 0

    def sample(
        self, requests: Sequence[SampleRequest], sampling: EvalSampling, grid: Sequence[SampleRequest] = ()
    ) -> Iterator[Sampled]:
        """See ``Sampler``.

        At most ``2 * concurrency`` responses are ahead of the caller. Closing the iterator abandons what is in flight.
        """
        if not requests:
            return
        client, slots = self._open_client(), asyncio.Semaphore(self.concurrency)
        self._in_flight, self._failures_in_a_row = min(self.concurrency, len(requests)), 0
        finished: queue.SimpleQueue[Future[Sampled]] = queue.SimpleQueue()
        # A thread of its own: timeouts must not run out while the caller judges responses, and a notebook's thread
        # already runs an event loop. A daemon, so that a half-read iterator does not keep the program from ending.
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
            wait([asyncio.run_coroutine_threadsafe(_abandon(client), loop)], _STOP_S)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_STOP_S)
            if not loop.is_running():  # it is where the interpreter is ending and has stopped the thread
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
        """The response to one request, tried again while patience lasts.

        A server that only asks for patience (429) counts towards the failures in a row, not towards the request's own.
        """
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
    """Reject a model that the server does not list: some servers silently answer with another one.

    A gateway may list patterns, Ollama omits ``:latest``, and a server that lists nothing cannot be checked.
    """
    model, names = server.model, server.names
    accepted = any(name in (model, f"{model}:latest") or ("*" in name and fnmatchcase(model, name)) for name in names)
    if accepted or not names:
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


def request_body(server: Server, request: SampleRequest, sampling: EvalSampling) -> bytes:
    """One response's request as ASCII JSON, which carries lone surrogates too: whole distribution, its own seed."""
    text = request.prompt.text
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if server.chat else {"prompt": text}
    fields |= {
        "model": server.model,
        "max_tokens": sampling.max_response_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "seed": request_seed(sampling.seed, *request.key),
        "stream": False,
    }
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    return json.dumps(fields | dict(server.extras)).encode("ascii")


def read_response(server: Server, request: SampleRequest, sampling: EvalSampling, answer: Answer) -> Sampled:
    """The response in an answer; raises Failure where another try may help, and UserError where it would not."""
    if answer.status != 200:
        _raise_for_status(server, request, sampling, answer)
    content = server.json_object(answer)
    if error := content.get("error"):
        code = error.get("code") if isinstance(error, dict) else None
        _raise_for_status(server, request, sampling, answer._replace(status=code if type(code) is int else 500))
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise Failure(f"an answer without choices ({server.said(answer.body)})")
    reason = choice.get("finish_reason")
    if reason != "length" and not (isinstance(reason, str) and reason in _ENDED):
        raise Failure(f"an answer with finish_reason {server.shown(json.dumps(reason))}")
    text, reasoning = _text_and_reasoning(server, choice)
    usage = content.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if type(tokens) is not int or tokens < 0:
        raise UserError(
            f"--server {server.base}: its answers lack usage.completion_tokens, so response lengths are unknown; "
            f"use a server that counts tokens (vLLM, SGLang, llama.cpp and Ollama do) or --engine vllm"
        )
    # One token of tolerance: some servers count the closing token and some do not.
    if reason == "length" and tokens + 1 < sampling.max_response_tokens:
        raise UserError(
            f"question {request.prompt.id}: the server cut a response at {tokens} tokens, short of --max-tokens "
            f"{sampling.max_response_tokens}; serve the model with a longer context or lower --max-tokens"
        )
    return Sampled(request, text, tokens, finished=reason != "length", entropy=None, reasoning=reasoning)


def _text_and_reasoning(server: Server, choice: Mapping[str, Any]) -> tuple[str, str]:
    """The response, and the reasoning that a server returns separately ("" without any)."""
    text: Any = choice.get("text")
    reasoning: Any = ""
    if server.chat:
        message = choice.get("message")
        if not isinstance(message, dict):
            raise Failure("an answer without a message")
        text = message.get("content")
        reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
        # The content is null where the response was cut off while the model was still reasoning.
        text = text or "" if reasoning else text
    for value in (text, reasoning):
        if not isinstance(value, str):
            raise Failure(f"an answer whose text is {server.shown(json.dumps(value))}")
    return _SURROGATE.sub("\ufffd", text), _SURROGATE.sub("\ufffd", reasoning)


def _raise_for_status(server: Server, request: SampleRequest, sampling: EvalSampling, answer: Answer) -> NoReturn:
    status, words, question = answer.status, server.said(answer.body), f"question {request.prompt.id}"
    if status in _RETRIED or status >= 500 or 200 <= status < 300:
        wait = _retry_after_s(answer.headers.get("retry-after", "").strip())
        raise Failure(f"{status}, {words}", busy=status == 429, retry_after_s=wait)
    server.require_access(answer)
    if status == 404:
        raise UserError(
            f"{server.endpoint}: 404, {words}; try --prompt {'plain' if server.chat else 'chat'} if the server lacks "
            f"this endpoint, or one of its models: {server.listed}"
        )
    if status == 413 or "context" in words.lower():
        raise UserError(
            f"{question}: the server rejects it with {status}, {words}; lower --max-tokens "
            f"(now {sampling.max_response_tokens}) or serve the model with a longer context"
        )
    raise UserError(f"{question}: {server.endpoint} rejects it with {status}, {words}")


def _retry_after_s(value: str) -> float:
    """Seconds that a ``Retry-After`` header asks for, as a number or a date; 0 for none."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _message(content: Any) -> str:
    """The message in any of the shapes that servers give their errors."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return next(filter(None, (_message(content.get(name)) for name in ("error", "message", "detail"))), "")
    return ""
