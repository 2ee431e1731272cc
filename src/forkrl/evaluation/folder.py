"""A finished evaluation folder, read back: ``results.json`` and every response with its result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from forkrl.errors import UserError
from forkrl.evaluation.responses import ScoredResponse
from forkrl.report.progress import progress
from forkrl.tasks.json_lines import json_object, kind_of

SCHEMA = "forkrl-eval/2"
RESULTS = "results.json"
_NUMBER = (int, float)
_NOTHING = type(None)
Kinds = dict[str, tuple[type, ...]]
Key = tuple[str, int]
RESPONSE: Kinds = {
    "question": (str,), "sample": (int,), "text": (str,), "reasoning": (str,), "tokens": (int,), "finished": (bool,),
    "entropy": (*_NUMBER, _NOTHING),
}  # fmt: skip
SCORE: Kinds = {
    "question": (str,), "sample": (int,), "score": _NUMBER, "failure": (str,), "answer": (str, _NOTHING),
}  # fmt: skip
_QUESTION: Kinds = {"question": (str,), "prompt": (str,), "answer": (str,)}


def read_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, list[ScoredResponse]]]:
    """What ``forkrl eval`` left in a folder: its results, and by benchmark the responses that they are made of.

    Their texts are left out (``text`` is empty): they can be gigabytes. ``read_texts`` gives those that are wanted.
    """
    results = read_results(folder)
    scored = {}
    for benchmark in progress(results["benchmarks"], f"reading {folder.name}"):
        name = benchmark["name"]
        scored[name] = _scored_responses(folder, name)
        if len(scored[name]) != benchmark["questions"] * benchmark["samples"]:
            raise UserError(
                f"{folder}: {name} has {len(scored[name])} responses to {benchmark['questions']} questions, not "
                f"{benchmark['samples']} to each; {_how_to_finish(folder)}"
            )
    return results, scored


def read_results(folder: Path) -> dict[str, Any]:
    """``results.json`` of a folder."""
    path = folder / RESULTS
    if not path.is_file():
        if (folder / "settings.json").is_file() and (folder / "responses").is_dir():
            raise UserError(f"{folder}: this evaluation is not finished; {_how_to_finish(folder)}")
        raise UserError(f"{folder}: is no evaluation folder (no {RESULTS}); name one that forkrl eval --out wrote")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_how_to_finish(folder)}") from error
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: has schema {schema!r}, not {SCHEMA!r}; evaluate again with this version of ForkRL")
    return dict(results)


def unfinished_benchmarks(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """Names of benchmarks that have responses but no figures yet: results are written one benchmark at a time."""
    finished = {benchmark["name"] for benchmark in results["benchmarks"]}
    return sorted(path.stem for path in (folder / "responses").glob("*.jsonl") if path.stem not in finished)


def read_questions(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """By id: ``prompt`` and ``answer`` of every question of a benchmark; empty where they were not kept."""
    path = folder / "questions" / f"{name}.jsonl"
    if not path.is_file():
        return {}
    return {row["question"]: row for row in checked_rows(path, _QUESTION)}


def read_texts(folder: Path, name: str, wanted: Set[Key]) -> dict[Key, str]:
    """The texts of some responses to a benchmark, by question and sample, a server's separate reasoning in front."""
    rows = checked_rows(folder / "responses" / f"{name}.jsonl", RESPONSE)
    return {_key(row): _as_written(row) for row in rows if _key(row) in wanted}


def _as_written(row: dict[str, Any]) -> str:
    """What a person reads: ``text`` alone is what was judged."""
    return f"<think>{row['reasoning']}</think>{row['text']}" if row["reasoning"] else str(row["text"])


def _scored_responses(folder: Path, name: str) -> list[ScoredResponse]:
    """Each response with its last result: one that failed may have been judged again."""
    responses = _by_key(folder / "responses" / f"{name}.jsonl", RESPONSE)
    results = _by_key(folder / "scores" / f"{name}.jsonl", SCORE)
    if missing := [key for key in responses if key not in results]:
        question, sample = missing[0]
        raise UserError(
            f"{folder}: sample {sample} of question {question} of {name} has no result; {_how_to_finish(folder)}"
        )
    return [_scored(row, results[key]) for key, row in responses.items()]


def _scored(response: dict[str, Any], result: dict[str, Any]) -> ScoredResponse:
    return ScoredResponse(
        question=response["question"],
        sample=response["sample"],
        text="",
        tokens=response["tokens"],
        finished=response["finished"],
        entropy=response["entropy"],
        score=float(result["score"]),
        failure=result["failure"],
        answer=result["answer"],
    )


def _by_key(path: Path, kinds: Kinds) -> dict[Key, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: is missing; {_how_to_finish(path.parent.parent)}")
    return {_key(row): row | {"text": "", "reasoning": ""} for row in checked_rows(path, kinds)}


def _key(row: dict[str, Any]) -> Key:
    return row["question"], row["sample"]


def checked_rows(path: Path, kinds: Kinds) -> Iterator[dict[str, Any]]:
    """The objects in a JSONL file of an evaluation, each with the requested keys and kinds of values."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path} line {number}"
            try:
                row = json_object(line, place)
            except UserError as error:
                raise UserError(f"{error}; remove that line, then {_how_to_finish(path.parent.parent)}") from None
            for key, allowed in kinds.items():
                value = row.get(key)
                if type(value) not in allowed or (isinstance(value, float) and not math.isfinite(value)):
                    raise UserError(
                        f"{place}: {key} is {kind_of(value)}; remove that line, then "
                        f"{_how_to_finish(path.parent.parent)}"
                    )
            if not 0 <= row.get("score", 0) <= 1:
                raise UserError(f"{place}: score {row['score']} is not in [0, 1]; remove that line, then judge again")
            yield row


def _how_to_finish(folder: Path) -> str:
    return f"run its forkrl eval command again with --out {folder}, which samples and judges only what is missing"
