"""From rollouts to verdicts, while others are still being sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from forkrl.types import Prompt, Rollout, RolloutGroup, Verdict, Verifier


class Scoring:
    """Has each rollout judged from the moment it has ended.

    A slow verifier then costs a step only what it takes beyond the sampling.
    """

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._verdicts: dict[int, Future[list[Verdict]]] = {}  # by identity: two equal responses are two

    def add(self, prompt: Prompt, rollout: Rollout) -> None:
        """Begin to judge a rollout; returns at once."""
        self._verdicts[id(rollout)] = self._verifier.submit([(prompt, rollout.text)])

    def finish(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The same groups with a verdict for every rollout, all of them added before."""
        return [
            RolloutGroup(
                group.prompt,
                group.rollouts,
                tuple(self._verdicts[id(rollout)].result()[0] for rollout in group.rollouts),
            )
            for group in groups
        ]


def score_groups(groups: Sequence[RolloutGroup], verifier: Verifier) -> list[RolloutGroup]:
    """The same groups with a verdict for every rollout."""
    verdicts = iter(verifier.verify([(group.prompt, rollout.text) for group in groups for rollout in group.rollouts]))
    return [
        RolloutGroup(group.prompt, group.rollouts, tuple(next(verdicts) for _ in group.rollouts)) for group in groups
    ]
