"""Compares two evaluations on their common questions, also at equal token spending.

Axes: ``P`` common questions, ``K`` samples of each (may differ between the two).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from forkrl.errors import UserError
from forkrl.evaluation.budgets import Floats, Outcomes, compare_at_budgets, compare_at_equal_spending
from forkrl.evaluation.folder import ScoredResponse
from forkrl.evaluation.summary import (
    Rows,
    Tables,
    by_question,
    majority_values,
    outcomes_of,
    pass_counts,
    powers_of_two,
    truncated_share,
)
from forkrl.report.formatting import interval_of
from forkrl.stats.intervals import (
    as_columns,
    mean_of_estimates,
    mean_with_interval,
    mean_with_normal_interval,
    paired_difference_of_values,
    paired_normal_difference,
    pass_at_k,
)
from forkrl.stats.permutation import Pair, holm, paired_test, pooled_paired_test

SHOWN_CHANGES = 20
MEASURES = ("accuracy", "length", "matched")
"""Each has columns ``MEASURE_a``, ``MEASURE_b`` and ``MEASURE_difference`` with its interval."""
Responses = Mapping[str, Sequence[ScoredResponse]]


class Comparison(NamedTuple):
    """The tables of a comparison, and notes on what differs between the sides."""

    tables: Tables
    notes: list[str]


class Side(NamedTuple):
    """One evaluation of a benchmark on the common questions, in the same order."""

    rows: Rows
    samples: int
    outcomes: Outcomes

    @property
    def question_means(self) -> Floats:
        """``[P]``: mean score per question."""
        means: Floats = self.outcomes.scores.mean(axis=1)
        return means


def compare(a: Responses, b: Responses, seed: int = 0, sides: tuple[str, str] = ("A", "B")) -> Comparison:
    """B minus A, per benchmark and over the common ones; ``sides`` names them in notes.

    The tables are those of ``compare_benchmark``, with ``p_holm`` in ``benchmarks``. ``mean`` has one row of unweighted
    means over benchmarks, or none for a single benchmark. ``seed`` is for resampling and random deals.
    """
    names = [name for name in a if name in b]
    if not names:
        raise UserError(
            f"the evaluations have no benchmark in common ({', '.join(a) or 'none'} against {', '.join(b) or 'none'}); "
            f"compare two evaluations with the same --bench"
        )
    notes = [
        f"{name}: only {which} has it; left out."
        for which, here, there in ((sides[0], a, b), (sides[1], b, a))
        for name in here
        if name not in there
    ]
    tables: Tables = {}
    pairs = []
    for name in names:
        side_a, side_b, left_out = _common_questions(name, a[name], b[name], sides)
        notes += left_out
        for table, rows in compare_benchmark(name, side_a, side_b, seed).items():
            tables.setdefault(table, []).extend(rows)
        pairs.append((side_a.outcomes.scores, side_b.outcomes.scores))
    for row, adjusted in zip(tables["benchmarks"], holm([row["p"] for row in tables["benchmarks"]]), strict=True):
        row["p_holm"] = adjusted
    tables["mean"] = _mean_over_benchmarks(tables["benchmarks"], pairs, seed) if len(names) > 1 else []
    return Comparison(tables, notes)


def compare_benchmark(name: str, a: Side, b: Side, seed: int) -> Tables:
    """Values of A and B on one benchmark, and their paired differences.

    ``benchmarks``: one row with ``MEASURES``; ``matched`` is the last row of ``spending``. ``p`` is from
    ``permutation.paired_test``: below 5% iff the interval of the accuracy difference excludes 0. ``passes``: pass@k and
    maj@k. ``budget``, ``spending``: accuracy at equal budgets and at equal mean spending. ``changes``: questions whose
    accuracy changed most.
    """
    test = paired_test(a.outcomes.scores, b.outcomes.scores, seed)
    spending = compare_at_equal_spending(a.outcomes, b.outcomes, seed)
    matched, change = spending[-1], b.question_means - a.question_means
    figures = {
        "questions": len(a.rows),
        "samples_a": a.samples,
        "samples_b": b.samples,
        **as_columns("accuracy_a", mean_with_interval(a.outcomes.scores)),
        **as_columns("accuracy_b", mean_with_interval(b.outcomes.scores)),
        **as_columns("accuracy_difference", test.difference),
        "p": test.p,
        "p_method": test.method,
        **as_columns("length_a", mean_with_normal_interval(a.outcomes.tokens)),
        **as_columns("length_b", mean_with_normal_interval(b.outcomes.tokens)),
        **as_columns("length_difference", paired_normal_difference(a.outcomes.tokens, b.outcomes.tokens)),
        **{f"matched_{column}": value for column, value in matched.items()},
        "truncated_a": truncated_share(a.rows),
        "truncated_b": truncated_share(b.rows),
        "better": int((change > 0).sum()),
        "worse": int((change < 0).sum()),
        "same": int((change == 0).sum()),
    }
    tables = {
        "benchmarks": [figures],
        "passes": [*_compare_values("pass@k", a, b, _passes), *_compare_values("maj@k", a, b, majority_values)],
        "budget": compare_at_budgets(a.outcomes, b.outcomes),
        "spending": spending,
        "changes": _largest_changes(a, b),
    }
    return {table: [{"benchmark": name, **row} for row in found] for table, found in tables.items()}


def _common_questions(
    name: str, a: Sequence[ScoredResponse], b: Sequence[ScoredResponse], names: tuple[str, str]
) -> tuple[Side, Side, list[str]]:
    """Both sides on their common questions, and notes on what was left out."""
    rows_a, rows_b = (by_question(each, 1 + max(response.sample for response in each)) for each in (a, b))
    common = [question for question in rows_a if question in rows_b]
    if not common:
        raise UserError(
            f"{name}: the two evaluations have no question in common (such as {next(iter(rows_a))!r} against "
            f"{next(iter(rows_b))!r}); evaluate both on the same data"
        )
    notes = [
        f"{name}: {len(rows) - len(common)} of {len(rows)} questions of {which} are not in the other; left out."
        for which, rows in zip(names, (rows_a, rows_b), strict=True)
        if len(rows) > len(common)
    ]
    kept_a, kept_b = ([rows[question] for question in common] for rows in (rows_a, rows_b))
    return (
        Side(kept_a, len(kept_a[0]), outcomes_of(kept_a)),
        Side(kept_b, len(kept_b[0]), outcomes_of(kept_b)),
        notes,
    )


def _passes(rows: Rows, samples: int) -> dict[int, list[float]]:
    """pass@k per question for k = 1, 2, 4, … up to K."""
    return {k: [pass_at_k(right, samples, k) for right in pass_counts(rows)] for k in powers_of_two(samples)}


def _compare_values(
    measure: str, a: Side, b: Side, values: Callable[[Rows, int], dict[int, list[float]]]
) -> list[dict[str, Any]]:
    """A value per question and k, if both sides have it."""
    values_a, values_b = values(a.rows, a.samples), values(b.rows, b.samples)
    return [
        {
            "measure": measure,
            "k": k,
            "a": float(np.mean(values_a[k])),
            "b": float(np.mean(values_b[k])),
            **as_columns(
                "difference", paired_difference_of_values(values_a[k], values_b[k], max(a.samples, b.samples) / k)
            ),
        }
        for k in values_a
        if k in values_b
    ]


def _largest_changes(a: Side, b: Side) -> list[dict[str, Any]]:
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


def _mean_over_benchmarks(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pair], seed: int) -> list[dict[str, Any]]:
    """Unweighted means over benchmarks, and the test of the mean accuracy difference."""
    test = pooled_paired_test(pairs, seed)
    pooled: dict[str, Any] = {"questions": sum(row["questions"] for row in rows), "p": test.p}
    for measure in MEASURES:
        for side in "ab":
            pooled[f"{measure}_{side}"] = float(np.mean([row[f"{measure}_{side}"] for row in rows]))
        name = f"{measure}_difference"
        differences = mean_of_estimates([interval_of(row, name) for row in rows])
        pooled |= as_columns(name, test.difference if measure == "accuracy" else differences)
    return [pooled]
