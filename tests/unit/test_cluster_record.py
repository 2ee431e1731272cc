"""Metrics of a step on verl count as a local step's do, and an evaluation leaves out problems that lost a response."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from forkrl.cluster.record import step_metrics
from forkrl.rollout.held_out import summarise
from forkrl.types import Prompt, Rollout, RolloutGroup, VerifierResult
from tests.verl_here import needs_verl

pytestmark = needs_verl

SUMS = dict.fromkeys(
    (
        "response", "selected", "entropy", "entropy_selected", "positive", "positive_selected", "negative",
        "negative_selected", "ratio_max", "threshold_min",
    ),
    1.0,
)  # fmt: skip


def group(name: str, *scores: float) -> RolloutGroup:
    rollout = Rollout((1,), (2, 3), torch.zeros(2), torch.zeros(2), "x", True)
    return RolloutGroup(
        Prompt(id=name, text="p", answer="a"),
        (rollout,) * len(scores),
        tuple(VerifierResult(score, "") for score in scores),
    )


def test_a_group_too_many_is_neither_all_right_nor_all_wrong() -> None:
    metrics = {f"actor/forkrl/{name}": value for name, value in SUMS.items()} | {
        "actor/grad_norm": 1.0,
        "actor/lr": 1.0,
    }
    dropped = [group("b", 1.0, 1.0), group("c", 0.0, 0.0), group("d", 0.0, 1.0)]
    figures = step_metrics(metrics, {}, [group("a", 1.0, 0.0)], dropped, num_batches=1.0, reward=0.0, seconds=1.0)
    assert figures["sampling/dropped_all_right"] == figures["sampling/dropped_all_wrong"] == 1
    assert figures["reward/accuracy"] == 0.5


class Spelling:
    """A tokenizer of single letters."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    bos_token_id = eos_token_id = unk_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(chr(97 + each) for each in ids)


def test_groups_are_read_with_verdict_text_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from forkrl.cluster import groups as module

    def row(ids: list[int], said: dict[str, object]) -> dict[str, Any]:
        rewards_T = torch.zeros(len(ids))
        rewards_T[-1] = 0.25  # the score and a penalty
        return {
            "prompts": torch.tensor([9]),
            "responses": torch.tensor(ids),
            "rm_scores": rewards_T,
            "extra_fields": {"reward_extra_info": said},
            "extra_info": {"id": "p", "place": "file:1", "source": "s", "level": 2},
            "reward_model": {"ground_truth": "42"},
            "raw_prompt": [{"role": "user", "content": "question"}],
        }

    rows = [row([1, 2, 0], {"score": 1.0, "failure": ""}), row([1, 2], {"score": 0.0, "failure": "timeout"})]
    rows.append(row([3], {}))  # of another reward function
    held = {name: [each[name] for each in rows] for name in rows[0]}
    monkeypatch.setattr("transfer_queue.kv_batch_get", lambda **asked: held)
    keys = ["u_0_0", "u_1_0", "w_0_0"]
    first, second = module.read_groups(keys, "train", Spelling(), [0], with_text=True)  # type: ignore[arg-type]
    assert [(each.text, each.finished) for each in first.rollouts] == [("bc", True), ("bc", False)]
    assert [(each.score, each.failure) for each in first.results] == [(1.0, ""), (0.0, "timeout")]
    assert first.prompt == Prompt(id="p", text="question", answer="42", place="file:1", source="s", level=2)
    assert second.results[0].score == 0.25


def test_an_evaluation_is_of_the_problems_with_all_their_responses() -> None:
    from forkrl.cluster.groups import complete_groups

    groups = [group("a", 1.0), group("b", 1.0, 0.0), group("c", 1.0, 1.0)]
    figures = summarise(complete_groups(groups, 2))
    assert figures["problems"] == 2 and figures["accuracy"] == 0.75
    with pytest.raises(RuntimeError, match="none of 1 problems has all its 2 responses"):
        complete_groups(groups[:1], 2)
