"""Forced alternatives, continued and judged, have the success rates that the model's own probabilities give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from forkrl.analysis.branching import position_spreads
from forkrl.commands.branch_parts import CONTINUING, Design, PartSampler, branches_table
from forkrl.commands.session import Session
from forkrl.config import TrainConfig
from forkrl.model.stop_tokens import response_text
from forkrl.parallel.workers import Workers
from forkrl.report.remaining import SAMPLING, PartWork
from forkrl.rollout import EmbeddedEngine
from forkrl.rollout.embedded import Ended, Prefix
from forkrl.types import Prompt, Task, VerifierResult
from tests.models import random_policy

ODD = tuple("13579")
PROMPTS = [Prompt("a", "12", ""), Prompt("b", "987", "")]


class SecondOdd:
    """Pays for a response whose second character is an odd digit."""

    def __init__(self) -> None:
        self.seen: list[tuple[Prompt, str]] = []
        self.first_failures: dict[str, str] = {}

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
        self.seen += items
        return [VerifierResult(float(text[1:2] in ODD)) for _, text in items]

    def submit(self, items: Sequence[tuple[Prompt, str]]) -> Future[list[VerifierResult]]:
        future: Future[list[VerifierResult]] = Future()
        future.set_result(self.verify(items))
        return future


def sampled(continuations: int, **design: Any) -> tuple[Session, SecondOdd, list[dict[str, Any]]]:
    policy, verifier = random_policy(sharpness=3.0), SecondOdd()
    sizes: dict[str, Any] = {"max_response_tokens": 4, "max_prompt_tokens": 8, "max_sequences": 300}
    config = TrainConfig.model_validate({"rollout": sizes, "reward": {"overlong_cache": 0}})
    workers = Workers(policy)
    engine = EmbeddedEngine(workers, max_prompt_tokens=8, max_sequences=300)
    session = Session(config, workers, engine, Task("test", [], PROMPTS, {}), PROMPTS, None)
    numbers = {"responses": 2, "forks": 4, "random": 0, "low": 0, "alternatives": 4, "temperature": 1.0} | design
    return session, verifier, rows_of(session, verifier, Design(continuations=continuations, **numbers), 0)


def rows_of(session: Session, verifier: SecondOdd, design: Design, part: int) -> list[dict[str, Any]]:
    sampler = PartSampler(session, verifier, design)
    return sampler.rows(part, PROMPTS, sampler.work(len(PROMPTS)))


def probabilities(session: Session, ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = session.policy.model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_branch_has_the_rate_that_the_model_gives_it(temperature: float) -> None:
    """At position 0 the chance of an odd second character is one more softmax away; at position 1 it is certain."""
    session, _, rows = sampled(2000, temperature=temperature)
    encode = session.policy.tokenizer.encode
    odd = [encode(character)[0] for character in ODD]
    seen = set()
    assert [(row["prompt"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in rows:
        prompt_ids = encode(row["prompt_text"])
        for branch in row["branches"]:
            position, token = branch["position"], branch["token_id"]
            given = [*prompt_ids, *row["token_ids"][:position]]
            probs = probabilities(session, given, temperature)
            assert branch["probability"] == pytest.approx(float(probs[token]), abs=1e-5)
            assert branch["rank"] == 1 + int((probs > probs[token]).sum())
            assert branch["taken"] == (token == row["token_ids"][position])
            assert branch["exact"] == (token == session.policy.tokenizer.eos_token_id or position == 3)
            rate = np.mean(branch["scores"])
            if position == 0 and not branch["exact"]:
                true = float(probabilities(session, [*given, token], temperature)[odd].sum())
                assert abs(rate - true) < 4.5 * np.sqrt(true * (1 - true) / 2000) + 1e-9
                seen.add(position)
            elif position == 1:
                assert rate == (token in odd)
                seen.add(position)
    assert seen == {0, 1}


def test_the_natural_spread_is_that_of_the_model_s_own_choice() -> None:
    session, _, rows = sampled(2000)
    odd = [session.policy.tokenizer.encode(character)[0] for character in ODD]
    table = branches_table(rows)
    spreads = position_spreads(table).set_index(["prompt", "sample", "position"])
    for row in rows:
        prompt_ids = session.policy.tokenizer.encode(row["prompt_text"])
        if row["branches"][0]["position"] != 0:
            continue
        tried = [branch for branch in row["branches"] if branch["position"] == 0]
        weights = np.array([branch["probability"] for branch in tried])
        rates = [
            float(probabilities(session, [*prompt_ids, branch["token_id"]])[odd].sum()) * (not branch["exact"])
            for branch in tried
        ]
        weights /= weights.sum()
        true = weights @ (np.array(rates) - weights @ rates) ** 2
        assert spreads.loc[(row["prompt"], row["sample"], 0), "natural"] == pytest.approx(true, abs=0.004)


def test_a_branch_that_ends_the_response_is_judged_once_and_as_it_is() -> None:
    session, verifier, rows = sampled(3)
    exact = [(row, branch) for row in rows for branch in row["branches"] if branch["exact"]]
    assert exact
    for row, branch in exact:
        ids = row["token_ids"][: branch["position"]]
        if branch["token_id"] != session.policy.tokenizer.eos_token_id:
            ids = [*ids, branch["token_id"]]
        text = response_text(session.policy.tokenizer, ids, finished=False)
        assert len(branch["scores"]) == 1
        assert any(prompt.text == row["prompt_text"] and seen == text for prompt, seen in verifier.seen)
        assert branch["cut"] == (branch["token_id"] != session.policy.tokenizer.eos_token_id)
    assert all(len(branch["scores"]) == 3 for row in rows for branch in row["branches"] if not branch["exact"])


def test_a_part_is_the_same_whenever_it_is_asked_for_and_another_part_is_not() -> None:
    session, verifier, rows = sampled(3)
    design = Design(2, 4, 0, 0, 4, 3, 1.0)
    assert rows_of(session, verifier, design, 0) == rows
    assert rows_of(session, verifier, design, 1) != rows


class Watched(EmbeddedEngine):
    """Notes what is shown whenever a sequence has ended."""

    seen: list[tuple[str, int]]
    work: PartWork

    def stream(self, prefixes: Sequence[Prefix], **settings: Any) -> Iterator[Ended]:
        for ended in super().stream(prefixes, **settings):
            yield ended
            self.seen.append((self.work.stage, self.work.finished()))


def test_progress_counts_responses_within_each_stage_of_a_part() -> None:
    session, verifier, rows = sampled(3)
    engine = Watched(session.workers, max_prompt_tokens=8, max_sequences=300)
    sampler = PartSampler(replace(session, engine=engine), verifier, Design(2, 4, 0, 0, 4, 3, 1.0))
    engine.work, engine.seen = sampler.work(2 * len(PROMPTS)), []
    for done in (0, 4):
        assert sampler.rows(0, PROMPTS, engine.work) == rows
        for stage in (SAMPLING, CONTINUING):
            numbers = [number - done for name, number in engine.seen if name == stage]
            assert numbers == sorted(numbers)
            assert numbers.count(4) == 1  # with the last sequence
            assert set(numbers) >= {1, 2, 3, 4} and set(numbers) <= set(range(5))
        engine.seen.clear()
    assert engine.work.finished() == engine.work.total == 8
    assert engine.work.seconds_left() == 0
