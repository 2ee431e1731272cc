"""What the run comes to: the sentence at the top of the page, and the figures beneath it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from forkrl.permutation import PairedTest, paired_test
from forkrl.report.difference import is_clear, probability, signed_points
from forkrl.report.page import Card
from forkrl.report.run_data import RunData


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


def paired_change(run: RunData) -> PairedTest | None:
    """The last evaluation against the first, problem by problem; None where their scores were not recorded."""
    found = evaluations(run)
    before, after = (run.scores.get(each.step) for each in (found[0], found[-1]))
    if before is None or after is None or before.keys() != after.keys():
        return None
    rows = [[scores[problem] for problem in before] for scores in (before, after)]
    return paired_test(np.array(rows[0], dtype=np.float64), np.array(rows[1], dtype=np.float64))


def verdict(run: RunData) -> str:
    """One sentence: accuracy before and after, their paired difference with p-value, problems, steps, wall time."""
    found = evaluations(run)
    if not found:
        return f"Nothing was evaluated on held-out problems; {_effort(run)}."
    problems = _num_problems(run)
    if len(found) == 1:
        only = f"Held-out accuracy was {found[0]} at step {found[0].step}{problems}"
        return f"{only}, and there is no second evaluation to compare; {_effort(run)}."
    before, after, test = found[0], found[-1], paired_change(run)
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
        test = paired_change(run)
        difference = found[-1].value - found[0].value
        change = signed_points(difference, math.nan, math.nan) if test is None else signed_points(*test.difference)
        made.append(Card("Held-out accuracy", f"{found[-1].value:.1%}", f"{found[0].value:.1%}", change))
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
