"""``forkrl study``: trains every arm with every seed, and compares the arms."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from forkrl.commands.options import StudyOptions
from forkrl.commands.study_given import study_of_runs
from forkrl.commands.study_runs import Places, expected_seconds, probe, read_records, train_missing
from forkrl.commands.work_folder import present
from forkrl.config.study import PlannedRun, StudyConfig, load_study
from forkrl.errors import UserError, notice
from forkrl.evaluation.study_tables import study_tables
from forkrl.report.formatting import duration
from forkrl.report.plots import standalone_svg
from forkrl.report.study_page import figures, study_headline, study_page
from forkrl.store.atomic import explained_write_errors, write_text
from forkrl.store.interruption import Interrupted
from forkrl.store.results import Results, command_line, write_results
from forkrl.store.run_folder import lock_folder, refuse_unusable
from forkrl.store.run_record import RunRecord

SCHEMA = "forkrl-study/1"


def run_study(options: StudyOptions) -> int:
    if options.study is None:
        return _compare_given(options)
    study, planned = load_study(options.study)
    in_place = options.study.stem == "study"
    name = options.study.parent.resolve().name if in_place else options.study.stem
    folder = options.out or (options.study.parent if in_place else Path("studies") / name)
    refuse_unusable(folder)
    places = Places(folder / "runs", options.runs_dir or Path("runs") / name)
    records = read_records(study, places, planned)
    if options.dry_run:
        print(describe_plan(study, planned, records, options.jobs))
        return 0
    failures: list[str] = []
    if len(records) < len(planned):
        with _locked(places):
            try:
                failures = train_missing(study, planned, places, options.jobs)
            except Interrupted as stop:
                notice(f"{stop}; finished runs are kept in {places.records}; the same command continues")
                return int(stop.exit_code)
        records = read_records(study, places, planned)
    missing = [run.name for run in planned if run.name not in records]
    notes = [f"{len(missing)} of {len(planned)} runs are missing: {', '.join(missing)}."] if missing else []
    try:
        again = [
            "forkrl",
            "study",
            str(options.study),
            "--out",
            f"studies/{name}-again",
            "--runs-dir",
            f"runs/{name}-again",
        ]
        results = write_study(study, list(records.values()), folder, shlex.join(again), [*failures, *notes])
    except UserError as error:
        if not failures:
            raise
        notice(str(error))
        return 1
    present(folder, study_page(results))
    return 1 if failures else 0


@contextmanager
def _locked(places: Places) -> Iterator[None]:
    """No other process trains the same study, or in the same run folders."""
    locks: list[int] = []
    try:
        for folder in (places.records, places.runs):
            with explained_write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            locks.append(lock_folder(folder, "running a study"))
        yield
    finally:
        for lock in locks:
            os.close(lock)


def _compare_given(options: StudyOptions) -> int:
    folder = options.out or Path("analyses") / "study"
    refuse_unusable(folder)
    study, records = study_of_runs(options.runs, options.metric or "eval/accuracy", options.baseline)
    only_seeds = any(not record.problems for record in records)
    notes = ["The scores of single problems are not known, so intervals cover seeds only."] if only_seeds else []
    results = write_study(study, records, folder, command_line(), notes)
    return present(folder, study_page(results))


def write_study(
    study: StudyConfig, records: Sequence[RunRecord], folder: Path, reproduce: str, notes: Sequence[str]
) -> Results:
    """Write the tables, results.json and figures from the records; ``reproduce``: a command that trains them again."""
    tables = {name: pd.DataFrame(rows) for name, rows in study_tables(study, records).items()}
    notes = [*notes, *_differing_origins(records), *_missing_scores(records)]
    with explained_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    results = write_results(
        folder,
        SCHEMA,
        settings={
            "title": study.title,
            "recipe": study.recipe,
            "baseline": study.baseline,
            "seeds": list(study.seeds),
            "settings": list(study.settings),
            "arms": {arm: " ".join(config.settings) or "as given" for arm, config in study.arms.items()},
            "paper": study.paper,
        },
        headline=study_headline(tables["arms"], study.baseline),
        notes=notes,
        facts={"reproduce": reproduce, "runs": len(records)},
        tables=tables,
    )
    for name, figure in figures(results).items():
        write_text(folder / f"{name}.svg", standalone_svg(figure))
    return results


def _differing_origins(records: Sequence[RunRecord]) -> list[str]:
    """Notes on what changes the responses that a seed gives, where runs differ in it."""
    notes = []
    for key in ("workers", "device", "torch", "transformers"):
        values = sorted({str(record.provenance[key]) for record in records if key in record.provenance})
        if len(values) > 1:
            notes.append(f"Runs differ in {key}: {', '.join(values)}.")
    return notes


def _missing_scores(records: Sequence[RunRecord]) -> list[str]:
    short = [each for each in records if each.scores and len(each.curves["eval/accuracy"][0]) > len(each.scores)]
    if not short:
        return []
    return [
        f"{len(short)} record{'s' * (len(short) > 1)} had room for the scores of the first and last evaluation only: "
        "differences at equal tokens and at equal time are left out."
    ]


def describe_plan(
    study: StudyConfig, planned: Sequence[PlannedRun], records: Mapping[str, RunRecord], jobs: int
) -> str:
    """The runs, how many are finished, and the time that the others take: judged by a finished run, or a short one."""
    lines = [f"{study.title}: {len(study.arms)} arms, {len(planned)} runs, {len(records)} of them finished"]
    for arm in study.arms:
        words = " ".join(study.arms[arm].settings) or "as the recipe"
        lines.append(f"  {arm}: {len(study.seeds_of(arm))} seeds; {words}")
    left = [run for run in planned if run.name not in records]
    if left:
        known = {record.arm: record for record in records.values()}
        source = "finished runs" if known else f"two steps of {planned[0].name}"
        other = next(iter(known.values()), None) or probe(planned[0], jobs)
        seconds = sum(expected_seconds(known.get(run.arm, other), run) for run in left)
        count, taken = ("1 run" if len(left) == 1 else f"{len(left)} runs"), duration(seconds / jobs)
        lines.append(f"to train: {count}, about {taken} with {jobs} at a time (from {source}; without measurements)")
    return "\n".join(lines)
