"""Credentials are written as ``${NAME}``, read from the environment, and shown nowhere."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from forkrl.config import RewardConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.config.secret_values import SecretValues, is_loopback, shown_url
from forkrl.errors import UserError
from forkrl.rewards import open_verifier
from forkrl.types import Prompt, VerifierSpec

DATASET = ("task.name=dataset", "task.data=x.jsonl")


def leak(answer: str, response: str, *, api_key: str, words: str = "") -> float:
    """A verifier whose error holds its key."""
    raise ValueError(f"{words}the service refuses the key {api_key}")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("task.verifier=http://ann:s3cret@host/judge", "task.verifier"),
        ("task.verifier=https://s3cret@host/judge", "task.verifier"),
        ("task.verifier=http://host/judge?token=s3cret", "task.verifier"),
        ("task.verifier=http://host/judge?mode=${MODE}&token=s3cret", "task.verifier"),
        ("task.verifier=http://[/?s3cret", "task.verifier"),
        ('task.verifier_options.headers={Authorization = "Bearer s3cret"}', "task.verifier_options.headers.Auth"),
        ('task.verifier_options.headers={X-Team = "s3cret"}', "task.verifier_options.headers.X-Team"),
        ("task.verifier_options.api_key=s3cret", "task.verifier_options.api_key"),
        ('task.verifier_options.judge={access-token = "s3cret"}', "task.verifier_options.judge.access-token"),
        ('task.verifier_options.urls=["http://ann:s3cret@host"]', "task.verifier_options.urls"),
        ("task.verifier=http://${WHO}:s3cret@host/judge", "task.verifier"),
        ("task.verifier=http://s3cret:@host/judge", "task.verifier"),
        ("task.verifier=HTTPS://ann:s3cret@host/judge", "task.verifier"),
        ("task.verifier_options.dsn=postgresql://ann:s3cret@host/db", "task.verifier_options.dsn"),
        ('task.verifier_options.headers=[["Authorization", "Bearer s3cret"]]', "task.verifier_options.headers"),
        ("task.verifier_options.headers=Authorization: s3cret", "task.verifier_options.headers"),
        ('task.verifier_options.http_headers={X = {A = "s3cret"}}', "task.verifier_options.http_headers.X.A"),
        ('task.verifier_options.auth=["ann", "s3cret"]', "task.verifier_options.auth"),
        ("task.verifier_options.x-api-key=s3cret", "task.verifier_options.x-api-key"),
        ("task.verifier_options.authorization=Bearer s3cret", "task.verifier_options.authorization"),
        ("task.verifier_options.password=5463728", "task.verifier_options.password"),
        ("sandbox.server=http://ann:s3cret@host:8080", "sandbox.server"),
        ('cluster.overrides=["trainer.api_key=s3cret"]', "cluster.overrides.trainer.api_key"),
        (
            'task.parts=[{name="dataset", data="x.jsonl", source="a", verifier="http://ann:s3cret@host"}]',
            "task.parts.verifier",
        ),
    ],
)
def test_a_credential_in_the_recipe_is_rejected_and_not_shown(override: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(TrainConfig, None, [*DATASET, override])
    message = str(caught.value)
    assert "s3cret" not in message and "5463728" not in message
    assert key in message
    assert "write ${NAME}" in message


@pytest.mark.parametrize(
    "override",
    [
        "task.verifier=http://host:8000/judge",
        "task.verifier=http://ann:${JUDGE_PASSWORD}@host/judge?token=${JUDGE_TOKEN}",
        "task.verifier_options.headers.Authorization=Bearer ${JUDGE_TOKEN}",
        "task.verifier_options.api_key=${JUDGE_TOKEN}",
        "task.verifier_options.answer_key=B",
        "task.verifier_options.max_tokens=50",
        "sandbox.server=http://ann:${JUDGE_PASSWORD}@host:8080",
    ],
)
def test_a_reference_is_stored_as_it_is_written(override: str) -> None:
    key, _, value = override.partition("=")
    config: Any = load_recipe(TrainConfig, None, [*DATASET, override]).model_dump(mode="json")
    for part in key.split("."):
        config = config[part]
    assert str(config) == value


def test_values_come_from_the_environment_and_leave_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_HOST", "host:8000")
    monkeypatch.setenv("JUDGE_PASSWORD", "p@ss/w?rd")
    secrets = SecretValues()
    url = secrets.resolve("task.verifier", "http://ann:${JUDGE_PASSWORD}@${JUDGE_HOST}/a?t=${JUDGE_PASSWORD}")
    assert url == "http://ann:p%40ss%2Fw%3Frd@host:8000/a?t=p%40ss%2Fw%3Frd"
    assert secrets.resolve("k", {"a": ["x ${JUDGE_PASSWORD}", 3]}) == {"a": ["x p@ss/w?rd", 3]}
    assert secrets.hide(f"no answer from {url}: p@ss/w?rd") == (
        "no answer from http://ann:${JUDGE_PASSWORD}@${JUDGE_HOST}/a?t=${JUDGE_PASSWORD}: ${JUDGE_PASSWORD}"
    )
    assert shown_url(url) == "http://host:8000/a"


@pytest.mark.parametrize("end", ["", "…", "' and more", '")'])
@pytest.mark.parametrize("kept", [6, 10, 17])
def test_what_a_cut_leaves_of_a_value_is_hidden_too(monkeypatch: pytest.MonkeyPatch, kept: int, end: str) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret-5463728190")
    secrets = SecretValues()
    secrets.resolve("k", "${JUDGE_TOKEN}")
    assert secrets.hide("refuses 's3cret-5463728190"[: 9 + kept] + end) == "refuses '${JUDGE_TOKEN}" + end
    assert secrets.hide("s3cret-5 of another kind") == "s3cret-5 of another kind"


def test_a_value_is_hidden_as_messages_quote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'p"ä\\w'
    monkeypatch.setenv("JUDGE_PASSWORD", value)
    secrets = SecretValues()
    secrets.resolve("task.verifier", "http://ann:${JUDGE_PASSWORD}@host/")
    for text in (
        value,
        repr(value),
        json.dumps(value),
        repr(value.encode()),
        b64encode(f"ann:{value}".encode()).decode(),
    ):
        assert "${JUDGE_PASSWORD}" in secrets.hide(text), text
        assert "w" not in secrets.hide(text), text


@pytest.mark.parametrize("length", range(440, 520, 7))
def test_a_message_that_is_cut_within_a_credential_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret" * 5)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    options = {"api_key": "${JUDGE_TOKEN}", "words": "x" * length}
    with open_verifier({"": VerifierSpec("tests.unit.test_secret_values:leak", options)}, RewardConfig()) as pool:
        pool.announce = lambda _: None
        pool.verify([(Prompt("p", "?", "a"), "b")])
    assert "s3cret" not in pool.first_failures["error"]


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (VerifierSpec("forkrl.rewards.endpoint:verify_at_endpoint", {"url": "http://${NOWHERE}/"}), "task.verifier:"),
        (VerifierSpec("m:f", {"headers": {"A": "${NOWHERE}"}}), "task.verifier_options.headers.A:"),
        (VerifierSpec("forkrl.rewards.code:verify_code", {"server": "http://u:${NOWHERE}@h"}), "sandbox.server:"),
    ],
)
def test_a_missing_variable_is_named_with_its_setting(spec: VerifierSpec, key: str) -> None:
    assert "NOWHERE" not in os.environ
    with pytest.raises(UserError) as caught:
        open_verifier({"": spec}, RewardConfig())
    assert str(caught.value) == f"{key} the environment variable NOWHERE is not set; export NOWHERE"


def test_the_error_of_a_verifier_does_not_show_its_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    spec = VerifierSpec("tests.unit.test_secret_values:leak", {"api_key": "${JUDGE_TOKEN}"})
    with open_verifier({"": spec}, RewardConfig(timeout_s=60)) as pool:
        said: list[str] = []
        pool.announce = said.append
        pool.verify([(Prompt("p", "?", "a"), "b")])
    assert "refuses the key ${JUDGE_TOKEN}" in said[0]
    assert "s3cret" not in "".join([*said, *pool.first_failures.values()])


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST/", True),
        ("http://judge.localhost/", True),
        ("http://127.0.0.1/", True),
        ("http://127.8.9.1:80/", True),
        ("http://user:password@127.0.0.1/", True),
        ("http://[::1]:8000/", True),
        ("http://10.0.0.1/", False),
        ("http://localhost.example.com/", False),
        ("http://127.0.0.1.example.com/", False),
        ("http://[/", False),
        ("", False),
    ],
)
def test_which_addresses_are_this_machine(url: str, loopback: bool) -> None:
    assert is_loopback(url) is loopback


def test_a_credential_in_an_override_that_a_later_one_replaces_is_rejected() -> None:
    verifiers = ["task.verifier=http://ann:s3cret@host/a", "task.verifier=none"]
    with pytest.raises(UserError, match=r"task\.verifier: .* written out") as caught:
        load_recipe(TrainConfig, None, ["task.name=dataset", "task.data=x.jsonl", *verifiers])
    assert "s3cret" not in str(caught.value)
