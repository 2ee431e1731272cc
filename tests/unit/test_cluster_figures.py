"""Figures of a step on verl count as those of a local step do, and an evaluation does without what failed."""

from __future__ import annotations

import pytest
import torch

from forkrl.cluster.figures import step_figures
from forkrl.evaluation.held_out import summarise
from forkrl.types import Prompt, Rollout, RolloutGroup, Verdict
from tests.verl_here import needs_verl

pytestmark = needs_verl

TOLD = dict.fromkeys(
    (
        "response", "selected", "entropy", "entropy_selected", "positive", "positive_selected", "negative",
        "negative_selected", "ratio_max", "threshold_min",
    ),
    1.0,
)  # fmt: skip


def group(name: str, *scores: float) -> RolloutGroup:
    rollout = Rollout((1,), (2, 3), torch.zeros(2), torch.zeros(2), "x", True)
    return RolloutGroup(
        Prompt(id=name, text="p", answer="a"), (rollout,) * len(scores), tuple(Verdict(score, "") for score in scores)
    )


def test_a_group_too_many_is_neither_all_right_nor_all_wrong() -> None:
    metrics = {f"actor/forkrl/{name}": value for name, value in TOLD.items()} | {
        "actor/grad_norm": 1.0,
        "actor/lr": 1.0,
    }
    dropped = [group("b", 1.0, 1.0), group("c", 0.0, 0.0), group("d", 0.0, 1.0)]
    figures = step_figures(metrics, {}, [group("a", 1.0, 0.0)], dropped, num_batches=1.0, reward=0.0, seconds=1.0)
    assert figures["sampling/dropped_all_right"] == figures["sampling/dropped_all_wrong"] == 1
    assert figures["reward/accuracy"] == 0.5


def test_an_evaluation_is_of_the_problems_with_all_their_responses() -> None:
    from forkrl.cluster.groups import whole_groups

    groups = [group("a", 1.0), group("b", 1.0, 0.0), group("c", 1.0, 1.0)]
    figures = summarise(whole_groups(groups, 2))
    assert figures["problems"] == 2 and figures["accuracy"] == 0.75
    with pytest.raises(RuntimeError, match="none of 1 problems has all its 2 responses"):
        whole_groups(groups[:1], 2)
