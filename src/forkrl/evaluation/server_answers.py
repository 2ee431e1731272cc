"""Requests to an OpenAI-compatible server, and their outcomes: a response, a retryable failure, or a user's error."""

from __future__ import annotations

import contextlib
import email.utils
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from forkrl import __version__
from forkrl.config.secret_values import is_loopback
from forkrl.errors import UserError, printable
from forkrl.evaluation.samplers import EvalSampling, Sampled, SampleRequest, request_seed

KEY_VARIABLE = "OPENAI_API_KEY"
_QUOTED_CHARACTERS = 300  # of an answer in a message: a proxy may return a whole page
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
    """A retryable failure. ``busy``: the server is overloaded, which does not count against the request."""

    def __init__(self, reason: str, *, busy: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.busy = busy
        self.retry_after_s = retry_after_s


@dataclass
class Server:
    """Address and request options. ``extras``: non-standard fields for this server; ``names``: its models."""

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
        more = f" and {len(self.names) - _LISTED_MODELS} more" if len(self.names) > _LISTED_MODELS else ""
        return ", ".join(map(self.shown, self.names[:_LISTED_MODELS])) + more or "it lists none"

    def client_options(self) -> dict[str, Any]:
        """Options of every HTTP client: no redirects, the key in a header, no proxy for this machine."""
        headers = {
            "user-agent": f"forkrl/{__version__}", "accept-encoding": "identity", "content-type": "application/json",
        }  # fmt: skip
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        return {"headers": headers, "follow_redirects": False, "trust_env": not is_loopback(self.base)}

    def shown(self, text: str) -> str:
        """Server text made safe for a message: one short line, no control characters, never the key."""
        if self.key:
            text = text.replace(self.key, "[key]")
        line = printable(" ".join(text.split()))
        return line if len(line) <= _QUOTED_CHARACTERS else f"{line[:_QUOTED_CHARACTERS]}…"

    def said(self, body: bytes) -> str:
        """One-line quote of an answer: the error's message, a page's title, or the beginning."""
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
        """Raise a UserError if the server rejects the key or redirects."""
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


def request_body(server: Server, request: SampleRequest, sampling: EvalSampling) -> bytes:
    """The request for one response as ASCII JSON, which can encode lone surrogates."""
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
    """The response in an answer; raises Failure if a retry may help, else UserError."""
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
    # Tolerate one token: some servers do not count the closing token.
    if reason == "length" and tokens + 1 < sampling.max_response_tokens:
        raise UserError(
            f"question {request.prompt.id}: the server cut a response at {tokens} tokens, short of --max-tokens "
            f"{sampling.max_response_tokens}; serve the model with a longer context or lower --max-tokens"
        )
    return Sampled(request, text, tokens, finished=reason != "length", entropy=None, reasoning=reasoning)


def _text_and_reasoning(server: Server, choice: Mapping[str, Any]) -> tuple[str, str]:
    """The response, and separately returned reasoning ("" if none)."""
    text: Any = choice.get("text")
    reasoning: Any = ""
    if server.chat:
        message = choice.get("message")
        if not isinstance(message, dict):
            raise Failure("an answer without a message")
        text = message.get("content")
        reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
        # Content is null if the response was cut off while reasoning.
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
    """Seconds from a ``Retry-After`` header, a number or a date; 0 if absent."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _message(content: Any) -> str:
    """The message in any of the formats that servers use."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return next(filter(None, (_message(content.get(name)) for name in ("error", "message", "detail"))), "")
    return ""
