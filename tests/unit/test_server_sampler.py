"""``ServerSampler`` against a server that behaves, and against many that do not."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forkrl.errors import UserError
from forkrl.evaluation.samplers import EvalSampling, Sampled, SampleRequest, request_seed
from forkrl.evaluation.server import ServerSampler, wait_s
from forkrl.evaluation.server_answers import Answer, Failure, Server, read_response, request_body
from forkrl.types import Prompt
from tests.openai_server import MODEL, Behaviour, Exchange, OpenAIServer, completion, echo

KEY = "sk-secret-0123456789"
SAMPLING = EvalSampling(max_response_tokens=64, temperature=0.7, seed=11, stop=())


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def sampler(server: OpenAIServer, **changes: Any) -> ServerSampler:
    settings: dict[str, Any] = {"prompt_format": "plain", "timeout_s": 20.0, "first_wait_s": 0.001, "concurrency": 4}
    return ServerSampler(server.root, MODEL, **settings | changes)


def requests(questions: int = 1, samples: int = 1) -> list[SampleRequest]:
    return [SampleRequest(Prompt(f"q{q}", f"what is {q}?", ""), k) for q in range(questions) for k in range(samples)]


def only(behaviour: Behaviour, sampling: EvalSampling = SAMPLING, **changes: Any) -> Sampled:
    """The one response of a server with this behaviour."""
    with OpenAIServer(behaviour) as server:
        [sampled] = sampler(server, **changes).sample(requests(), sampling)
    return sampled


def refusal(behaviour: Behaviour, **changes: Any) -> str:
    """The line that a user reads when a server behaves like this."""
    with pytest.raises(UserError) as raised:
        only(behaviour, **changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def request_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("forkrl-server")]


@pytest.mark.parametrize("form", ["plain", "chat"])
@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_every_request_is_answered_once(form: Any, suffix: str) -> None:
    with OpenAIServer() as server:
        engine = ServerSampler(server.root + suffix, MODEL, prompt_format=form, concurrency=3)
        wanted = requests(questions=4, samples=2)
        answers = list(engine.sample(wanted, SAMPLING))
    assert len(answers) == len(wanted)
    assert {(prompt.id, sample) for (prompt, sample), *_ in answers} == {(p.id, k) for p, k in wanted}
    for answer in answers:
        prompt, sample = answer.request
        assert answer == Sampled(answer.request, f"{prompt.text}|{request_seed(11, prompt.id, sample)}", 3, True, None)
    assert request_threads() == []


def test_a_server_without_v1_is_found() -> None:
    with OpenAIServer(prefix="") as server:
        assert len(list(sampler(server).sample(requests(), SAMPLING))) == 1


def test_what_is_asked_for() -> None:
    with OpenAIServer() as server:
        list(sampler(server).sample(requests(), SAMPLING._replace(stop=("###",))))
        list(sampler(server, prompt_format="chat").sample(requests(), SAMPLING._replace(temperature=0.0)))
    plain, chat = server.asked
    assert plain == {
        "model": MODEL, "prompt": "what is 0?", "max_tokens": 64, "temperature": 0.7, "top_p": 1.0,
        "seed": request_seed(11, "q0", 0), "stream": False, "stop": ["###"],
    }  # fmt: skip
    assert chat["messages"] == [{"role": "user", "content": "what is 0?"}]
    assert chat["temperature"] == 0
    assert "stop" not in chat
    assert "prompt" not in chat


@pytest.mark.parametrize(
    ("owner", "extras"),
    [
        ("vllm", {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("sglang", {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("llamacpp", {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}),
        ("library", {}),
    ],
)
def test_a_known_servers_own_defaults_are_switched_off(owner: str, extras: dict[str, float]) -> None:
    with OpenAIServer(owner=owner) as server:
        list(sampler(server).sample(requests(), SAMPLING))
    standard = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stream"}
    assert {name: value for name, value in server.asked[0].items() if name not in standard} == extras


def test_seeds_are_stable_distinct_and_fit_every_server() -> None:
    # Written down: a change of these would make resumed evaluations ask for other responses than before.
    assert request_seed(0, "aime24/1", 0) == 1329829089
    assert request_seed(11, "q0", 0) == request_seed(11, "q0", 0)
    seeds = {request_seed(s, q, k) for s in range(3) for q in ("a", "a/1", "b") for k in range(40)}
    assert len(seeds) == 360
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(1, "1/1", 1) != request_seed(1, "1", 11)
    assert request_seed(0, "\ud800", 0) >= 0


@pytest.mark.parametrize(
    ("reason", "finished"), [("stop", True), ("length", False), ("content_filter", True), ("tool_calls", True)]
)
def test_finished_is_read_from_the_reason(reason: str, finished: bool) -> None:
    assert only(lambda x, f: x.answer(completion(f, "so", reason=reason, tokens=63))).finished is finished


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize(
    ("content", "reason", "text"), [("it is 4", "stop", "it is 4"), (None, "length", ""), ("", "length", "")]
)
def test_reasoning_is_kept_apart_from_the_text(name: str, content: str | None, reason: str, text: str) -> None:
    def reasons(exchange: Exchange, fields: dict[str, Any]) -> None:
        answer = completion(fields, "", reason=reason, tokens=64)
        answer["choices"][0]["message"] = {"content": content, name: "two and two"}
        exchange.answer(answer)

    answer = only(reasons, prompt_format="chat")
    assert (answer.text, answer.reasoning) == (text, "two and two")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("lone \ud800 and \udfff", "lone \ufffd and \ufffd"),
        ("a pair \U0001f600", "a pair \U0001f600"),
        ("nul \0 and \x1b[31m", "nul \0 and \x1b[31m"),
        ("", ""),
        ("x" * 10_000_000, "x" * 10_000_000),
    ],
    ids=["surrogates", "pair", "controls", "empty", "10 MB"],
)
def test_any_text_comes_through_and_can_be_stored(written: str, read: str) -> None:
    text = only(lambda exchange, fields: exchange.answer(completion(fields, written))).text
    assert text == read
    text.encode("utf-8")


def test_a_prompt_with_a_lone_surrogate_can_be_sent() -> None:
    with OpenAIServer() as server:
        [sampled] = sampler(server).sample([SampleRequest(Prompt("q", "\ud800?", ""), 0)], SAMPLING)
    assert sampled.text.startswith("\ufffd?|")


def cut_off(exchange: Exchange, fields: dict[str, Any]) -> None:
    exchange.send_response(200)
    exchange.send_header("Content-Length", "1000")
    exchange.end_headers()
    exchange.wfile.write(b'{"choices": [')
    exchange.close_connection = True


def hang_up(exchange: Exchange, fields: dict[str, Any]) -> None:
    exchange.close_connection = True


def drip(exchange: Exchange, fields: dict[str, Any]) -> None:
    exchange.send_response(200)
    exchange.send_header("Content-Length", "100000")
    exchange.end_headers()
    for _ in range(400):
        exchange.wfile.write(b" ")
        exchange.wfile.flush()
        time.sleep(0.02)


def broken_gzip(exchange: Exchange, fields: dict[str, Any]) -> None:
    exchange.answer(b"this is not gzip", Content_Encoding="gzip")


def changed(**changes: Any) -> Behaviour:
    return lambda exchange, fields: exchange.answer(completion(fields, "yes") | changes)


FAILURES: dict[str, tuple[Behaviour, str]] = {
    "500": (lambda x, f: x.answer({"error": {"message": "CUDA out of memory"}}, 500), '500, "CUDA out of memory"'),
    "503 page": (
        lambda x, f: x.answer(b"<html><title>Bad\n gateway</title></html>", 503),
        '503, an HTML page titled "Bad gateway"',
    ),
    "408": (lambda x, f: x.answer(b"", 408), "408, an empty answer"),
    "409": (lambda x, f: x.answer({"message": "conflict"}, 409), '409, "conflict"'),
    "not JSON": (lambda x, f: x.answer(b"hello"), 'not JSON ("hello")'),
    "page": (lambda x, f: x.answer(b"<!doctype html><p>hi"), "not JSON (an HTML page)"),
    "not UTF-8": (lambda x, f: x.answer(b'{"a": "\xff"}'), "not JSON"),
    "a list": (lambda x, f: x.answer([1, 2]), "not a JSON object"),
    "deep": (lambda x, f: x.answer(b"[" * 200_000), "not JSON"),
    "long number": (lambda x, f: x.answer(b'{"usage": ' + b"9" * 10_000 + b"}"), "not JSON"),
    "no choices": (changed(choices=[]), "without choices"),
    "choices of another kind": (changed(choices={"0": 1}), "without choices"),
    "null text": (changed(choices=[{"text": None, "finish_reason": "stop"}]), "whose text is null"),
    "text is a list": (changed(choices=[{"text": ["a"], "finish_reason": "stop"}]), 'whose text is ["a"]'),
    "aborted": (changed(choices=[{"text": "a", "finish_reason": "abort"}]), 'finish_reason "abort"'),
    "no reason": (changed(choices=[{"text": "a"}]), "finish_reason null"),
    "reason of another kind": (changed(choices=[{"text": "a", "finish_reason": {"a": 1}}]), "finish_reason {"),
    "error object": (lambda x, f: x.answer({"error": {"message": "upstream", "code": "busy"}}), '500, "upstream"'),
    "error text": (lambda x, f: x.answer({"error": "overloaded"}), '500, "overloaded"'),
    "error of 200": (lambda x, f: x.answer({"error": {"message": "odd", "code": 200}}), '200, "odd"'),
    "cut off": (cut_off, "peer closed connection"),
    "hang up": (hang_up, "disconnected"),
    "broken gzip": (broken_gzip, "Error -3"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_what_may_pass_is_tried_again_and_ends_with_a_line(kind: str) -> None:
    behaviour, says = FAILURES[kind]
    calls = []

    def at_first(exchange: Exchange, fields: dict[str, Any]) -> None:
        calls.append(fields)
        (behaviour if len(calls) <= 2 else echo)(exchange, fields)

    assert only(at_first, patience=3).text.startswith("what is 0?")
    assert len(calls) == 3
    assert all(fields == calls[0] for fields in calls)
    line = refusal(behaviour, patience=2)
    assert "question q0" in line
    assert "failed 2 times" in line
    assert says in line
    assert "no response is lost: run the same command again to resume" in line
    assert request_threads() == []


def test_a_drip_ends_at_the_deadline() -> None:
    assert "no complete answer within 0.2 s" in refusal(drip, patience=2, timeout_s=0.2)


@pytest.mark.parametrize("busy", [429, 503])
def test_a_request_may_be_told_to_wait_more_often_than_it_may_fail(busy: int) -> None:
    """With others getting through in between, only failures that are the request's own count against it."""
    turned_away: dict[str, int] = {}

    def busy_for_q0(exchange: Exchange, fields: dict[str, Any]) -> None:
        count = turned_away[fields["prompt"]] = turned_away.get(fields["prompt"], 0) + 1
        if fields["prompt"] == "what is 0?" and count <= 5:
            exchange.answer({"message": "slow down"}, busy, Retry_After="0")
        else:
            exchange.answer(completion(fields, "yes"))

    with OpenAIServer(busy_for_q0) as server:
        answers = sampler(server, patience=3, concurrency=2).sample(requests(questions=30), SAMPLING)
        if busy == 429:
            assert len(list(answers)) == 30
        else:
            with pytest.raises(UserError, match="question q0: .* failed 3 times"):
                list(answers)


def test_a_response_in_between_restores_the_patience() -> None:
    seen = set()

    def every_first_try_fails(exchange: Exchange, fields: dict[str, Any]) -> None:
        if fields["seed"] in seen:
            return echo(exchange, fields)
        seen.add(fields["seed"])
        return exchange.answer({}, 500)

    with OpenAIServer(every_first_try_fails) as server:
        answers = sampler(server, patience=2, concurrency=1).sample(requests(questions=10), SAMPLING)
        assert len(list(answers)) == 10


def test_a_server_that_only_says_wait_ends_it_too() -> None:
    with OpenAIServer(lambda x, f: x.answer({"message": "quota used up"}, 429)) as server:
        answers = sampler(server, patience=3, concurrency=2).sample(requests(questions=30), SAMPLING)
        with pytest.raises(
            UserError, match=r'failed 6 times in a row, the last with: 429, "quota used up"; no response is lost'
        ):
            list(answers)
    assert len(server.asked) <= 8


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("0", 0.0), (" 12 ", 12.0), ("9" * 5000, 999999999.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
     ("soon", 0.0), ("-3", 0.0), ("1.5", 0.0), ("٣", 0.0), ("", 0.0)],
)  # fmt: skip
def test_retry_after_is_read(value: str, seconds: float | None) -> None:
    answer = Answer(429, {"retry-after": value}, b"")
    with pytest.raises(Failure) as raised:
        read_response(Server("http://h/v1", MODEL, chat=False), requests()[0], SAMPLING, answer)
    assert raised.value.retry_after_s == seconds
    assert raised.value.busy


def test_retry_after_is_read_as_a_date() -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    answer = Answer(503, {"retry-after": date}, b"")
    with pytest.raises(Failure) as raised:
        read_response(Server("http://h/v1", MODEL, chat=False), requests()[0], SAMPLING, answer)
    assert 90 < raised.value.retry_after_s <= 100


def test_waits_double_up_to_a_minute_whatever_the_server_asks_for() -> None:
    waits = [wait_s(tries, 1.0, 0.0) for tries in (1, 2, 3, 4, 5, 100)]
    asked = wait_s(1, 1.0, 1e9)
    for wait, most in zip(waits, (1, 2, 4, 8, 16, 60), strict=True):
        assert most / 2 <= wait <= most
    assert 60 <= asked <= 61


AT_ONCE: dict[str, tuple[Behaviour, str]] = {
    "401": (lambda x, f: x.answer({"error": {"message": "no key"}}, 401), '401, "no key"; put its key in OPENAI_API_K'),
    "403": (lambda x, f: x.answer({"detail": "no"}, 403), '403, "no"; put its key in OPENAI_API_KEY'),
    "404": (
        lambda x, f: x.answer({"detail": "Not Found"}, 404),
        'completions: 404, "Not Found"; try --prompt chat if the server lacks this endpoint, or one of its models: t',
    ),
    "400": (
        lambda x, f: x.answer({"object": "error", "message": "bad seed"}, 400),
        'completions rejects it with 400, "bad seed"',
    ),
    "200 with 400": (lambda x, f: x.answer({"error": {"message": "bad seed", "code": 400}}), '400, "bad seed"'),
    "422": (lambda x, f: x.answer({"detail": [{"msg": "no"}]}, 422), "rejects it with 422"),
    "context": (
        lambda x, f: x.answer({"error": {"message": "This model's maximum context length is 8 tokens."}}, 400),
        "question q0: the server rejects it with 400, \"This model's maximum context length is 8 tokens.\"; lower "
        "--max-tokens (now 64) or serve the model with a longer context",
    ),
    "413": (lambda x, f: x.answer(b"", 413), "lower --max-tokens (now 64)"),
    "redirect": (
        lambda x, f: x.answer(b"", 307, Location="http://elsewhere.example/v1"),
        "307, redirects to http://elsewhere.example/v1; give the final address",
    ),
    "full context": (
        lambda x, f: x.answer(completion(f, "so", reason="length", tokens=62)),
        "question q0: the server cut a response at 62 tokens, short of --max-tokens 64; serve the model with a longer",
    ),
    "no usage": (changed(usage=None), "lack usage.completion_tokens, so response lengths are unknown"),
    "usage is true": (changed(usage={"completion_tokens": True}), "lack usage.completion_tokens"),
    "usage below zero": (changed(usage={"completion_tokens": -1}), "lack usage.completion_tokens"),
    "huge": (lambda x, f: x.answer(completion(f, "x" * 200_000)), "answers with more than 100,000 bytes; lower --max"),
    "escapes": (lambda x, f: x.answer({"message": "\x1b[2J\u202egone"}, 400), r'"\x1b[2J\u202egone"'),
    "long": (lambda x, f: x.answer({"message": "a" * 5000}, 400), "a" * 300 + "…"),
}  # fmt: skip


@pytest.mark.parametrize("kind", AT_ONCE)
def test_what_will_not_pass_is_said_at_once(kind: str) -> None:
    behaviour, says = AT_ONCE[kind]
    calls = []

    def counted(exchange: Exchange, fields: dict[str, Any]) -> None:
        calls.append(fields)
        behaviour(exchange, fields)

    assert says in refusal(counted, largest_answer=100_000)
    assert len(calls) == 1


def test_what_was_yielded_before_a_refusal_stays() -> None:
    def third_is_refused(exchange: Exchange, fields: dict[str, Any]) -> None:
        echo(exchange, fields) if "2" not in fields["prompt"] else exchange.answer({"message": "no"}, 400)

    with OpenAIServer(third_is_refused) as server:
        answers = sampler(server, concurrency=1).sample(requests(questions=5), SAMPLING)
        assert [next(answers).request.prompt.id for _ in range(2)] == ["q0", "q1"]
        with pytest.raises(UserError, match="question q2"):
            next(answers)


def models(status: int = 200, content: Any = None, **headers: str) -> Behaviour:
    return lambda exchange, _: exchange.answer(content if content is not None else {}, status, **headers)


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (models(401, {"error": "who?"}), '401, "who?"; put its key in OPENAI_API_KEY'),
        (
            models(302, Location="https://login.example"),
            "302, redirects to https://login.example; give the final address",
        ),
        (models(503, {"error": {"message": "Loading model"}}), '503, "Loading model"; wait until it is ready'),
        (models(404), "give the address of an OpenAI-style server"),
        (models(200, b"<html><title>My router</title>"), 'not JSON (an HTML page titled "My router"); is it an OpenAI'),
        (models(200, b" " * 17_000_000), "an endless answer"),
    ],
)
def test_a_server_that_is_none_is_refused_before_anything_is_sampled(behaviour: Behaviour, says: str) -> None:
    with OpenAIServer() as server:
        server.models_behaviour = behaviour
        with pytest.raises(UserError) as raised:
            sampler(server)
    assert says in str(raised.value)


def test_an_address_where_nothing_listens() -> None:
    with OpenAIServer() as server:
        address = server.root
    with pytest.raises(UserError, match=r"/v1: cannot be reached \(.*\); start it, or correct the address"):
        ServerSampler(address, MODEL, prompt_format="plain")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000", "--server 'localhost:8000': not an address; it looks like http://localhost:8000/v1"),
        ("ftp://host", "not an address"),
        ("http://", "not an address"),
        ("http://[::1", "not an address"),
        ("", "not an address"),
        (f"http://me:{KEY}@host/v1", "without user, password and query; a key belongs in OPENAI_API_KEY"),
        (f"http://host/v1?key={KEY}", "without user, password and query"),
    ],
)
def test_an_address_that_is_none(url: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        ServerSampler(url, MODEL, prompt_format="plain")
    assert says in str(raised.value)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["Tiny-Model", "other"], "has no model tiny-model; did you mean Tiny-Model? it lists Tiny-Model, other"),
        ([f"m{n}" for n in range(20)], "has no model tiny-model; it lists m0, m1, m2, m3, m4, m5, m6, m7 and 12 more"),
        (["evil\x1b[2J\nname"], r"it lists evil\x1b[2J name"),
    ],
)
def test_a_model_that_the_server_lacks(names: list[str], says: str) -> None:
    with OpenAIServer() as server:
        server.models = names
        with pytest.raises(UserError) as raised:
            sampler(server)
    assert says in str(raised.value)


@pytest.mark.parametrize("names", [[], [f"{MODEL}:latest"], ["tiny-*"], ["other", MODEL]])
def test_models_that_are_accepted(names: list[str]) -> None:
    with OpenAIServer() as server:
        server.models = names
        assert sampler(server).server.model == MODEL


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_the_key_is_sent_and_never_shown(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY if how == "environment" else "another")
    with OpenAIServer() as server:
        engine = sampler(server, api_key=KEY if how == "argument" else None, patience=1)
        list(engine.sample(requests(), SAMPLING))
        lines = [repr(engine.server), repr(engine), str(vars(engine))]
        for status in (400, 401, 403, 404, 500):
            server.behaviour = lambda x, f, status=status: x.answer({"message": f"key {KEY} is bad"}, status)  # type: ignore[misc]
            with pytest.raises(UserError) as raised:
                list(engine.sample(requests(), SAMPLING))
            lines.append(str(raised.value))
    assert {headers["authorization"] for _, headers, _ in server.seen} == {f"Bearer {KEY}"}
    assert all("key [key] is bad" in line for line in lines[3:])
    assert "it rejects the key in OPENAI_API_KEY" in lines[4]
    assert KEY not in " ".join(lines) + caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("key", ["a\nb", "schlüssel", "a\0b"])
def test_a_key_that_no_header_can_hold_is_not_shown_either(key: str) -> None:
    with OpenAIServer() as server, pytest.raises(UserError, match="OPENAI_API_KEY: holds characters") as raised:
        sampler(server, api_key=key)
    assert key not in str(raised.value)


def test_a_key_read_from_a_file_may_end_with_a_line_break() -> None:
    with OpenAIServer() as server:
        sampler(server, api_key=f"{KEY}\n")
    assert server.seen[0][1]["authorization"] == f"Bearer {KEY}"


def test_proxies_are_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert only(echo).tokens == 3


def test_connections_are_kept_and_no_more_are_open_than_asked_for() -> None:
    clients, together, most = set(), set(), []
    three = threading.Barrier(3, timeout=20)

    def watched(exchange: Exchange, fields: dict[str, Any]) -> None:
        clients.add(exchange.client_address)
        together.add(fields["seed"])
        three.wait()
        most.append(len(together))
        three.wait()
        together.discard(fields["seed"])
        echo(exchange, fields)

    with OpenAIServer(watched) as server:
        assert len(list(sampler(server, concurrency=3).sample(requests(questions=30), SAMPLING))) == 30
    assert len(clients) == 3
    assert max(most) == 3


def test_no_more_is_asked_for_than_a_slow_caller_takes() -> None:
    with OpenAIServer() as server:
        answers = sampler(server, concurrency=2).sample(requests(questions=60), SAMPLING)
        for taken in range(1, 31):
            next(answers)
            deadline = time.monotonic() + 10
            while len(server.asked) < taken + 4 and time.monotonic() < deadline:
                time.sleep(0.005)
            assert len(server.asked) == taken + 4
        assert len(list(answers)) == 30


def test_responses_come_as_they_finish() -> None:
    late = threading.Event()

    def first_is_late(exchange: Exchange, fields: dict[str, Any]) -> None:
        if fields["prompt"] == "what is 0?":
            late.wait(20)
        echo(exchange, fields)

    with OpenAIServer(first_is_late) as server:
        answers = sampler(server).sample(requests(questions=8), SAMPLING)
        early = [next(answers).request.prompt.id for _ in range(7)]
        late.set()
        assert [answer.request.prompt.id for answer in answers] == ["q0"]
    assert sorted(early) == [f"q{n}" for n in range(1, 8)]


@pytest.fixture
def stuck() -> Iterator[OpenAIServer]:
    """Answers the first question and keeps all others waiting."""
    release = threading.Event()

    def behaviour(exchange: Exchange, fields: dict[str, Any]) -> None:
        if fields["prompt"] != "what is 0?":
            release.wait(60)
        echo(exchange, fields)

    with OpenAIServer(behaviour) as server:
        yield server
        release.set()


def test_closing_abandons_what_is_in_flight(stuck: OpenAIServer) -> None:
    answers = sampler(stuck).sample(requests(questions=8), SAMPLING)
    next(answers)
    started = time.monotonic()
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 4
    assert request_threads() == []


def test_an_iterator_that_is_never_read_starts_nothing() -> None:
    with OpenAIServer() as server:
        sampler(server).sample(requests(), SAMPLING)
        assert list(sampler(server).sample([], SAMPLING)) == []
    assert server.asked == []
    assert request_threads() == []


@pytest.mark.parametrize("ending", ["interrupt", "exit"])
def test_a_program_ends_at_once_with_requests_in_flight(stuck: OpenAIServer, ending: str) -> None:
    program = f"""
import json, sys
from forkrl.evaluation.samplers import EvalSampling, SampleRequest
from forkrl.evaluation.server import ServerSampler
from forkrl.types import Prompt
requests = [SampleRequest(Prompt(f"q{{n}}", f"what is {{n}}?", ""), 0) for n in range(8)]
answers = ServerSampler({stuck.root!r}, {MODEL!r}, prompt_format="plain").sample(requests, EvalSampling(8, 1.0, 0, ()))
try:
    print(next(answers).tokens, flush=True)
    if {ending!r} == "exit":
        sys.exit(5)
    next(answers)
except KeyboardInterrupt:
    sys.exit(5)
"""
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"3\n"
        if ending == "interrupt":
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (5, b"")


def test_a_fault_of_our_own_is_raised_and_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkrl.evaluation.server.read_response", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        only(echo)
    monkeypatch.setattr("forkrl.evaluation.server._keep_alive", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        only(echo)
    assert request_threads() == []


def test_it_works_where_an_event_loop_already_runs() -> None:
    async def in_a_notebook() -> int:
        return len(list(sampler(server).sample(requests(questions=3), SAMPLING)))

    with OpenAIServer() as server:
        assert asyncio.run(in_a_notebook()) == 3


def test_bodies_are_ascii_json() -> None:
    body = request_body(
        Server("http://h/v1", "m", chat=False), SampleRequest(Prompt("q", "été \ud800", ""), 0), SAMPLING
    )
    assert body.isascii()
    assert json.loads(body)["prompt"] == "été \ud800"
