"""The result of a training run: headline and cards of its page."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from forkrl.method.schedule import early_end
from forkrl.report.formatting import duration, is_clear, percent, points, probability
from forkrl.report.page import Card
from forkrl.report.run_data import RunData
from forkrl.stats.intervals import Estimate, mean_with_interval
from forkrl.stats.permutation import PairedTest, paired_test


class Comparison(NamedTuple):
    """First and last evaluation; ``problems`` is a phrase on their problems, to follow the numbers."""

    before: Estimate
    after: Estimate
    problems: str = ""
    result: PairedTest | str = ""
    """Paired test on the common problems, or the reason why they cannot be compared."""


def evaluations(run: RunData) -> dict[int, Estimate]:
    """Held-out accuracy by step; interval ends are NaN if not recorded."""
    names = [f"eval/accuracy{end}" for end in ("", "_low", "_high")]
    return {
        step: Estimate(*(row.get(name, math.nan) for name in names))
        for step, row in run.metrics.items()
        if "eval/accuracy" in row
    }


def comparison(run: RunData) -> Comparison:
    """Compare the last evaluation with the first on their common problems, unless sampling changed on a resume."""
    (first, before), *_, (last, after) = evaluations(run).items()
    if changes := run.sampling_changes(first, last):
        return Comparison(before, after, result=f"they were sampled in different ways ({'; '.join(changes)})")
    scores_before, scores_after = run.scores.get(first), run.scores.get(last)
    if scores_before is None or scores_after is None:
        return Comparison(before, after, result="the scores of each problem were not recorded")
    common = [problem for problem in scores_before if problem in scores_after]
    if not common:
        return Comparison(before, after, result="they are on different problems")
    rows = [np.array([scores[name] for name in common], dtype=np.float64) for scores in (scores_before, scores_after)]
    problems = _num_problems(run)
    if scores_before.keys() != scores_after.keys():
        problems = f" on the {len(common):,} problems that both evaluations have"
        before, after = map(mean_with_interval, rows)
    return Comparison(before, after, problems, paired_test(rows[0], rows[1]))


def headline(run: RunData) -> str:
    """One sentence: accuracy before and after, paired difference with p-value, problems, steps, wall time."""
    found, effort = evaluations(run), _effort(run)
    if not found:
        return f"Nothing was evaluated on held-out problems; {effort}."
    first, last = min(found), max(found)
    if unjudged := [str(step) for step in sorted({first, last}) if _nothing_was_judged(run, step)]:
        steps = " and ".join(unjudged)
        return f"The verifier judged no held-out response at step {steps}, so accuracy measures nothing; {effort}."
    if first == last:
        only = f"Held-out accuracy was {percent(found[first])} at step {first}{_num_problems(run)}"
        return f"{only}, and there is no second evaluation to compare; {effort}."
    before, after, problems, result = comparison(run)
    effort = effort[0].upper() + effort[1:]
    at_first, at_last = f"{percent(before)} at step {first}", f"{percent(after)} at step {last}"
    if isinstance(result, str):
        return f"Held-out accuracy was {at_first} and {at_last}; {result}, so they are not compared. {effort}."
    difference = f"{points(result.difference)} paired by problem, {probability(result.p)}"
    if is_clear(result.difference):
        change = f"{'rose' if after.mean > before.mean else 'fell'} from {at_first} to {at_last}"
        return f"Held-out accuracy {change}{problems}; {difference}. {effort}."
    change = f"was {at_first} and {at_last}"
    if percent(before) == percent(after):
        change = f"is unchanged at {percent(before)} from step {first} to step {last}"
    return f"Held-out accuracy {change}{problems}; {difference}: no clear change. {effort}."


def _nothing_was_judged(run: RunData, step: int) -> bool:
    row = run.metrics[step]
    responses = row.get("eval/problems", 0.0) * row.get("eval/samples", 1.0)
    return 0 < responses <= row.get("eval/verifier_failures", 0.0)


def status(run: RunData) -> str:
    if run.planned_steps is None or run.num_steps >= run.planned_steps:
        return ""
    patience, epochs = run.setting("eval.patience"), run.setting("training.epochs")
    early = early_end(
        list(run.metrics.values()),
        patience=patience if isinstance(patience, int) else 0,
        epochs=epochs if isinstance(epochs, int | float) else 0,
    )
    if early:
        return f"Stopped early at step {run.num_steps} of {run.planned_steps}: {early.reason}."
    return (
        f"This run stopped at step {run.num_steps} of {run.planned_steps}: it was interrupted, ended early, "
        "or is still running. The page shows what it wrote so far."
    )


def cards(run: RunData) -> list[Card]:
    """The recorded numbers under the headline."""
    found = evaluations(run)
    made: list[Card] = []
    if len(found) > 1:
        before, after, _, result = comparison(run)
        note = f"not compared: {result}" if isinstance(result, str) else points(result.difference)
        made.append(Card("Held-out accuracy", f"{after.mean:.1%}", f"{before.mean:.1%}", note))
    elif found:
        ((step, only),) = found.items()
        made.append(Card("Held-out accuracy", f"{only.mean:.1%}", note=f"only at step {step}"))
    for title, name, form, note in (
        ("Mean entropy", "entropy/mean", "{:.3f}", "nats per token, in training"),
        ("Response length", "response/length", "{:.1f}", "tokens, in training"),
    ):
        values = [form.format(value) for value in run.series(name).values]
        if values:
            made.append(Card(title, values[-1], values[0] if len(values) > 1 else "", note))
    kept = run.series("selection/kept_fraction").values
    if len(kept):
        rule = f"of response tokens, rule {run.setting('selection.rule') or 'not recorded'}"
        made.append(Card("Tokens trained on", f"{kept.mean():.1%}", note=rule))
    seconds, rate = run.series("time/step_s").values, run.series("rollout/tokens_per_s").values
    if len(seconds):
        note = f"{run.num_steps} steps" + (f", {rate.mean():,.0f} sampled tokens/s" if len(rate) else "")
        made.append(Card("Training time", duration(float(seconds.sum())), note=note))
    return made


def _num_problems(run: RunData) -> str:
    counts = run.series("eval/problems").values
    return f" on {int(counts[-1]):,} problems" if len(counts) else ""


def _effort(run: RunData) -> str:
    if not run.num_steps:
        return "no training step was logged"
    seconds = run.series("time/step_s").values
    steps = "1 training step" if run.num_steps == 1 else f"{run.num_steps} training steps"
    return f"{steps} took {duration(float(seconds.sum()))}" if len(seconds) else f"{steps}, time not recorded"
