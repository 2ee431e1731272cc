"""A small OpenAI-compatible server in a thread, which a test tells how to behave, well or badly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

MODEL = "tiny-model"


class Exchange(BaseHTTPRequestHandler):
    """One connection's requests; what a behaviour answers through."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: the second of two would wait for the first one's acknowledgement
    server: OpenAIServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """``/models``, wherever the test's server keeps it."""
        self.server.seen.append((self.path, dict(self.headers), None))
        if self.server.models_behaviour is not None:
            self.server.models_behaviour(self, {})
        elif self.path == f"{self.server.prefix}/models":
            cards = [{"id": name, "object": "model", "owned_by": self.server.owner} for name in self.server.models]
            self.answer({"object": "list", "data": cards})
        else:
            self.answer({"detail": "Not Found"}, status=404)

    def do_POST(self) -> None:
        """What the test wants."""
        body = self.rfile.read(int(self.headers["content-length"]))
        fields = json.loads(body)
        self.server.seen.append((self.path, dict(self.headers), fields))
        if self.path not in (f"{self.server.prefix}/completions", f"{self.server.prefix}/chat/completions"):
            self.answer({"detail": "Not Found"}, status=404)
        else:
            self.server.behaviour(self, fields)

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        """Send a body, as it is or as JSON, with underscores of header names as hyphens."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


Behaviour = Callable[[Exchange, dict[str, Any]], None]


def completion(fields: dict[str, Any], text: str, *, tokens: int = 3, reason: str | None = "stop") -> dict[str, Any]:
    """What a well-behaved server answers, to a prompt or to messages."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    choice |= {"message": {"role": "assistant", "content": text}} if "messages" in fields else {"text": text}
    return {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}}


def echo(exchange: Exchange, fields: dict[str, Any]) -> None:
    """Answer with the prompt and the seed."""
    prompt = fields["prompt"] if "prompt" in fields else fields["messages"][0]["content"]
    exchange.answer(completion(fields, f"{prompt}|{fields['seed']}"))


class OpenAIServer(ThreadingHTTPServer):
    """Serves on a free port of this machine between ``with`` and its end; ``seen`` holds path, headers, fields."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, behaviour: Behaviour = echo, *, prefix: str = "/v1", owner: str = "somebody") -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.behaviour = behaviour
        self.models_behaviour: Behaviour | None = None
        self.models = [MODEL]
        self.prefix = prefix
        self.owner = owner
        self.seen: list[tuple[str, dict[str, str], dict[str, Any] | None]] = []

    @property
    def root(self) -> str:
        """The address without ``/v1``."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The fields of every request for a response so far."""
        return [fields for _, _, fields in self.seen if fields is not None]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no fault here."""

    def __enter__(self) -> OpenAIServer:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
