"""What an OpenAI-compatible server's answers mean: a response, a failure worth another try, or the user's to mend."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from forkrl.errors import UserError, printable
from forkrl.evaluation.request_seed import request_seed
from forkrl.evaluation.samplers import EvalSampling, Sampled, SampleRequest

KEY_VARIABLE = "OPENAI_API_KEY"
# An error message is quoted no further than this: a proxy may answer with a whole page.
_QUOTED_CHARACTERS = 300
_RETRIED = frozenset({408, 409, 425, 429})
_ENDED = frozenset({"stop", "eos_token", "stop_sequence", "content_filter", "tool_calls", "function_call"})
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask, for what, and how: what ``find_server`` found out.

    ``base`` is the address that ``/models`` follows. ``extras`` are fields beside the standard's that this server
    understands. ``names`` are the models that it lists.
    """

    base: str
    model: str
    chat: bool
    key: str | None = field(default=None, repr=False)
    extras: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def endpoint(self) -> str:
        return f"{self.base}/chat/completions" if self.chat else f"{self.base}/completions"


class Answer(NamedTuple):
    """An HTTP answer, read to its end; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Failure(Exception):
    """A request went wrong in a way that may pass. ``retry_after_s`` is what the server asked for, None if nothing.

    ``busy`` means that the server only asked for patience: that says nothing against the request itself.
    """

    def __init__(self, reason: str, *, busy: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.busy = busy
        self.retry_after_s = retry_after_s


def request_body(server: Server, request: SampleRequest, sampling: EvalSampling) -> bytes:
    """One response's request as JSON, from the whole distribution, with a seed of its own."""
    prompt = request.prompt
    fields: dict[str, Any] = {"model": server.model}
    if server.chat:
        fields["messages"] = [{"role": "user", "content": prompt.text}]
    else:
        fields["prompt"] = prompt.text
    fields |= {
        "max_tokens": sampling.max_response_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "seed": request_seed(sampling.seed, prompt.id, request.sample),
        "stream": False,
    }
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    return json.dumps(fields | dict(server.extras)).encode("ascii")


def read_response(server: Server, request: SampleRequest, sampling: EvalSampling, answer: Answer) -> Sampled:
    """The response that an answer holds.

    Raises:
        Failure: the answer is none, and the next one may be.
        UserError: the next one would be no better.
    """
    if answer.status != 200:
        _raise_for_status(server, request, sampling, answer)
    content = read_json_object(server, answer)
    if content.get("error"):
        code = content["error"].get("code") if isinstance(content["error"], dict) else None
        _raise_for_status(server, request, sampling, answer._replace(status=code if type(code) is int else 500))
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise Failure(f"an answer without choices ({said(server, answer.body)})")
    reason = choice.get("finish_reason")
    if reason != "length" and not (isinstance(reason, str) and reason in _ENDED):
        raise Failure(f"an answer with finish_reason {shown(server, json.dumps(reason))}")
    text, reasoning = (_SURROGATE.sub("\ufffd", part) for part in _text_and_reasoning(server, choice))
    tokens = _tokens(server, content)
    # One token of grace for servers that count a closing token, or do not.
    if reason == "length" and tokens + 1 < sampling.max_response_tokens:
        raise UserError(
            f"question {request.prompt.id}: the server cut a response at {tokens} tokens, short of --max-tokens "
            f"{sampling.max_response_tokens}; serve the model with a longer context or lower --max-tokens"
        )
    return Sampled(request, text, tokens, finished=reason != "length", entropy=None, reasoning=reasoning)


def read_json_object(server: Server, answer: Answer) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Failure: it is none.
    """
    try:
        content = json.loads(answer.body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Failure(f"an answer that is no JSON ({said(server, answer.body)})") from error
    if not isinstance(content, dict):
        raise Failure(f"an answer that is no JSON object ({said(server, answer.body)})")
    return content


def said(server: Server, body: bytes) -> str:
    """What an answer says in words, quoted in one line: the error's message, a page's title, or the beginning."""
    text = body[: 64 * 1024].decode("utf-8", "replace").strip()
    if not text:
        return "an empty answer"
    if text.startswith("<"):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return f'an HTML page titled "{shown(server, title[1])}"' if title else "an HTML page"
    try:
        return f'"{shown(server, _message(json.loads(text)) or text)}"'
    except (ValueError, RecursionError):
        return f'"{shown(server, text)}"'


def shown(server: Server, text: str) -> str:
    """Text of a server made fit for a message: one short line, nothing that a terminal obeys, and never the key."""
    if server.key:
        text = text.replace(server.key, "[key]")
    line = printable(" ".join(text.split()))
    return line if len(line) <= _QUOTED_CHARACTERS else f"{line[:_QUOTED_CHARACTERS]}…"


def raise_for_key(server: Server, answer: Answer) -> NoReturn:
    """Say that the server wants a key, or another one, by the name of its variable."""
    remedy = f"{KEY_VARIABLE} holds a key that it does not accept" if server.key else f"put its key in {KEY_VARIABLE}"
    raise UserError(f"--server {server.base}: {answer.status}, {said(server, answer.body)}; {remedy}")


def raise_for_redirect(server: Server, answer: Answer) -> NoReturn:
    """Say where the server points to. Following it would send prompts and key to an address nobody named."""
    target = shown(server, answer.headers.get("location", "nowhere"))
    raise UserError(
        f"--server {server.base}: {answer.status}, points to {target}; give the address that answers itself"
    )


def _raise_for_status(server: Server, request: SampleRequest, sampling: EvalSampling, answer: Answer) -> NoReturn:
    status, words = answer.status, said(server, answer.body)
    question = f"question {request.prompt.id}"
    if status in _RETRIED or status >= 500 or 200 <= status < 300:
        raise Failure(f"{status}, {words}", busy=status == 429, retry_after_s=_retry_after_s(answer.headers))
    if 300 <= status < 400:
        raise_for_redirect(server, answer)
    if status in (401, 403):
        raise_for_key(server, answer)
    if status == 404:
        other = "plain" if server.chat else "chat"
        raise UserError(
            f"{server.endpoint}: 404, {words}; try --prompt {other} if the server lacks this endpoint, "
            f"or one of its models: {listed(server, server.names)}"
        )
    if status == 413 or "context" in words.lower():
        raise UserError(
            f"{question}: the server refuses it with {status}, {words}; lower --max-tokens "
            f"(now {sampling.max_response_tokens}) or serve the model with a longer context"
        )
    raise UserError(f"{question}: {server.endpoint} refuses it with {status}, {words}")


def listed(server: Server, names: tuple[str, ...], most: int = 8) -> str:
    """Names in one line, the first few of many."""
    if not names:
        return "it lists none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(server, name) for name in names[:most]) + more


def _message(content: Any) -> str:
    """The words in the shapes that servers give their errors."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return next(filter(None, (_message(content.get(name)) for name in ("error", "message", "detail"))), "")
    return ""


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the header ``Retry-After`` asks for, given as a number or as a date."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _text_and_reasoning(server: Server, choice: Mapping[str, Any]) -> tuple[str, str]:
    """The response, and the reasoning that a server returns separately; "" without any."""
    if not server.chat:
        return _string(server, choice.get("text")), ""
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Failure("an answer without a message")
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if not reasoning:
        return _string(server, message.get("content")), ""
    # The content is null where the response was cut off while the model was still reasoning.
    return _string(server, message.get("content") or ""), _string(server, reasoning)


def _string(server: Server, value: Any) -> str:
    if not isinstance(value, str):
        raise Failure(f"an answer whose text is {shown(server, json.dumps(value))}")
    return value


def _tokens(server: Server, content: Mapping[str, Any]) -> int:
    usage = content.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if type(tokens) is not int or tokens < 0:
        raise UserError(
            f"--server {server.base}: its answers lack usage.completion_tokens, without which no length can be stated; "
            f"use a server that counts them (vLLM, SGLang, llama.cpp and Ollama do) or --engine vllm"
        )
    return tokens
