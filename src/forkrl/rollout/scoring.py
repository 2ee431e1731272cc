"""Scores rollouts while others are still being sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from forkrl.errors import NothingToLearn
from forkrl.types import Prompt, Rollout, RolloutGroup, Verifier, VerifierResult, term_source


class Scoring:
    """Submits each rollout to the verifier as soon as it ends, also to those of ``terms`` (``reward.terms``)."""

    def __init__(self, verifier: Verifier, terms: Sequence[str] = ()) -> None:
        self._verifier = verifier
        self._terms = terms
        self._results: dict[
            int, Future[list[VerifierResult]]
        ] = {}  # by identity: equal responses are scored separately

    def add(self, prompt: Prompt, rollout: Rollout) -> None:
        if rollout.result is not None:  # from an environment
            known: Future[list[VerifierResult]] = Future()
            known.set_result([rollout.result])
            self._results[id(rollout)] = known
            return
        asked = [prompt, *(replace(prompt, source=term_source(term, prompt.source)) for term in self._terms)]
        self._results[id(rollout)] = self._verifier.submit([(each, rollout.text) for each in asked])

    def finish(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with results; every rollout must have been added."""
        return [
            RolloutGroup(
                group.prompt,
                group.rollouts,
                tuple(self._result(rollout) for rollout in group.rollouts),
            )
            for group in groups
        ]

    def _result(self, rollout: Rollout) -> VerifierResult:
        score, *terms = self._results[id(rollout)].result()
        return replace(score, terms=dict(zip(self._terms, terms, strict=True))) if terms else score


def none_judged(failures: int, responses: int, first_failures: Mapping[str, str]) -> str:
    """A sentence for the case that the verifier failed on all responses; "" if it scored one."""
    if failures < responses:
        return ""
    error = next((f"; the verifier's first error ({kind}): {text}" for kind, text in first_failures.items()), "")
    return f"none of the {responses:,} responses could be judged{error}"


def require_judged_terms(
    groups: Sequence[RolloutGroup], terms: Sequence[str], first_failures: Mapping[str, str]
) -> None:
    """Raise NothingToLearn if one of ``reward.terms`` failed on every response: its 0 would be trained on."""
    results = [result for group in groups for result in group.results]
    for term in terms:
        own = {kind: text for kind, text in first_failures.items() if f"({term})" in kind}
        if reason := none_judged(sum(bool(each.terms[term].failure) for each in results), len(results), own):
            raise NothingToLearn(f"reward.terms ({term}): {reason}; correct its verifier or options, or remove it")


def why_nothing_to_learn(sampled: Sequence[RolloutGroup], num_batches: int, first_failures: Mapping[str, str]) -> str:
    results = [result for group in sampled for result in group.results]
    unjudged = sum(bool(result.failure) for result in results)
    if reason := none_judged(unjudged, len(results), first_failures):
        return f"{reason}; correct task.verifier or its settings (docs/verifiers.md)"
    accuracy = sum(result.score for result in results) / len(results)
    failed = f", {unjudged} responses could not be judged" if unjudged else ""
    return (
        f"nothing to learn: every group of {len(sampled)} prompts in {num_batches} generation batches was all right or "
        f"all wrong (accuracy {accuracy:.3f}{failed}); take easier or harder prompts, a larger rollout.group_size, or "
        "raise dynamic_sampling.max_generation_batches"
    )


def score_groups(groups: Sequence[RolloutGroup], verifier: Verifier) -> list[RolloutGroup]:
    results = iter(verifier.verify([(group.prompt, rollout.text) for group in groups for rollout in group.rollouts]))
    return [
        RolloutGroup(group.prompt, group.rollouts, tuple(next(results) for _ in group.rollouts)) for group in groups
    ]
