"""Statistics of one benchmark's scored responses. Axes: ``P`` questions, ``K`` samples each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forkrl.evaluation.budgets import Floats, Outcomes, budget_curve
from forkrl.evaluation.folder import ScoredResponse
from forkrl.evaluation.majority import MAX_VOTES, ballot, majority_at_k
from forkrl.report.formatting import interval_of
from forkrl.stats.intervals import (
    ClusterSums,
    Estimate,
    as_columns,
    mean_of_estimates,
    mean_of_question_values,
    mean_pass_at_k,
    mean_with_interval,
    mean_with_normal_interval,
)
from forkrl.types import FAILURES

LENGTH_BINS = 40
Rows = list[list[ScoredResponse]]
Tables = dict[str, list[dict[str, Any]]]
"""Table rows by table name; estimates have columns ``name``, ``name_low`` and ``name_high`` (95%)."""
UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def summarise_benchmark(name: str, responses: Sequence[ScoredResponse], samples: int) -> Tables:
    """Tables of one benchmark, each with a column ``benchmark``; unknown values are NaN, and ``samples`` is K.

    ``benchmarks``: ``accuracy`` (Acc@K), ``length`` (Len@K, tokens), ``length_right`` (score 1) and ``length_wrong``
    (others), ``length_gap`` (wrong minus right within questions), ``entropy`` (nats per token), shares ``truncated``,
    ``unparsed``, counts ``failed_REASON``. ``passes``: pass@k and maj@k for k = 1, 2, 4, … up to K. ``budget``:
    accuracy if longer responses count as wrong. ``lengths``: histogram. maj@k needs named answers;
    ``unparsed`` needs "" for those that were not found.
    """
    rows = list(by_question(responses, samples).values())
    outcomes = outcomes_of(rows)
    answers = [response.answer for row in rows for response in row]
    failures = Counter(response.failure for response in responses)
    figures = {
        "questions": len(rows),
        "samples": samples,
        **as_columns("accuracy", mean_with_interval(outcomes.scores)),
        **as_columns("length", mean_with_normal_interval(outcomes.tokens)),
        **_lengths_by_outcome(outcomes),
        "entropy": _mean_entropy(rows),
        "truncated": truncated_share(rows),
        "unparsed": answers.count("") / len(answers) if any(answer is not None for answer in answers) else math.nan,
        **{f"failed_{reason}": failures[reason] for reason in FAILURES},
    }
    tables = {
        "benchmarks": [figures],
        "passes": _passes(rows, samples),
        "budget": budget_curve(outcomes),
        "lengths": _length_histogram(outcomes),
    }
    return {table: [{"benchmark": name, **row} for row in found] for table, found in tables.items()}


def mean_over_benchmarks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One row of unweighted means of ``accuracy`` and ``length``; none for a single benchmark."""
    if len(rows) < 2:
        return []
    accuracy, length = (mean_of_estimates([interval_of(row, name) for row in rows]) for name in ("accuracy", "length"))
    return [as_columns("accuracy", accuracy) | as_columns("length", length)]


def by_question(responses: Sequence[ScoredResponse], samples: int) -> dict[str, list[ScoredResponse]]:
    """Responses grouped by question, questions and samples in order."""
    found: dict[str, list[ScoredResponse]] = {}
    for response in sorted(responses, key=lambda response: (response.question, response.sample)):
        found.setdefault(response.question, []).append(response)
    if not found:
        raise ValueError("no responses")
    for question, row in found.items():
        if [response.sample for response in row] != list(range(samples)):
            raise ValueError(f"question {question} has {len(row)} responses, not samples 0 to {samples - 1}")
    return found


def outcomes_of(rows: Rows) -> Outcomes:
    scores: Floats = np.array([[response.score for response in row] for row in rows], dtype=np.float64)
    tokens: Floats = np.array([[response.tokens for response in row] for row in rows], dtype=np.float64)
    return Outcomes(scores, tokens)


def names_all_answers(rows: Rows) -> bool:
    """Whether the verifier reports the answers it read, so that responses can vote."""
    judged = [response for row in rows for response in row if not response.failure]
    return bool(judged) and all(response.answer is not None for response in judged)


def truncated_share(rows: Rows) -> float:
    return float(np.mean([not response.finished for row in rows for response in row]))


def pass_counts(rows: Rows) -> list[int]:
    """Number of right responses (score 1) per question."""
    return [sum(response.score == 1 for response in row) for row in rows]


def powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length())]


def majority_values(rows: Rows, samples: int) -> dict[int, list[float]]:
    """maj@k per question for k = 1, 2, 4, … up to K and ``MAX_VOTES``; empty if no answers are reported."""
    if not names_all_answers(rows):
        return {}
    numbers = powers_of_two(min(samples, MAX_VOTES))
    ballots = [ballot(row) for row in rows]
    known = {votes: majority_at_k(votes, numbers) for votes in set(ballots)}  # many questions have equal votes
    return {k: [known[votes][i] for votes in ballots] for i, k in enumerate(numbers)}


def _passes(rows: Rows, samples: int) -> list[dict[str, Any]]:
    counts = pass_counts(rows)
    majorities = {k: mean_of_question_values(each, samples / k) for k, each in majority_values(rows, samples).items()}
    return [
        {
            "k": k,
            **as_columns("pass", mean_pass_at_k(counts, samples, k)),
            **as_columns("majority", majorities.get(k, UNKNOWN)),
        }
        for k in powers_of_two(samples)
    ]


def _mean_entropy(rows: Rows) -> float:
    """Mean over all tokens; NaN if the engine does not report it."""
    known = [(response.entropy, response.tokens) for row in rows for response in row if response.entropy is not None]
    tokens = sum(count for _, count in known)
    return sum(entropy * count for entropy, count in known) / tokens if tokens else math.nan


def _lengths_by_outcome(outcomes: Outcomes) -> dict[str, float]:
    """Mean lengths of right and wrong responses, clustered by question, and the difference within questions."""
    right = outcomes.scores == 1
    figures: dict[str, float] = {}
    for name, chosen in (("length_right", right), ("length_wrong", ~right)):
        sums = ClusterSums(2)
        for lengths, taken in zip(outcomes.tokens, chosen, strict=True):
            sums.add([lengths[taken].sum(), taken.sum()])
        figures |= as_columns(name, sums.mean(0, 1))
    gaps = [
        [lengths[~taken].mean() - lengths[taken].mean()]
        for lengths, taken in zip(outcomes.tokens, right, strict=True)
        if taken.any() and not taken.all()
    ]
    return figures | as_columns("length_gap", mean_with_normal_interval(gaps) if gaps else UNKNOWN)


def _length_histogram(outcomes: Outcomes) -> list[dict[str, float]]:
    """Counts of right and wrong responses per length bin (tokens)."""
    edges = np.linspace(0, max(1.0, float(outcomes.tokens.max())), LENGTH_BINS + 1)
    right = outcomes.scores == 1
    counts = [np.histogram(outcomes.tokens[chosen], edges)[0] for chosen in (right, ~right)]
    return [
        {"from": low, "to": high, "right": int(count_right), "wrong": int(count_wrong)}
        for low, high, count_right, count_wrong in zip(edges[:-1], edges[1:], *counts, strict=True)
    ]
