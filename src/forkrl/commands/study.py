"""``forkrl study``: trains every arm with every seed, and compares the arms."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from forkrl.commands.options import StudyOptions
from forkrl.commands.study_given import study_of_runs
from forkrl.commands.study_runs import Places, expected_seconds, probe, read_records, train_missing
from forkrl.commands.work_folder import present
from forkrl.config.study import PlannedRun, StudyConfig, load_study
from forkrl.errors import notice
from forkrl.evaluation.study_tables import study_tables
from forkrl.report.formatting import duration
from forkrl.report.plots import standalone_svg
from forkrl.report.study_page import figures, study_headline, study_page
from forkrl.store.atomic import explained_write_errors, write_text
from forkrl.store.interruption import Interrupted
from forkrl.store.results import Results, write_results
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
    records = read_records(places, planned)
    if options.dry_run:
        print(describe_plan(study, planned, records, options.jobs))
        return 0
    failures: list[str] = []
    if len(records) < len(planned):
        with explained_write_errors(places.runs):
            places.runs.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(places.runs, "running this study")
        try:
            failures = train_missing(study, planned, places, options.jobs)
        except Interrupted as stop:
            notice(f"{stop}; finished runs are kept in {places.records}; the same command continues")
            return int(stop.exit_code)
        finally:
            os.close(lock)
        records = read_records(places, planned)
    missing = [run.name for run in planned if run.name not in records]
    notes = [
        *failures,
        *([f"{len(missing)} of {len(planned)} runs are missing: {', '.join(missing)}."] if missing else []),
    ]
    results = write_study(study, list(records.values()), folder, str(options.study), notes)
    present(folder, study_page(results))
    return 1 if failures else 0


def _compare_given(options: StudyOptions) -> int:
    folder = options.out or Path("analyses") / "study"
    refuse_unusable(folder)
    study, records = study_of_runs(options.runs, options.metric, options.baseline)
    only_seeds = any(not record.problems for record in records)
    notes = ["Scores of single problems are not known for every run: intervals cover seeds only."] if only_seeds else []
    results = write_study(study, records, folder, f"--runs {shlex.join(options.runs)}", notes)
    return present(folder, study_page(results))


def write_study(
    study: StudyConfig, records: Sequence[RunRecord], folder: Path, source: str, notes: Sequence[str]
) -> Results:
    """Write the tables, results.json and figures from the records; ``source``: the arguments of the command."""
    tables = {name: pd.DataFrame(rows) for name, rows in study_tables(study, records).items()}
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
            "arms": {arm: " ".join(config.settings) or "as the recipe" for arm, config in study.arms.items()},
            "paper": study.paper,
        },
        headline=study_headline(tables["arms"], study.baseline),
        notes=notes,
        facts={"reproduce": f"forkrl study {source}", "runs": len(records)},
        tables=tables,
    )
    for name, figure in figures(results).items():
        write_text(folder / f"{name}.svg", standalone_svg(figure))
    return results


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
        lines.append(
            f"to train: {len(left)} runs, about {duration(seconds / jobs)} with {jobs} at a time (from {source}; "
            f"measurements not included)"
        )
    return "\n".join(lines)
