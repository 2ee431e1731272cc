"""What the scored responses to one benchmark say: accuracy, pass@k, maj@k, lengths, and what went wrong.

Axes: ``P`` questions, ``K`` samples each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forkrl.evaluation.budgets import Floats, Outcomes, budget_curve, token_budgets
from forkrl.evaluation.majority import MAX_VOTES, ballot, majority_at_k
from forkrl.evaluation.responses import ScoredResponse
from forkrl.stats.intervals import (
    ClusterSums,
    Estimate,
    mean_of_estimates,
    mean_of_question_values,
    mean_pass_at_k,
    mean_with_interval,
    mean_with_normal_interval,
)

LENGTH_BINS = 40
Rows = list[list[ScoredResponse]]


def summarise_benchmark(responses: Sequence[ScoredResponse], samples: int) -> dict[str, Any]:
    """The figures of one benchmark, as JSON holds them; every estimate is {"mean", "low", "high"}, its 95% interval.

    ``accuracy`` is Acc@K, ``length`` Len@K in tokens (``length_right`` and ``length_wrong`` of those with score 1 and
    of all others, null where there are none; ``length_gap`` how much longer wrong ones are than right ones to the same
    question, over questions that have both). ``pass@k`` and ``maj@k`` hold powers of two up to K; ``maj@k`` and
    ``unparsed`` are null where the verifier names no answers. ``truncated`` and ``unparsed`` are shares of all
    responses, ``failures`` counts reasons, ``entropy`` is in nats per token. ``budget`` is accuracy where longer
    responses count as wrong, and ``lengths`` the histogram of lengths, right and wrong ones.

    Args:
        responses: in any order.
        samples: K, of every question.
    """
    rows = list(by_question(responses, samples).values())
    outcomes = outcomes_of(rows)
    answers = [response.answer for row in rows for response in row]
    names_answers = names_all_answers(rows)
    return {
        "samples": samples,
        "accuracy": mean_with_interval(outcomes.scores)._asdict(),
        "length": mean_with_normal_interval(outcomes.tokens)._asdict(),
        **_lengths_by_outcome(outcomes),
        "entropy": _mean_entropy(rows),
        "pass@k": {k: mean._asdict() for k, mean in _pass_at_powers(rows, samples).items()},
        "maj@k": {k: mean._asdict() for k, mean in _majority_at_powers(rows, samples).items()} or None,
        "truncated": sum(not response.finished for row in rows for response in row) / len(answers),
        "unparsed": answers.count("") / len(answers) if names_answers else None,
        "failures": dict(Counter(response.failure for row in rows for response in row if response.failure)),
        "budget": budget_curve(outcomes, token_budgets(outcomes.tokens)),
        "lengths": _length_histogram(outcomes),
    }


def by_question(responses: Sequence[ScoredResponse], samples: int) -> dict[str, list[ScoredResponse]]:
    """The responses to each question, questions and samples in order, whatever order they finished in."""
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
    """Scores and lengths, ``[P, K]`` each."""
    scores: Floats = np.array([[response.score for response in row] for row in rows], dtype=np.float64)
    tokens: Floats = np.array([[response.tokens for response in row] for row in rows], dtype=np.float64)
    return Outcomes(scores, tokens)


def names_all_answers(rows: Rows) -> bool:
    """Whether the verifier says what it read as the answer, so that responses can vote."""
    judged = [response for row in rows for response in row if not response.failure]
    return bool(judged) and all(response.answer is not None for response in judged)


def pass_counts(rows: Rows) -> list[int]:
    """Right responses (score 1) to each question."""
    return [sum(response.score == 1 for response in row) for row in rows]


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … up to ``limit``."""
    return [2**power for power in range(limit.bit_length())]


def majority_values(rows: Rows, samples: int) -> dict[int, list[float]]:
    """maj@k of every question for k = 1, 2, 4, … up to K and ``MAX_VOTES``; empty where no answers are named."""
    if not names_all_answers(rows):
        return {}
    numbers = powers_of_two(min(samples, MAX_VOTES))
    ballots = [ballot(row) for row in rows]
    known = {votes: majority_at_k(votes, numbers) for votes in set(ballots)}  # many questions vote alike
    return {k: [known[votes][i] for votes in ballots] for i, k in enumerate(numbers)}


def _pass_at_powers(rows: Rows, samples: int) -> dict[str, Estimate]:
    return {str(k): mean_pass_at_k(pass_counts(rows), samples, k) for k in powers_of_two(samples)}


def _majority_at_powers(rows: Rows, samples: int) -> dict[str, Estimate]:
    return {str(k): mean_of_question_values(each, samples / k) for k, each in majority_values(rows, samples).items()}


def _mean_entropy(rows: Rows) -> float | None:
    """Of all tokens; None where the engine does not say."""
    known = [(response.entropy, response.tokens) for row in rows for response in row if response.entropy is not None]
    tokens = sum(count for _, count in known)
    return sum(entropy * count for entropy, count in known) / tokens if tokens else None


def _lengths_by_outcome(outcomes: Outcomes) -> dict[str, Any]:
    """Mean lengths of right and wrong responses, clustered by question, and the difference within questions."""
    right = outcomes.scores == 1
    figures: dict[str, Any] = {}
    for name, chosen in (("length_right", right), ("length_wrong", ~right)):
        sums = ClusterSums(2)
        for lengths, taken in zip(outcomes.tokens, chosen, strict=True):
            sums.add([lengths[taken].sum(), taken.sum()])
        figures[name] = sums.mean(0, 1)._asdict() if chosen.any() else None
    gaps = [
        lengths[~taken].mean() - lengths[taken].mean()
        for lengths, taken in zip(outcomes.tokens, right, strict=True)
        if taken.any() and not taken.all()
    ]
    figures["length_gap"] = mean_with_normal_interval([[gap] for gap in gaps])._asdict() if gaps else None
    return figures


def _length_histogram(outcomes: Outcomes) -> dict[str, list[float]]:
    """Edges in tokens, and how many right and wrong responses lie between them."""
    edges = np.linspace(0, max(1.0, float(outcomes.tokens.max())), LENGTH_BINS + 1)
    right = outcomes.scores == 1
    counts = {
        name: np.histogram(outcomes.tokens[chosen], edges)[0] for name, chosen in (("right", right), ("wrong", ~right))
    }
    return {"edges": edges.tolist(), **{name: count.tolist() for name, count in counts.items()}}


def average_over_benchmarks(
    scored: Mapping[str, Sequence[ScoredResponse]], samples: Mapping[str, int]
) -> dict[str, Any] | None:
    """Mean ``accuracy`` and ``length`` over benchmarks of equal weight, with intervals; None for one benchmark."""
    if len(scored) < 2:
        return None
    outcomes = [outcomes_of(list(by_question(scored[name], samples[name]).values())) for name in scored]
    return {
        "accuracy": mean_of_estimates([mean_with_interval(each.scores) for each in outcomes])._asdict(),
        "length": mean_of_estimates([mean_with_normal_interval(each.tokens) for each in outcomes])._asdict(),
    }
