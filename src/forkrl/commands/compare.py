"""``forkrl compare``: two evaluations on the same questions, and how much better the second is."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import forkrl
from forkrl.commands.options import CompareOptions
from forkrl.errors import UserError
from forkrl.evaluation.comparison import compare
from forkrl.evaluation.folder import read_evaluation, read_questions, unfinished_benchmarks
from forkrl.report.compare_page import compare_headline, compare_page, mean_of, side_names
from forkrl.report.formatting import interval, percent, probability, shortened
from forkrl.report.page import write_page
from forkrl.report.plots import ellipsis
from forkrl.store.atomic import explained_write_errors, write_json
from forkrl.store.results import read_json

SCHEMA = "forkrl-compare/1"
COMPARISON = "comparison.json"
SHOWN_CHARACTERS = 300  # of a question
_STATED = ("model", "engine", "prompt_format", "samples", "temperature", "max_response_tokens", "seed")
_SHOULD_AGREE = ("engine", "prompt_format", "samples", "temperature", "max_response_tokens")


class Outcome(NamedTuple):
    """What was found, and the page that shows it."""

    comparison: dict[str, Any]
    page: Path


def run_compare(options: CompareOptions) -> int:
    """``forkrl compare``."""
    found = compare_evaluations(options)
    print(describe_comparison(found.comparison))
    print(f"report: {found.page}")
    return 0


def compare_evaluations(options: CompareOptions) -> Outcome:
    """Compare two evaluation folders, B minus A; writes ``comparison.json`` and ``report.html``."""
    folder_a, folder_b, seed = options.a, options.b, options.seed
    out = options.out or Path("analyses") / f"{folder_a.resolve().name}-vs-{folder_b.resolve().name}"
    _check_out(out)
    (results_a, scored_a), (results_b, scored_b) = read_evaluation(folder_a), read_evaluation(folder_b)
    sides = {
        "a": {"folder": str(folder_a), **_stated(results_a)},
        "b": {"folder": str(folder_b), **_stated(results_b)},
    }
    names = side_names(sides)
    found = compare(scored_a, scored_b, seed, names)
    titles = {each["name"]: each["title"] for each in results_a["benchmarks"]}
    comparison = {
        "schema": SCHEMA,
        **sides,
        "command": shlex.join(["forkrl", *sys.argv[1:]]),
        "version": forkrl.__version__,
        "seed": seed,
        "benchmarks": [
            {"name": row["name"], "title": titles[row["name"]], **row, "changes": _with_questions(folder_a, row)}
            for row in found["benchmarks"]
        ],
        "pooled": found["pooled"],
        "notices": [
            *_differences_of_setting(results_a, results_b, names),
            *_unfinished(folder_a, results_a),
            *_unfinished(folder_b, results_b),
            *found["notices"],
        ],
    }
    with explained_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / COMPARISON, comparison)
    return Outcome(comparison, write_compare_report(out))


def _with_questions(folder: Path, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions that changed most, each with its text."""
    questions = read_questions(folder, row["name"])
    return [
        {**change, "text": shortened(questions.get(change["question"], {}).get("prompt", ""), SHOWN_CHARACTERS)}
        for change in row["changes"]
    ]


def write_compare_report(folder: Path) -> Path:
    """Write ``report.html`` of a comparison from its ``comparison.json``; its path."""
    return write_page(folder / "report.html", compare_page(read_json(folder / COMPARISON)))


def describe_comparison(comparison: Mapping[str, Any]) -> str:
    """The comparison as a table for a person."""
    a, b = side_names(comparison)
    rows = [(row["title"], row) for row in comparison["benchmarks"]]
    if comparison["pooled"] is not None:
        rows.append(("mean", comparison["pooled"]))
    lines = [
        f"{b} ({comparison['b']['folder']}) minus {a} ({comparison['a']['folder']})",
        f"{'':16}{ellipsis(a, 14):>16}{ellipsis(b, 14):>16}  {'difference, points':24}{'p':>8}{'Holm':>8}  "
        f"{'at equal spending':24}{'tokens':>16}",
        *(_table_line(title, row) for title, row in rows),
        *(f"note: {notice}" for notice in comparison["notices"]),
    ]
    return "\n".join([*lines, compare_headline(comparison)])


def _table_line(title: str, row: Mapping[str, Any]) -> str:
    before, after = (mean_of(row["accuracy"][side]) for side in "ab")
    tokens = " → ".join(f"{mean_of(row['length'][side]):,.0f}" for side in "ab")
    p, adjusted = (
        probability(row[name]).removeprefix("p ").removeprefix("= ") if name in row else "" for name in ("p", "p_holm")
    )
    difference, matched = (
        percent(interval(row[name]["difference"]), unit="", sign="+") for name in ("accuracy", "length_matched")
    )
    return f"{title:16.16}{before:16.1%}{after:16.1%}  {difference:24}{p:>8}{adjusted:>8}  {matched:24}{tokens:>16}"


def _stated(results: Mapping[str, Any]) -> dict[str, Any]:
    return {key: results[key] for key in _STATED if key in results}


def _differences_of_setting(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> list[str]:
    """Sentences on what, besides the model, is not the same: it may be what makes the difference."""
    name_a, name_b = names
    notices = [
        f"{key} differs: {a.get(key)} for {name_a}, {b.get(key)} for {name_b}."
        for key in _SHOULD_AGREE
        if a.get(key) != b.get(key)
    ]
    entries = {each["name"]: each for each in b["benchmarks"]}
    for each in a["benchmarks"]:
        other = entries.get(each["name"], each)
        if each.get("fingerprint") != other.get("fingerprint"):
            notices.append(
                f"{each['name']}: the data differ (fingerprint {each.get('fingerprint')} for {name_a}, "
                f"{other.get('fingerprint')} for {name_b}); questions are matched by their ids."
            )
    return notices


def _unfinished(folder: Path, results: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {folder} has not finished it; left out. The command that began it goes on with it."
        for name in unfinished_benchmarks(folder, results)
    ]


def _check_out(out: Path) -> None:
    """Refuse a folder that holds something else; a comparison may be made again."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not _is_comparison(out):
        raise UserError(f"--out {out}: is not empty and holds no comparison; name another folder")


def _is_comparison(folder: Path) -> bool:
    try:
        stored = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and stored.get("schema") == SCHEMA
