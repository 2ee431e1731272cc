"""``forkrl decode-temps``: one temperature at forks, another elsewhere, swept (arXiv 2506.01939, eq. 5 and Fig. 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl.analysis.temperatures import (
    FORK_FRACTION,
    LOOP_REPEATS,
    LOOP_TOKENS,
    UNSCALED,
    Setting,
    plan_settings,
    temperature_table,
)
from forkrl.commands.options import DecodeTempsOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.runner import open_work_folder, weights_fingerprint
from forkrl.commands.session import Session, graphs_fact, open_session
from forkrl.commands.subject import Subject, open_subject
from forkrl.commands.sweep_responses import SweepResponses, fork_threshold
from forkrl.errors import UserError
from forkrl.report.fork_view import Frame, ShownPrompt, ShownResponse, View
from forkrl.report.formatting import plain
from forkrl.report.page import write_page
from forkrl.report.progress import progress
from forkrl.report.temps_page import headline, sweep_rows, telling_temperatures, temps_page
from forkrl.rollout.fork_temperature import ForkTemperature
from forkrl.rollout.held_out import evaluation_generator, evaluation_sampling, sample_and_score
from forkrl.rollout.scoring import none_judged
from forkrl.store.atomic import write_json, write_text
from forkrl.store.provenance import describe_provenance
from forkrl.store.results import read_json
from forkrl.types import RolloutGroup

SCHEMA = "forkrl-decode-temps/1"
BROKEN_MEANS = (
    "Broken is a response that is cut at the limit, or ends in a loop (one block of tokens at least "
    f"{LOOP_REPEATS} times in a row, over at least {LOOP_TOKENS} tokens), or holds U+FFFD, which stands for bytes that "
    "are no text."
)
_SHOWN_PROBLEMS = 12
_FINGERPRINTS = ("schema", "weights", "data_fingerprint")


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a sweep found: its folder, the table of settings, the temperature and threshold (nats), and a sentence."""

    folder: Path
    table: pd.DataFrame
    temperature: float
    threshold: float
    headline: str
    page: Path


def run_decode_temps(options: DecodeTempsOptions) -> int:
    """``forkrl decode-temps``."""
    outcome = decode_temps(options)
    print(describe_outcome(outcome))
    print(f"report: {outcome.page}")
    return 0


def decode_temps(options: DecodeTempsOptions) -> Outcome:
    """Sample every setting that is not on disk yet, with the same problems and random numbers; summarise."""
    temperatures, threshold = parse_temperatures(options.temperatures), options.threshold
    subject = open_subject(options)
    samples, settings = subject.config.eval.samples, plan_settings(temperatures, subject.config.eval.temperature)
    with open_session(subject) as session:
        if session.verifier is None:
            raise UserError(f"{session.task.name}: its rows have no answers, so accuracy cannot be measured")
        question = _question(subject, session, settings, samples, threshold)
        out = options.out or parse_reference(options.model).default_folder("decode-temps")
        with open_work_folder(out, question) as folder:
            responses = SweepResponses(folder / "responses", settings)
            _sample_missing(responses, session, samples, threshold)
            return _summarise(folder, responses, session, question)


def parse_temperatures(text: str) -> tuple[float, ...]:
    """``0,0.3,1`` as numbers."""
    values: list[float] = []
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(
                f"--temperatures {text}: {word.strip()!r} is not a valid temperature; give numbers from 0 up: 0,0.3,2"
            )
        if value in values:
            raise UserError(f"--temperatures {text}: duplicate {value:g}")
        values.append(value)
    return tuple(values)


def describe_outcome(outcome: Outcome) -> str:
    """The figures as lines for a person."""
    table, lines = outcome.table, []
    unjudged = bool((table["failures"] == table["problems"] * table["samples"]).all())
    if unjudged:
        lines.append(outcome.headline)
    base, base_at = table.iloc[0], f"{outcome.temperature:g}"
    lines.append(
        f"threshold {outcome.threshold:.4f} nats; {base['forks']:.1%} of the tokens lie above it at temperature "
        f"{base_at}; {base['problems']:.0f} problems, {base['samples']:.0f} responses to each"
    )
    for varied, title in (("high", f"at forks, {base_at} elsewhere"), ("low", f"elsewhere, {base_at} at forks")):
        columns = f"{f'difference to {base_at}':>25}{'length':>9}{'broken':>8}{'surprise':>10}"
        lines.append(f"\n{'temperature ' + title:39}{columns}")
        lines += [_describe_row(row, varied) for _, row in sweep_rows(table, varied, outcome.temperature).iterrows()]
    return "\n".join(lines if unjudged else [*lines, "", outcome.headline])


def _describe_row(row: pd.Series, varied: str) -> str:
    accuracy = f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
    difference = f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
    if row["high"] == row["low"]:  # the baseline itself
        difference = ""
    rest = f"{row['length']:9.1f}{row['broken']:8.1%}{row['surprise']:10.3f}"
    return f"  {row[varied]:<6g}  accuracy {accuracy}{difference:>25}{rest}"


def _question(
    subject: Subject, session: Session, settings: Sequence[Setting], num_samples: int, threshold: float | None
) -> dict[str, Any]:
    """Whatever the numbers hang on: an answer to another question must not be mixed with this one's."""
    config = session.config
    return {
        "schema": SCHEMA,
        "model": subject.name,
        "checkpoint": subject.checkpoint,
        "model.revision": config.model.revision,
        "model.precision": config.model.precision,
        "weights": weights_fingerprint(config.model.path),
        "task": session.task.name,
        "verifier": {source: spec.path for source, spec in session.task.verifiers.items()},
        "data_fingerprint": session.task.fingerprint,
        "problems": len(session.prompts),
        "samples": num_samples,
        "temperature": settings[0].high,
        "temperatures": sorted({setting.high for setting in settings}),
        "threshold": threshold,
        "seed": config.seed,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "rollout.stop": list(config.rollout.stop),
        # How sequences are divided decides which random numbers each of them gets.
        "rollout.max_sequences": config.rollout.max_sequences,
        "runtime.workers": session.workers.count,
        "device": session.policy.device.type,
        **graphs_fact(config),
    }


def _sample_missing(responses: SweepResponses, session: Session, num_samples: int, threshold: float | None) -> None:
    """Sample and judge what is missing, setting by setting; each is on the disk before the next begins."""
    waves, missing = session.waves(num_samples), responses.missing
    if responses.settings[0] not in missing:
        threshold = responses.threshold()
    steps = [(setting, index) for setting in missing for index in range(len(waves))]
    groups: list[RolloutGroup] = []
    for setting, index in progress(steps, "sampling"):
        if index == 0:
            groups, generator = [], evaluation_generator(session.config.seed, session.policy.device)
        groups += _sample(session, waves[index], setting, num_samples, threshold, generator)
        if index == len(waves) - 1:
            if threshold is None:
                threshold = fork_threshold(groups)
            responses.write(setting, groups, threshold, session.policy.tokenizer)


def _sample(
    session: Session,
    prompts: Sequence[Any],
    setting: Setting,
    num_samples: int,
    threshold: float | None,
    generator: Any,
) -> list[RolloutGroup]:
    """One wave at one setting, with its results."""
    assert session.verifier is not None
    sampling = evaluation_sampling(session.config, 1.0, session.policy)
    if setting != UNSCALED:
        assert threshold is not None or setting.high == setting.low, "the baseline comes first; it needs no threshold"
        sampling = replace(sampling, fork_temperature=ForkTemperature(*setting, threshold or 0.0))
    return sample_and_score(
        session.engine, session.verifier, prompts, group_size=num_samples, sampling=sampling, generator=generator
    )


def _summarise(folder: Path, responses: SweepResponses, session: Session, question: dict[str, Any]) -> Outcome:
    """Table, JSON, CSV and page of a finished sweep."""
    base = responses.settings[0].high
    table = temperature_table(responses.figures(), base)
    responses_in_all = int((table["problems"] * table["samples"]).sum())
    failures = session.verifier.first_failures if session.verifier is not None else {}
    unjudged = none_judged(int(table["failures"].sum()), responses_in_all, failures)
    estimated = question["threshold"] is None
    figures = {
        "schema": SCHEMA,
        "question": question,
        "threshold": responses.threshold(),
        "threshold_origin": f"{100 * FORK_FRACTION:.0f}th percentile at temperature {base:g}" if estimated else "given",
        "provenance": describe_provenance(session.task, session.workers),
        "headline": f"{unjudged[0].upper()}{unjudged[1:]}." if unjudged else headline(table, base),
        "settings": table.to_dict("records"),
    }
    write_json(folder / "temperatures.json", figures)
    write_text(folder / "temperatures.csv", table.to_csv(index=False))
    page = write_temps_report(folder)
    return Outcome(folder, table, base, figures["threshold"], figures["headline"], page)


def write_temps_report(folder: Path) -> Path:
    """Write ``report.html`` of a finished sweep from its folder; its path."""
    figures = read_json(folder / "temperatures.json")
    question, provenance, base = figures["question"], figures["provenance"], figures["question"]["temperature"]
    responses = SweepResponses(folder / "responses", plan_settings(question["temperatures"], base))
    table = temperature_table(responses.figures(), base)
    shown = [(key, plain(value), False) for key, value in question.items() if key not in _FINGERPRINTS and value != ""]
    sources = provenance | {key: question[key] for key in _FINGERPRINTS}
    page = temps_page(
        table,
        figures["threshold"],
        figures["threshold_origin"],
        BROKEN_MEANS,
        base=base,
        views=_views(responses, table, base),
        name=str(question["model"]),
        headline=figures["headline"],
        settings=[("decode-temps", shown)],
        provenance=sorted((key, str(value)) for key, value in sources.items() if key != "command"),
        command=provenance["command"],
    )
    return write_page(folder / "report.html", page)


def _views(responses: SweepResponses, table: pd.DataFrame, base: float) -> list[View]:
    """One tab per temperature in the headline, with forks next to other tokens, and one for the baseline."""
    telling = telling_temperatures(table, base)
    pairs = {f"{value:g}": (Setting(value, base), Setting(base, value)) for value in telling}
    tabs = {**pairs, f"{base:g}": (Setting(base, base),)}
    return [
        View(f"Temperature {value}", _note(value, f"{base:g}"), [Frame("", _shown(responses, settings))])
        for value, settings in tabs.items()
    ]


def _note(value: str, base: str) -> str:
    left, right = f"{value} at forks, {base} elsewhere", f"{base} at forks, {value} elsewhere"
    where = "" if value == base else f"Left: {left}; right: {right}. "
    return f"{where}The first problems, the first response to each: none was picked for its looks."


def _shown(responses: SweepResponses, settings: Sequence[Setting]) -> list[ShownPrompt]:
    """The first problems with a response at each of one or two settings."""
    frames = [responses.first_responses(setting, _SHOWN_PROBLEMS).to_dict("records") for setting in settings]
    return [
        ShownPrompt(rows[0]["prompt"], _outcome([row["score"] > 0.5 for row in rows]), list(map(_shown_response, rows)))
        for rows in zip(*frames, strict=True)
    ]


def _outcome(right: Sequence[bool]) -> str:
    if len(right) == 1 or right[0] == right[-1]:
        return ("right" if right[0] else "wrong") + (" both times" if len(right) > 1 else "")
    return "right on the left" if right[0] else "right on the right"


def _shown_response(row: dict[Any, Any]) -> ShownResponse:
    return ShownResponse(
        label=f"{row['high']:g} at forks, {row['low']:g} elsewhere",
        tokens=list(row["tokens"]),
        entropy=[row["entropy"].tolist()],
        logprobs=row["logprobs"].tolist(),
        score=float(row["score"]),
        finished=not row["cut"],
    )
