"""``forkrl compare``: two evaluations on the same questions, B minus A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl.commands.options import CompareOptions
from forkrl.commands.work_folder import present
from forkrl.errors import UserError
from forkrl.evaluation.comparison import compare
from forkrl.evaluation.folder import read_evaluation, read_questions, unfinished_benchmarks
from forkrl.report.compare_page import Names, compare_headline, compare_page, side_names
from forkrl.report.formatting import shortened
from forkrl.store.atomic import explained_write_errors
from forkrl.store.results import RESULTS, TABLES, Results, write_results

SCHEMA = "forkrl-compare/2"
SHOWN_CHARACTERS = 300
_STATED = ("model", "engine", "prompt_format", "samples", "temperature", "max_response_tokens", "seed")
_SHOULD_AGREE = ("engine", "prompt_format", "samples", "temperature", "max_response_tokens")


def run_compare(options: CompareOptions) -> int:
    results = compare_evaluations(options)
    return present(results.folder, compare_page(results))


def compare_evaluations(options: CompareOptions) -> Results:
    out = options.out or Path("analyses") / f"{options.a.resolve().name}-vs-{options.b.resolve().name}"
    _require_usable(out)
    (results_a, scored_a), (results_b, scored_b) = read_evaluation(options.a), read_evaluation(options.b)
    side_a, side_b = (
        {"folder": str(folder), **{key: results.settings[key] for key in _STATED}}
        for folder, results in ((options.a, results_a), (options.b, results_b))
    )
    names = side_names(side_a, side_b)
    found = compare(scored_a, scored_b, options.seed, names)
    benchmarks = results_a.tables["benchmarks"]
    titles = dict(zip(benchmarks["benchmark"], benchmarks["title"], strict=True))
    for row in found.tables["benchmarks"]:
        row["title"] = titles[row["benchmark"]]
    questions = {
        name: read_questions(options.a, name) for name in {row["benchmark"] for row in found.tables["changes"]}
    }
    for row in found.tables["changes"]:
        row["text"] = shortened(
            questions[row["benchmark"]].get(row["question"], {}).get("prompt", ""), SHOWN_CHARACTERS
        )
    tables = {name: pd.DataFrame(rows) for name, rows in found.tables.items()}
    with explained_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    return write_results(
        out,
        SCHEMA,
        settings={"a": side_a, "b": side_b, "seed": options.seed},
        headline=compare_headline(tables, names),
        notes=[*_differences_of_setting(results_a, results_b, names), *_unfinished(results_a, results_b), *found.notes],
        facts={},
        tables=tables,
    )


def _differences_of_setting(a: Results, b: Results, names: Names) -> list[str]:
    """Notes on settings that differ besides the model: they may explain the difference."""
    name_a, name_b = names
    notes = [
        f"{key} differs: {a.settings[key]} for {name_a}, {b.settings[key]} for {name_b}."
        for key in _SHOULD_AGREE
        if a.settings[key] != b.settings[key]
    ]
    fingerprints_a, fingerprints_b = (
        dict(zip(each.tables["benchmarks"]["benchmark"], each.tables["benchmarks"]["fingerprint"], strict=True))
        for each in (a, b)
    )
    return notes + [
        f"{name}: the data differ (fingerprint {fingerprint} for {name_a}, {fingerprints_b[name]} for {name_b}); "
        f"questions are matched by their ids."
        for name, fingerprint in fingerprints_a.items()
        if fingerprints_b.get(name, fingerprint) != fingerprint
    ]


def _unfinished(*sides: Results) -> list[str]:
    return [
        f"{name}: {side.folder} has not finished it; left out. The command that began it resumes it."
        for side in sides
        for name in unfinished_benchmarks(side)
    ]


def _require_usable(out: Path) -> None:
    """Reject a folder with other contents; an existing comparison may be overwritten."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and not _is_comparison(out):
        interrupted = {TABLES} if not (out / RESULTS).exists() else set()  # tables are written first
        if any(entry.name not in interrupted for entry in out.iterdir()):
            raise UserError(f"--out {out}: is not empty and holds no comparison; name another folder")


def _is_comparison(folder: Path) -> bool:
    try:
        stored: Any = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and stored.get("schema") == SCHEMA
