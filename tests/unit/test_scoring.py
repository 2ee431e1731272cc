"""Verdicts while others are still being sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch

from forkrl.rollout.scoring import Scoring, score_groups
from forkrl.types import Prompt, Rollout, RolloutGroup, VerifierResult


class Deferred:
    """A verifier that answers when it is told to; the score of a response is its number in order of submission."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[list[VerifierResult]], str]] = []
        self.first_failures: dict[str, str] = {}

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
        return [VerifierResult(float(len(text)) / 10) for _, text in items]

    def submit(self, items: Sequence[tuple[Prompt, str]]) -> Future[list[VerifierResult]]:
        ((_, text),) = items
        self.waiting.append((Future(), text))
        return self.waiting[-1][0]


def rollout(text: str) -> Rollout:
    return Rollout((1,), (2,), torch.zeros(1), torch.zeros(1), text, True)


def groups() -> list[RolloutGroup]:
    """Two of the responses are equal."""
    return [
        RolloutGroup(Prompt("a", "a", ""), (rollout("x"), rollout("x"))),
        RolloutGroup(Prompt("b", "b", ""), (rollout("yy"), rollout("zzz"))),
    ]


def test_verdicts_go_to_their_rollouts_in_whatever_order_they_come() -> None:
    verifier, sampled = Deferred(), groups()
    scoring = Scoring(verifier)
    order = [(1, 1), (0, 0), (1, 0), (0, 1)]
    for group, number in order:
        scoring.add(sampled[group].prompt, sampled[group].rollouts[number])
    assert len(verifier.waiting) == 4, "judging begins before the sampling has ended"
    for number, (future, _) in reversed(list(enumerate(verifier.waiting))):
        future.set_result([VerifierResult(number / 10)])
    assert [group.scores for group in scoring.finish(sampled)] == [(0.1, 0.3), (0.2, 0.0)]


def test_groups_scored_at_once_are_scored_alike() -> None:
    assert [group.scores for group in score_groups(groups(), Deferred())] == [(0.1, 0.1), (0.2, 0.3)]
