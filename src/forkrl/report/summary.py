"""What the run comes to: the sentence at the top of the page, and the figures beneath it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from forkrl.report.difference import is_clear, probability, signed_points
from forkrl.report.page import Card
from forkrl.report.run_data import RunData
from forkrl.stats.intervals import mean_with_interval
from forkrl.stats.permutation import PairedTest, paired_test


class Estimate(NamedTuple):
    """An accuracy with its 95% interval, all in [0, 1]; the ends are None where the run did not record them."""

    step: int
    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.1%} (no interval recorded)"
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def evaluations(run: RunData) -> list[Estimate]:
    """Held-out accuracy at every step that has one."""
    return [
        Estimate(step, row["eval/accuracy"], row.get("eval/accuracy_low"), row.get("eval/accuracy_high"))
        for step, row in run.metrics.items()
        if "eval/accuracy" in row
    ]


class Comparison(NamedTuple):
    """The first and the last evaluation, on the problems that both have, and the paired test of them.

    ``unequal``: why they cannot be compared; empty if they can. ``problems``: what they were on, to follow the figures.
    """

    before: Estimate
    after: Estimate
    problems: str
    test: PairedTest | None = None
    unequal: str = ""


def comparison(run: RunData) -> Comparison:
    """The last evaluation against the first, problem by problem where the scores of each were recorded.

    A resumed run may change its evaluations. Other problems are left out of the comparison; answers that were sampled
    in another way are not compared.
    """
    found = evaluations(run)
    before, after, problems = found[0], found[-1], _num_problems(run)
    if changes := run.sampling_changes(before.step, after.step):
        return Comparison(before, after, "", unequal=f"they were sampled in different ways ({'; '.join(changes)})")
    scores_before, scores_after = (run.scores.get(each.step) for each in (before, after))
    if scores_before is None or scores_after is None:
        counts = {run.metrics[each.step].get("eval/problems") for each in (before, after)}
        unequal = "" if len(counts) == 1 else "they are on different problems"
        return Comparison(before, after, "" if unequal else problems, unequal=unequal)
    common = [problem for problem in scores_before if problem in scores_after]
    if not common:
        return Comparison(before, after, "", unequal="they are on different problems")
    rows = [np.array([scores[name] for name in common], dtype=np.float64) for scores in (scores_before, scores_after)]
    if scores_before.keys() != scores_after.keys():
        problems = f" on the {len(common):,} problems that both evaluations have"
        before, after = (
            Estimate(each.step, *mean_with_interval(scores)) for each, scores in zip((before, after), rows, strict=True)
        )
    return Comparison(before, after, problems, paired_test(rows[0], rows[1]))


def _nothing_was_judged(run: RunData, step: int) -> bool:
    row = run.metrics[step]
    failures, responses = (
        row.get("eval/verifier_failures", 0.0),
        row.get("eval/problems", 0.0) * row.get("eval/samples", 1.0),
    )
    return 0 < responses <= failures


def verdict(run: RunData) -> str:
    """One sentence: accuracy before and after, their paired difference with p-value, problems, steps, wall time."""
    found = evaluations(run)
    if not found:
        return f"Nothing was evaluated on held-out problems; {_effort(run)}."
    if blind := [each.step for each in dict.fromkeys((found[0], found[-1])) if _nothing_was_judged(run, each.step)]:
        steps = " and ".join(map(str, blind))
        return (
            f"The verifier judged no held-out response at step {steps}, so accuracy measures nothing; {_effort(run)}."
        )
    if len(found) == 1:
        only = f"Held-out accuracy was {found[0]} at step {found[0].step}{_num_problems(run)}"
        return f"{only}, and there is no second evaluation to compare; {_effort(run)}."
    before, after, problems, test, unequal = comparison(run)
    if unequal:
        figures = f"{before} at step {before.step} and {after} at step {after.step}"
        return f"Held-out accuracy was {figures}; {unequal}, so they are not compared. {_effort(run).capitalize()}."
    clear = _intervals_are_apart(before, after) if test is None else is_clear(test.difference.low, test.difference.high)
    verb, to = (("rose from" if after.value > before.value else "fell from"), "to") if clear else ("was", "and")
    change = f"Held-out accuracy {verb} {before} at step {before.step} {to} {after} at step {after.step}{problems}"
    return f"{change}; {_meaning(test, clear=clear)}. {_effort(run).capitalize()}."


def _meaning(test: PairedTest | None, *, clear: bool) -> str:
    if test is not None:
        found = f"{signed_points(*test.difference)} paired by problem, {probability(test.p)}"
        return found if clear else f"{found}: no clear change"
    if clear:
        return "the 95% intervals are apart"
    return "the scores of each problem were not recorded, so whether this is more than chance is not known"


def _intervals_are_apart(before: Estimate, after: Estimate) -> bool:
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return False
    return after.low > before.high or after.high < before.low


def status(run: RunData) -> str:
    """Say so when the run did not (yet) reach its last step; empty otherwise."""
    if run.planned_steps is None or run.num_steps >= run.planned_steps:
        return ""
    return (
        f"This run stands at step {run.num_steps} of {run.planned_steps}: it was interrupted, ended early, "
        "or is still running. The page shows what it wrote so far."
    )


def cards(run: RunData) -> list[Card]:
    """The figures under the verdict; one that was never recorded is left out."""
    found = evaluations(run)
    made: list[Card] = []
    if len(found) > 1:
        before, after, _, test, unequal = comparison(run)
        difference = after.value - before.value
        change = signed_points(difference, math.nan, math.nan) if test is None else signed_points(*test.difference)
        note = f"not compared: {unequal}" if unequal else change
        made.append(Card("Held-out accuracy", f"{after.value:.1%}", f"{before.value:.1%}", note))
    elif found:
        made.append(Card("Held-out accuracy", f"{found[0].value:.1%}", note=f"only at step {found[0].step}"))
    drift = [
        ("Mean entropy", "entropy/mean", "{:.3f}", "nats per token, in training"),
        ("Response length", "response/length", "{:.1f}", "tokens, in training"),
    ]
    for title, name, form, note in drift:
        series = run.series(name)
        if len(series):
            first, last = form.format(series.values[0]), form.format(series.values[-1])
            made.append(Card(title, last, first if len(series) > 1 else "", note))
    kept = run.series("selection/kept_fraction")
    if len(kept):
        made.append(
            Card(
                "Tokens trained on",
                f"{kept.values.mean():.1%}",
                note=f"of response tokens, rule {run.setting('selection.rule') or 'not recorded'}",
            )
        )
    seconds = run.series("time/step_s")
    if len(seconds):
        rate = run.series("rollout/tokens_per_s")
        note = f"{run.num_steps} steps" + (f", {rate.values.mean():,.0f} sampled tokens/s" if len(rate) else "")
        made.append(Card("Training time", duration(float(seconds.values.sum())), note=note))
    return made


def duration(seconds: float) -> str:
    """``4 min 12 s``: the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _num_problems(run: RunData) -> str:
    counts = run.series("eval/problems")
    return f" on {int(counts.values[-1]):,} problems" if len(counts) else ""


def _effort(run: RunData) -> str:
    if not run.num_steps:
        return "no training step was logged"
    seconds = run.series("time/step_s")
    steps = "1 training step" if run.num_steps == 1 else f"{run.num_steps} training steps"
    return f"{steps} took {duration(float(seconds.values.sum()))}" if len(seconds) else f"{steps}, time not recorded"
