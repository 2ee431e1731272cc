"""An OpenAI-compatible endpoint on this machine; a callback answers its requests."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "forkrl"
_MAX_BYTES = 64 << 20


class ChatRequest:
    """A request for a chat completion, whose connection waits for ``answer``. ``session`` names the rollout."""

    def __init__(self, session: str, body: dict[str, Any]) -> None:
        self.session = session
        self.body = body
        self._answered = threading.Event()
        self._answer: tuple[int, dict[str, Any]] = (500, {})

    def answer(self, body: dict[str, Any]) -> None:
        self._answer = (200, body)
        self._answered.set()

    def refuse(self, code: str, message: str, status: int = 400) -> None:
        self._answer = (status, {"error": {"message": f"{code}: {message}", "type": "invalid_request", "code": code}})
        self._answered.set()

    def wait(self) -> tuple[int, dict[str, Any]]:
        self._answered.wait()
        return self._answer


class Endpoint:
    """``/v1/models`` and ``/v1/chat/completions`` on 127.0.0.1, for clients with ``key``; not streamed.

    ``on_request`` gets every request, in the thread of its connection.
    """

    def __init__(self, on_request: Callable[[ChatRequest], None]) -> None:
        self.key = secrets.token_urlsafe(32)
        handler = type("Handler", (_Handler,), {"key": self.key, "on_request": staticmethod(on_request)})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, name="endpoint", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # all rollouts of a wave may connect at once

    def handle_error(self, *_: Any) -> None:
        """Nothing: the environment was killed, which is reported elsewhere."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    key: str
    on_request: Callable[[ChatRequest], None]

    def do_GET(self) -> None:
        if self._authorized():
            known = self.path == "/v1/models"
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]}) if known else self._lost()

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        body = self.rfile.read(int(length)) if length.isdigit() and int(length) <= _MAX_BYTES else b""
        if not self._authorized():
            return
        if self.path != "/v1/chat/completions":
            self._lost()
            return
        request = ChatRequest(self.headers.get("X-Session-ID", ""), {})
        try:
            request.body = json.loads(body)
            valid = all(isinstance(each["role"], str) for each in request.body["messages"])
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
        if not valid or not request.body["messages"]:
            request.refuse("invalid_json", "a JSON object with messages is expected")
        elif request.body.get("stream"):
            request.refuse("not_streamed", "this endpoint does not stream")
        else:
            self.on_request(request)
        self._send(*request.wait())

    def _authorized(self) -> bool:
        if compare_digest(self.headers.get("Authorization", "").encode(), f"Bearer {self.key}".encode()):
            return True
        self._send(401, {"error": {"message": "wrong key", "code": "unauthorized"}})
        return False

    def _lost(self) -> None:
        self._send(404, {"error": {"message": f"no {self.path}", "code": "not_found"}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        except OSError:  # the environment was killed meanwhile
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing: requests are not news."""
