"""An evaluation's responses from any OpenAI-compatible server, many requests at a time.

One request asks for one response, with a seed of its own, so that an evaluation that is resumed asks for the same
responses as one that ran through. How failures are met is told in docs/engines.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import socket
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Literal

import httpx

from forkrl.errors import UserError
from forkrl.evaluation.samplers import EvalSampling, Sampled, SampleRequest
from forkrl.evaluation.server_answers import Answer, Failure, read_response, request_body, shown
from forkrl.evaluation.server_models import client_options, find_server

CONCURRENCY = 32
"""Requests in flight, unless another number is given."""
_LONGEST_WAIT_S = 60.0
_CONNECT_S = 10.0
_STOP_S = 5.0


class ServerSampler:
    """Samples from a server that speaks OpenAI's ``/completions`` or ``/chat/completions``.

    Args:
        url: the server's address, with or without ``/v1``.
        model: as the server's ``/models`` lists it.
        prompt_format: "plain" sends ``Prompt.text`` as it is, "chat" as the one message of a user, through the
            server's own chat template.
        concurrency: requests in flight.
        api_key: None takes the environment's ``OPENAI_API_KEY``; it appears in no message.
        timeout_s: seconds that one response may take in all.
        patience: failures of one request, or of all requests in a row by the number in flight, that end the sampling.
        first_wait_s: seconds before the second try; every further wait is twice as long, up to a minute.
        largest_answer: bytes.

    Raises:
        UserError: the server cannot be reached, wants another key, or has no such model.
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

        Requests stay in flight while the caller works on what it got, at most ``2 * concurrency`` ahead of it. Closing
        the iterator, or an exception such as KeyboardInterrupt, abandons them.

        Raises:
            UserError: the server refuses a request or fails ``patience`` times; what was yielded counts.
        """
        if not requests:
            return
        crew = _Crew(self, requests, sampling)
        try:
            crew.start()
            for _ in requests:
                yield crew.take()
        finally:
            crew.stop()


class _Crew:
    """A thread whose event loop keeps requests in flight, and a queue of what they brought.

    The event loop has a thread of its own because its deadlines must not run out while the caller judges answers, and
    because a notebook's thread already runs one.
    """

    def __init__(self, sampler: ServerSampler, requests: Sequence[SampleRequest], sampling: EvalSampling) -> None:
        self._sampler = sampler
        self._server = sampler.server
        self._sampling = sampling
        self._backlog = iter(requests)
        self._size = min(sampler.concurrency, len(requests))
        self._brought: queue.SimpleQueue[Sampled | BaseException] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._ahead = asyncio.Semaphore(2 * sampler.concurrency)
        self._stopped = asyncio.Event()
        self._failures_in_a_row = 0
        # A daemon: an iterator that is left half read must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="forkrl-server-requests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self) -> Sampled:
        """The next response, or what ended the sampling as an exception."""
        brought = self._brought.get()
        if isinstance(brought, BaseException):
            raise brought
        self._loop.call_soon_threadsafe(self._ahead.release)
        return brought

    def stop(self) -> None:
        """Abandon what is in flight, and wait until the thread has ended."""
        if self._thread.ident is None:
            self._loop.close()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed where the thread ended by itself
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # raised again where somebody sees it: by ``take``
            self._brought.put(error)

    async def _serve(self) -> None:
        async with self._client() as client:
            workers = [asyncio.create_task(self._work(client)) for _ in range(self._size)]
            await self._stopped.wait()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _client(self) -> httpx.AsyncClient:
        settings = client_options(self._server)
        limits = httpx.Limits(max_connections=self._size, max_keepalive_connections=self._size)
        direct = not settings["trust_env"] or not urllib.request.getproxies()
        return httpx.AsyncClient(
            # A client with a transport of its own would leave out the environment's proxies.
            transport=httpx.AsyncHTTPTransport(limits=limits, socket_options=_keep_alive()) if direct else None,
            limits=limits,
            timeout=httpx.Timeout(self._sampler.timeout_s, connect=_CONNECT_S),
            **settings,
        )

    async def _work(self, client: httpx.AsyncClient) -> None:
        """One of those that take requests off the backlog, as long as there are some."""
        try:
            while True:
                await self._ahead.acquire()
                request = next(self._backlog, None)
                if request is None:
                    return
                self._brought.put(await self._ask(client, request))
        except Exception as error:  # raised again by ``take``
            self._brought.put(error)

    async def _ask(self, client: httpx.AsyncClient, request: SampleRequest) -> Sampled:
        """A response, however many tries it takes within reason."""
        body = request_body(self._server, request, self._sampling)
        tries = own_failures = 0
        while True:
            try:
                answer = await self._post(client, request, body)
                response = read_response(self._server, request, self._sampling, answer)
            except Failure as failure:
                tries += 1
                own_failures += not failure.busy
                self._failures_in_a_row += 1
                self._check_patience(request, own_failures, failure)
                await asyncio.sleep(self._wait_s(tries, failure))
            else:
                self._failures_in_a_row = 0
                return response

    async def _post(self, client: httpx.AsyncClient, request: SampleRequest, body: bytes) -> Answer:
        limit, parts, size = self._sampler.largest_answer, [], 0
        try:
            async with (
                asyncio.timeout(self._sampler.timeout_s),
                client.stream("POST", self._server.endpoint, content=body) as response,
            ):
                async for chunk in response.aiter_bytes():
                    parts.append(chunk)
                    size += len(chunk)
                    if size > limit:
                        raise UserError(
                            f"question {request.prompt.id}: {self._server.endpoint} answers with more than {limit:,} "
                            f"bytes; lower --max-tokens (now {self._sampling.max_response_tokens})"
                        )
                return Answer(response.status_code, response.headers, b"".join(parts))
        except TimeoutError as error:
            raise Failure(f"no complete answer within {self._sampler.timeout_s:g} s") from error
        except httpx.RequestError as error:
            raise Failure(shown(self._server, str(error) or type(error).__name__)) from error

    def _check_patience(self, request: SampleRequest, own_failures: int, failure: Failure) -> None:
        """End it when one request, or all of them since the last response, failed too often.

        A server that only asks for patience says nothing against a request, so that counts for the second alone.
        """
        patience, going_on = self._sampler.patience, "nothing is lost, the same command goes on"
        if own_failures >= patience:
            raise UserError(
                f"question {request.prompt.id}: {self._server.endpoint} failed {own_failures} times, "
                f"the last with: {failure}; {going_on}"
            )
        if self._failures_in_a_row >= patience * self._size:
            raise UserError(
                f"{self._server.endpoint} failed {self._failures_in_a_row} times in a row, the last with: {failure}; "
                f"{going_on}"
            )

    def _wait_s(self, tries: int, failure: Failure) -> float:
        """Seconds until the next try: twice as long each time, spread so that requests do not all come back at once."""
        backoff = min(_LONGEST_WAIT_S, self._sampler.first_wait_s * 2.0 ** min(tries - 1, 30))
        asked = min(_LONGEST_WAIT_S, failure.retry_after_s or 0.0)
        return max(asked, backoff / 2) + random.random() * backoff / 2


def _keep_alive() -> list[tuple[int, int, int]]:
    """Socket options that notice within two minutes that a machine is gone.

    A response may take an hour without a byte on the line, so nothing but TCP itself can.
    """
    timing = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
    fine = [(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in timing if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *fine]
