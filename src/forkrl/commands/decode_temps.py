"""``forkrl decode-temps``: a sweep of temperatures at forks and elsewhere (arXiv 2506.01939, eq. 5 and Fig. 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from forkrl.analysis.temperatures import FORK_FRACTION, UNSCALED, Setting, plan_settings, temperature_table
from forkrl.commands.options import DecodeTempsOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.session import Session, open_session, session_settings
from forkrl.commands.subject import Subject, open_subject
from forkrl.commands.sweep_responses import (
    first_responses,
    fork_threshold,
    read_figures,
    setting_path,
    stored_threshold,
    write_setting,
)
from forkrl.commands.work_folder import model_settings, open_work_folder, present, say_kept
from forkrl.errors import UserError
from forkrl.report.fork_view import Frame, ShownPrompt, ShownResponse, View
from forkrl.report.formatting import sentence, unverified
from forkrl.report.page import Page
from forkrl.report.progress import progress
from forkrl.report.remaining import SamplingTime
from forkrl.report.temps_page import headline, telling_temperatures, temps_page
from forkrl.rollout.fork_temperature import ForkTemperature
from forkrl.rollout.held_out import evaluation_generator, evaluation_sampling, sample_and_score
from forkrl.rollout.scoring import none_judged
from forkrl.store.results import Results, write_results
from forkrl.types import Prompt, RolloutGroup

SCHEMA = "forkrl-decode-temps/2"
_SHOWN_PROMPTS = 12


def run_decode_temps(options: DecodeTempsOptions) -> int:
    results = decode_temps(options)
    return present(results.folder, make_page(results))


def decode_temps(options: DecodeTempsOptions) -> Results:
    """Sample every missing setting with the same prompts and random numbers, then summarise."""
    temperatures = parse_temperatures(options.temperatures)
    subject = open_subject(options)
    samples, settings = subject.config.eval.samples, plan_settings(temperatures, subject.config.eval.temperature)
    with open_session(subject) as session:
        if session.verifier is None:
            raise UserError(f"{session.task.name}: its rows have no answers, so accuracy cannot be measured")
        recorded = _settings(subject, session, settings, samples, options.threshold)
        out = options.out or parse_reference(options.model).default_folder("decode-temps")
        with open_work_folder(out, recorded) as folder:
            _sample_missing(folder / "responses", settings, session, samples, options.threshold)
            first_failures = session.verifier.first_failures
            return _summarise(folder, settings, recorded, first_failures)


def parse_temperatures(text: str) -> tuple[float, ...]:
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


def _settings(
    subject: Subject, session: Session, settings: Sequence[Setting], num_samples: int, threshold: float | None
) -> dict[str, Any]:
    return {
        **model_settings(SCHEMA, subject),
        **session_settings(session),
        "prompts": len(session.prompts),
        "samples": num_samples,
        "temperatures": sorted({setting.high for setting in settings}),
        "threshold": threshold,
        # Batching decides which random numbers each sequence gets.
        "rollout.max_sequences": session.config.rollout.max_sequences,
        "runtime.workers": session.workers.count,
        "device": session.policy.device.type,
    }


def _sample_missing(
    folder: Path, settings: Sequence[Setting], session: Session, num_samples: int, threshold: float | None
) -> None:
    """Sample and judge missing settings; each is written before the next starts."""
    waves, missing = session.waves(num_samples), [each for each in settings if not setting_path(folder, each).exists()]
    say_kept(len(settings) - len(missing), len(settings), "settings", folder.parent)
    if settings[0] not in missing:
        threshold = stored_threshold(folder, settings[0])
    steps = [(setting, index) for setting in missing for index in range(len(waves))]
    groups: list[RolloutGroup] = []
    total = num_samples * sum(len(waves[index]) for _, index in steps)
    left = SamplingTime(session.workers, total, session.engine.wave_sequences)
    for setting, index in progress(steps, "sampling", total=total, finished=left.finished, seconds_left=left):
        if index == 0:
            groups, generator = [], evaluation_generator(session.config.seed, session.policy.device)
        groups += _sample(session, waves[index], setting, num_samples, threshold, generator)
        if index == len(waves) - 1:
            if threshold is None:
                threshold = fork_threshold(groups)
            write_setting(folder, setting, groups, threshold, session.policy.tokenizer)


def _sample(
    session: Session,
    prompts: Sequence[Prompt],
    setting: Setting,
    num_samples: int,
    threshold: float | None,
    generator: torch.Generator,
) -> list[RolloutGroup]:
    assert session.verifier is not None
    sampling = evaluation_sampling(session.config, 1.0, session.policy)
    if setting != UNSCALED:
        assert threshold is not None or setting.high == setting.low, "the baseline comes first; it needs no threshold"
        sampling = replace(sampling, fork_temperature=ForkTemperature(*setting, threshold or 0.0))
    return sample_and_score(
        session.engine, session.verifier, prompts, group_size=num_samples, sampling=sampling, generator=generator
    )


def _summarise(
    folder: Path, settings: Sequence[Setting], recorded: dict[str, Any], first_failures: dict[str, str]
) -> Results:
    base = recorded["temperature"]
    table = temperature_table(read_figures(folder / "responses", settings), base)
    failures = int(table["failures"].sum())
    unjudged = none_judged(failures, int((table["prompts"] * table["samples"]).sum()), first_failures)
    estimated = recorded["threshold"] is None
    return write_results(
        folder,
        SCHEMA,
        settings=recorded,
        headline=sentence(unjudged) if unjudged else headline(table, base),
        notes=unverified(failures, "responses"),
        facts={
            "threshold": stored_threshold(folder / "responses", settings[0]),
            "threshold_is": f"{100 * FORK_FRACTION:.0f}th percentile at temperature {base:g}" if estimated else "given",
        },
        tables={"settings": table},
    )


def make_page(results: Results) -> Page:
    """The figures, and responses at the baseline and at each temperature in the headline."""
    base, table = results.settings["temperature"], results.tables["settings"]
    telling = telling_temperatures(table, base)
    pairs = {f"{value:g}": (Setting(value, base), Setting(base, value)) for value in telling}
    tabs = {**pairs, f"{base:g}": (Setting(base, base),)}
    views = [
        View(f"Temperature {value}", _note(value, f"{base:g}"), [Frame("", _shown(results.folder, settings))])
        for value, settings in tabs.items()
    ]
    return temps_page(results, views)


def _note(value: str, base: str) -> str:
    left, right = f"{value} at forks, {base} elsewhere", f"{base} at forks, {value} elsewhere"
    where = "" if value == base else f"Left: {left}; right: {right}. "
    return f"{where}The first prompts, the first response to each: none was picked for its looks."


def _shown(folder: Path, settings: Sequence[Setting]) -> list[ShownPrompt]:
    frames = [first_responses(folder / "responses", each, _SHOWN_PROMPTS).to_dict("records") for each in settings]
    return [
        ShownPrompt(
            rows[0]["prompt_text"], _outcome([row["score"] > 0.5 for row in rows]), list(map(_shown_response, rows))
        )
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
