"""A user's own verifier, in a file or behind a server, from the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.smoke.world import World

SHORT = ("training.steps=1", "eval.every=0", "eval.problems=1", "log.rollouts_sampled=0", "checkpoint.keep=1")
MOODY = """
import os

def judge(answer, response, *, raise_at="", leave_at="", odd=1.0):
    if response[:1] in tuple(raise_at):
        raise ValueError("not in the mood")
    if response[:1] in tuple(leave_at):
        os._exit(1)
    return odd if response[:1] in tuple(answer) else 0.0
"""


class Judge(BaseHTTPRequestHandler):
    """Pays for the right first character."""

    protocol_version = "HTTP/1.1"

    def answer(self, asked: bytes) -> bytes:
        item = json.loads(asked)
        return json.dumps({"score": float(item["response"][:1] in tuple(item["answer"]))}).encode()

    def do_POST(self) -> None:
        body = self.answer(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class LeakyJudge(Judge):
    """Wants a token and a header; what it gets instead is its answer, which is no judgement."""

    def answer(self, asked: bytes) -> bytes:
        if self.headers["X-Key"] == "s3cret-key" and self.path == "/judge?token=s3cret-token" and b"+" in asked:
            return json.dumps({"score": 1.0}).encode()
        return f"{self.headers['X-Key']} {self.path}".encode()


@contextmanager
def listening(handler: type[Judge]) -> Iterator[int]:
    """The port of a running server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with listening(Judge) as port:
        yield f"http://127.0.0.1:{port}/judge"


@pytest.fixture(scope="module")
def leaky_server() -> Iterator[int]:
    with listening(LeakyJudge) as port:
        yield port


def test_failures_are_counted_by_reason_and_their_first_is_shown(world: World) -> None:
    (world.folder / "moody.py").write_text(MOODY)
    moods = ('task.verifier_options.raise_at="024"', 'task.verifier_options.leave_at="6"')
    run = world.trained("moody", *SHORT, "task.verifier=moody:judge", *moods)
    lines = [line for line in run.outcome.stdout.splitlines() if line.startswith("verifier failure (")]
    assert [line.split(")")[0] for line in sorted(lines)] == ["verifier failure (crash", "verifier failure (error"]
    assert "ValueError: not in the mood" in "".join(lines)
    step = run.metrics[1]
    assert step["verifier/failures_error"] > step["verifier/failures_crash"] > 0
    assert step["verifier/failures"] == step["verifier/failures_error"] + step["verifier/failures_crash"]


def test_an_option_that_the_verifier_does_not_take_stops_before_the_run(world: World) -> None:
    (world.folder / "moody.py").write_text(MOODY)
    outcome = world.train("misspelt", *SHORT, "task.verifier=moody:judge", "task.verifier_options.rais_at=0")
    assert outcome.code == 2
    assert "got an unexpected keyword argument 'rais_at'" in outcome.line
    assert "moody:judge(answer, response, *, raise_at='', leave_at='', odd=1.0)" in outcome.line
    assert not (world.folder / "misspelt").exists()


def test_a_server_judges_as_the_function_does(world: World, server: str) -> None:
    by_server = world.trained("server", *SHORT, f"task.verifier={server}")
    by_function = world.trained("function", *SHORT)
    assert by_server.weights == by_function.weights
    assert by_server.metrics[1]["verifier/failures"] == 0


def test_a_server_that_is_not_there_stops_before_the_run(world: World) -> None:
    outcome = world.train("alone", *SHORT, "task.verifier=http://127.0.0.1:9/judge")
    assert outcome.code == 2
    assert "task.verifier = 'http://127.0.0.1:9/judge' cannot be reached" in outcome.line
    assert "start the server" in outcome.line
    assert not (world.folder / "alone").exists()


def test_a_verifier_that_judges_nothing_is_named_before_the_figures(world: World) -> None:
    """An accuracy of 0 that measures nothing must not read like a result."""
    (world.folder / "broken.py").write_text("def judge(answer, response):\n    raise KeyError('no such field')\n")
    broken = ("model", "--recipe", "recipe.toml", "task.verifier=broken:judge", "--problems", "2")
    few = ("--forks", "1", "--random", "0", "--low", "0", "--continuations", "2")
    asked: dict[str, tuple[str, ...]] = {
        "eval": (), "analyze": (), "branch": few, "decode-temps": ("--temperatures", "1"),
    }  # fmt: skip
    for command, options in asked.items():
        outcome = world.run(command, *broken, *options, "--out", f"broken-{command}")
        assert outcome.code == 0, outcome.stderr
        said, page = outcome.stdout, (world.folder / f"broken-{command}/report.html").read_text()
        assert "one of the " in said and "responses could be judged" in said, command
        assert "responses could be judged" in page, command
        if command != "analyze":  # its figures are of entropies
            assert "responses could be judged" in said.splitlines()[0], said
    assert "the verifier's first error" in world.run("eval", *broken, "--out", "broken-again").stdout.splitlines()[0]


CREDENTIALS = {"JUDGE_PASSWORD": "s3cret-password", "JUDGE_TOKEN": "s3cret-token", "JUDGE_KEY": "s3cret-key"}


def test_credentials_are_in_no_file_and_on_no_line(own_world: World, leaky_server: int) -> None:
    verifier = (
        f"task.verifier=http://ann:${{JUDGE_PASSWORD}}@127.0.0.1:{leaky_server}/judge?token=${{JUDGE_TOKEN}}",
        "task.verifier_options.headers.X-Key=${JUDGE_KEY}",
    )
    proxies = {f"{scheme}_PROXY": "http://127.0.0.1:9" for scheme in ("HTTP", "HTTPS", "ALL")}
    how = {"environment": CREDENTIALS | proxies}
    short = ("--samples", "1", "--problems", "2")
    commands = (
        ("train", "recipe.toml", *SHORT, 'log.trackers=["tensorboard"]', *verifier, "--out", "run"),
        ("train", "--resume", "run"),
        ("report", "run"),
        ("eval", "run", *short, "--out", "evaluated"),
        ("analyze", "run", *short, "--out", "analyzed"),
        ("analyze", "model", "--data", "prompts.jsonl", *verifier, *short, "runtime.device=cpu", "--out", "data"),
    )
    said = ""
    for command in commands:
        outcome = own_world.run(*command, **how)
        assert outcome.code == 0, (command, outcome.stderr)
        said += outcome.stdout + outcome.stderr
    assert "verifier failure (error)" in said
    assert "${JUDGE_KEY} /judge?token=${JUDGE_TOKEN}" in said
    assert "s3cret" not in said
    files = [path for path in own_world.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []
    assert "${JUDGE_PASSWORD}" in (own_world.folder / "run/config.toml").read_text()


def test_a_missing_variable_stops_before_the_run(world: World) -> None:
    outcome = world.train("unset", *SHORT, "task.verifier=http://ann:${NOT_SET_HERE}@127.0.0.1:9/judge")
    assert outcome.code == 2
    assert "task.verifier: the environment variable NOT_SET_HERE is not set; export NOT_SET_HERE" in outcome.line
    assert not (world.folder / "unset").exists()


def test_a_credential_in_a_command_is_rejected_before_the_run(world: World) -> None:
    outcome = world.train("literal", *SHORT, "task.verifier=http://ann:s3cret@127.0.0.1:9/judge")
    assert outcome.code == 2
    assert "s3cret" not in outcome.line
    assert "write ${NAME}" in outcome.line
    assert not (world.folder / "literal").exists()
