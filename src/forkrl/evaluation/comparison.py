"""Two evaluations on the same questions: how much better is B, and is it more than chance and longer answers?

Axes: ``P`` questions that both have, ``K`` samples of each (which may differ between the two).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from forkrl.errors import UserError
from forkrl.evaluation.budgets import Floats, Outcomes, compare_at_budgets, compare_at_equal_spending
from forkrl.evaluation.responses import ScoredResponse
from forkrl.evaluation.summary import (
    Rows,
    by_question,
    majority_values,
    names_all_answers,
    outcomes_of,
    pass_counts,
    powers_of_two,
)
from forkrl.stats.intervals import (
    Estimate,
    mean_of_estimates,
    mean_with_interval,
    mean_with_normal_interval,
    paired_difference_of_values,
    paired_normal_difference,
    pass_at_k,
)
from forkrl.stats.permutation import Pair, holm, paired_test, pooled_paired_test

SHOWN_CHANGES = 20
Responses = Mapping[str, Sequence[ScoredResponse]]


class Side(NamedTuple):
    """One evaluation of a benchmark on the questions that both have, in the same order."""

    rows: Rows
    samples: int
    outcomes: Outcomes

    @property
    def question_means(self) -> Floats:
        """``[P]``: the accuracy of each question."""
        means: Floats = self.outcomes.scores.mean(axis=1)
        return means


def compare(a: Responses, b: Responses, seed: int = 0, sides: tuple[str, str] = ("A", "B")) -> dict[str, Any]:
    """Compare two evaluations, B minus A, benchmark by benchmark and over all that both have.

    Args:
        a: responses of each benchmark, before.
        b: after.
        seed: of what is resampled or drawn.
        sides: what notices call them.

    Returns:
        ``benchmarks``: see ``compare_benchmark``, with ``p_holm``, the p-value adjusted for their number. ``pooled``:
        differences averaged over benchmarks, each weighing the same; None for a single one. ``notices``: sentences on
        what is not the same on both sides.
    """
    names = [name for name in a if name in b]
    if not names:
        raise UserError(
            f"the evaluations have no benchmark in common ({', '.join(a) or 'none'} against {', '.join(b) or 'none'}); "
            f"compare two evaluations with the same --bench"
        )
    notices = [
        f"{name}: only {which} has it; left out."
        for which, here, there in ((sides[0], a, b), (sides[1], b, a))
        for name in here
        if name not in there
    ]
    found, pairs = [], []
    for name in names:
        side_a, side_b, left_out = _common_questions(name, a[name], b[name], sides)
        notices += left_out
        found.append(compare_benchmark(name, side_a, side_b, seed))
        pairs.append((side_a.outcomes.scores, side_b.outcomes.scores))
    for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = adjusted
    return {"benchmarks": found, "pooled": _pool(found, pairs, seed), "notices": notices}


def compare_benchmark(name: str, a: Side, b: Side, seed: int) -> dict[str, Any]:
    """One benchmark: every figure of A and B, and their paired difference {"mean", "low", "high"}.

    ``accuracy``, ``length``, ``pass@k`` and ``maj@k`` have "a", "b" and "difference"; ``budget`` has them at equal
    budgets of tokens, ``equal_spending`` where both spend the same on average; ``length_matched`` is its last row.
    ``p`` is that of ``permutation.paired_test`` on the scores; it is below 5% iff the interval of the difference of
    accuracy excludes 0.
    """
    test = paired_test(a.outcomes.scores, b.outcomes.scores, seed)
    spending = compare_at_equal_spending(a.outcomes, b.outcomes, seed)
    change = b.question_means - a.question_means
    return {
        "name": name,
        "questions": len(a.rows),
        "samples": {"a": a.samples, "b": b.samples},
        "accuracy": {
            "a": mean_with_interval(a.outcomes.scores)._asdict(),
            "b": mean_with_interval(b.outcomes.scores)._asdict(),
            "difference": test.difference._asdict(),
        },
        "p": test.p,
        "p_method": test.method,
        "length": {
            "a": mean_with_normal_interval(a.outcomes.tokens)._asdict(),
            "b": mean_with_normal_interval(b.outcomes.tokens)._asdict(),
            "difference": paired_normal_difference(a.outcomes.tokens, b.outcomes.tokens)._asdict(),
        },
        "truncated": {"a": _truncated(a), "b": _truncated(b)},
        "pass@k": _compare_passes(a, b),
        "maj@k": _compare_majorities(a, b),
        "budget": compare_at_budgets(a.outcomes, b.outcomes),
        "equal_spending": spending,
        "length_matched": spending[-1],
        "better": int((change > 0).sum()),
        "worse": int((change < 0).sum()),
        "same": int((change == 0).sum()),
        "changes": _largest_changes(a, b),
    }


def _common_questions(
    name: str, a: Sequence[ScoredResponse], b: Sequence[ScoredResponse], names: tuple[str, str]
) -> tuple[Side, Side, list[str]]:
    """Both sides on the questions that both have, and what was left out."""
    rows_a, rows_b = (by_question(each, 1 + max(response.sample for response in each)) for each in (a, b))
    common = [question for question in rows_a if question in rows_b]
    if not common:
        raise UserError(
            f"{name}: the two evaluations have no question in common (such as {next(iter(rows_a))!r} against "
            f"{next(iter(rows_b))!r}); evaluate both on the same data"
        )
    notices = [
        f"{name}: {len(rows) - len(common)} of {len(rows)} questions of {which} are not in the other; left out."
        for which, rows in zip(names, (rows_a, rows_b), strict=True)
        if len(rows) > len(common)
    ]
    sides = []
    for rows in (rows_a, rows_b):
        kept = [rows[question] for question in common]
        sides.append(Side(kept, len(kept[0]), outcomes_of(kept)))
    return sides[0], sides[1], notices


def _compare_passes(a: Side, b: Side) -> dict[str, Any]:
    found = {}
    for k in powers_of_two(min(a.samples, b.samples)):
        passes_a, passes_b = (
            [pass_at_k(right, side.samples, k) for right in pass_counts(side.rows)] for side in (a, b)
        )
        found[str(k)] = _values_and_difference(passes_a, passes_b, max(a.samples, b.samples) / k)
    return found


def _compare_majorities(a: Side, b: Side) -> dict[str, Any] | None:
    if not (names_all_answers(a.rows) and names_all_answers(b.rows)):
        return None
    votes_a, votes_b = majority_values(a.rows, a.samples), majority_values(b.rows, b.samples)
    return {
        str(k): _values_and_difference(votes_a[k], votes_b[k], max(a.samples, b.samples) / k)
        for k in votes_a
        if k in votes_b
    }


def _values_and_difference(a_P: Sequence[float], b_P: Sequence[float], most_draws: float) -> dict[str, Any]:
    return {
        "a": float(np.mean(a_P)),
        "b": float(np.mean(b_P)),
        "difference": paired_difference_of_values(a_P, b_P, most_draws)._asdict(),
    }


def _truncated(side: Side) -> float:
    return float(np.mean([not response.finished for row in side.rows for response in row]))


def _largest_changes(a: Side, b: Side) -> list[dict[str, Any]]:
    """The questions whose accuracy changed most, largest first."""
    change = b.question_means - a.question_means
    order = np.argsort(-np.abs(change), kind="stable")
    return [
        {
            "question": a.rows[index][0].question,
            "a": float(a.question_means[index]),
            "b": float(b.question_means[index]),
            "difference": float(change[index]),
            "length_a": float(a.outcomes.tokens[index].mean()),
            "length_b": float(b.outcomes.tokens[index].mean()),
        }
        for index in order[:SHOWN_CHANGES]
        if change[index]
    ]


def _pool(found: Sequence[Mapping[str, Any]], pairs: Sequence[Pair], seed: int) -> dict[str, Any] | None:
    """Means over benchmarks, each weighing the same, and the test of the mean difference of accuracy."""
    if len(found) == 1:
        return None
    test = pooled_paired_test(pairs, seed)

    def pooled(measure: str) -> dict[str, Any]:
        return mean_of_estimates([Estimate(**row[measure]["difference"]) for row in found])._asdict()

    return {
        "accuracy": {side: float(np.mean([row["accuracy"][side]["mean"] for row in found])) for side in ("a", "b")}
        | {"difference": test.difference._asdict()},
        "p": test.p,
        "length": {side: float(np.mean([row["length"][side]["mean"] for row in found])) for side in ("a", "b")}
        | {"difference": pooled("length")},
        "length_matched": {side: float(np.mean([row["length_matched"][side] for row in found])) for side in ("a", "b")}
        | {"difference": pooled("length_matched")},
    }
