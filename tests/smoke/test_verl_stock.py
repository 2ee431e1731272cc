"""verl's own synchronous trainer, unchanged, with ForkRL's prompts, sampler and rewards around it: one run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from forkrl.method.advantages import overlong_penalty
from forkrl.rewards.countdown import verify_countdown
from tests.smoke.verl_run import (
    MAX_RESPONSE_TOKENS,
    OVERLONG_CACHE,
    VerlFiles,
    VerlOutcome,
    read_lines,
    run_once,
    stock_overrides,
)
from tests.verl_here import needs_verl

pytestmark = needs_verl

STEPS, PROMPTS, GROUP = 2, 4, 4


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[VerlFiles, VerlOutcome]:
    return run_once(tmp_path_factory, "stock", stock_overrides)


@pytest.fixture(scope="module")
def files(stock: tuple[VerlFiles, VerlOutcome]) -> VerlFiles:
    return stock[0]


@pytest.fixture(scope="module")
def outcome(stock: tuple[VerlFiles, VerlOutcome]) -> VerlOutcome:
    return stock[1]


def test_it_ends_and_leaves_no_process(outcome: VerlOutcome) -> None:
    assert outcome.code == 0, outcome.end
    assert [line["step"] for line in outcome.metrics] == [*range(STEPS + 1)]
    assert outcome.leftovers == 0


def test_prompts_reach_the_model_word_for_word(files: VerlFiles, outcome: VerlOutcome) -> None:
    assert outcome.code == 0, outcome.end
    known = {prompt.text: prompt.answer for prompt in files.train}
    for step in range(1, STEPS + 1):
        rows = read_lines(files.folder / f"rollouts/{step}.jsonl")
        assert [*Counter(row["input"] for row in rows).values()] == [GROUP] * PROMPTS
        assert all(known[row["input"]] == row["gts"] for row in rows)
    held_out = read_lines(files.folder / "validation/0.jsonl")
    assert sorted(row["input"] for row in held_out) == sorted(prompt.text for prompt in files.held_out)


def test_sampler_and_trainer_agree_on_every_log_prob(outcome: VerlOutcome) -> None:
    """At step 2 too, whose weights the sampler got from the trainer."""
    assert outcome.code == 0, outcome.end
    for line in outcome.metrics[1:]:
        assert line["data"]["training/rollout_probs_diff_valid"] == 1
        assert line["data"]["training/rollout_probs_diff_max"] < 1e-4
        assert line["data"]["actor/grad_norm"] > 0


def test_rewards_are_those_of_the_verifier_and_the_penalty(files: VerlFiles, outcome: VerlOutcome) -> None:
    assert outcome.code == 0, outcome.end
    rows = [row for step in range(1, STEPS + 1) for row in read_lines(files.folder / f"rollouts/{step}.jsonl")]
    for row in rows:
        # The tokenizer has a token a character. A response below the limit has a closing stop token, not in the text.
        length = min(len(row["output"]) + 1, MAX_RESPONSE_TOKENS)
        penalty = float(overlong_penalty(torch.tensor(length), MAX_RESPONSE_TOKENS, OVERLONG_CACHE))
        assert row["score"] == pytest.approx(verify_countdown(row["gts"], row["output"]) + penalty)
    assert len({row["score"] for row in rows}) > 2


def test_validation_reports_the_verifiers_scores(files: VerlFiles, outcome: VerlOutcome) -> None:
    assert outcome.code == 0, outcome.end
    rows = read_lines(files.folder / "validation/0.jsonl")
    assert [row["acc"] for row in rows] == [verify_countdown(row["gts"], row["output"]) for row in rows]
    assert {row["failure"] for row in rows} == {""}
    accuracy = sum(row["acc"] for row in rows) / len(rows)
    assert outcome.metrics[0]["data"]["val-core/countdown/acc/mean@1"] == pytest.approx(accuracy)
