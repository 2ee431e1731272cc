"""An evaluation folder: ``questions/``, ``responses/`` and ``scores/``, each with one ``NAME.jsonl`` per benchmark.

Lines are appended as responses finish and a partial last line is dropped, so an evaluation resumes at the response it
had reached. A response may have several scores; the last counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from forkrl.errors import UserError
from forkrl.evaluation.samplers import Key, Sampled, SampleRequest
from forkrl.store import results as store
from forkrl.store.atomic import explained_write_errors, fsync, write_text
from forkrl.store.results import RESULTS, Results
from forkrl.tasks.json_lines import json_object, kind_of
from forkrl.types import Prompt, VerifierResult

SCHEMA = "forkrl-eval/3"
_BLOCK = 1 << 20
_SHOWN_ANSWER = 2000  # characters kept of an answer: the tests of a programming task are megabytes
Kinds = dict[str, tuple[type, ...]]
_NUMBER, _NOTHING = (int, float), type(None)
RESPONSE: Kinds = {
    "question": (str,), "sample": (int,), "text": (str,), "reasoning": (str,), "tokens": (int,), "finished": (bool,),
    "entropy": (*_NUMBER, _NOTHING),
}  # fmt: skip
SCORE: Kinds = {
    "question": (str,), "sample": (int,), "score": _NUMBER, "failure": (str,), "answer": (str, _NOTHING),
}  # fmt: skip
QUESTION: Kinds = {"question": (str,), "prompt": (str,), "answer": (str,)}


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """One judged response; every statistic of an evaluation is computed from these.

    ``question``: id of the prompt. ``sample``: index of the response, from 0. ``tokens``: length. ``entropy``: mean in
    nats, None if the engine does not report it. ``failure``: empty if the verifier gave a result. ``answer``: the final
    answer it read; "" if it found none, None if it does not report it.
    """

    question: str
    sample: int
    tokens: int
    finished: bool
    entropy: float | None
    score: float
    failure: str
    answer: str | None


class LineFile:
    """An append-only JSONL file; a partial last line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._descriptor, self._end_of_whole_lines())

    def _end_of_whole_lines(self) -> int:
        """Bytes up to the last line break."""
        end = os.fstat(self._descriptor).st_size
        while end:
            start = max(0, end - _BLOCK)
            found = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    def append(self, row: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(row).encode("ascii") + b"\n")
        with explained_write_errors(self.path):
            end = os.fstat(self._descriptor).st_size
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except BaseException:
                os.ftruncate(self._descriptor, end)
                raise

    def close(self) -> None:
        """Flush to disk and close."""
        with explained_write_errors(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            fsync(self.path.parent)


class BenchmarkFiles:
    """Responses and results of a benchmark; texts can be gigabytes, so only unjudged ones are in memory."""

    def __init__(self, folder: Path, name: str, prompts: Sequence[Prompt], samples: int) -> None:
        self.grid = [SampleRequest(prompt, sample) for prompt in prompts for sample in range(samples)]
        _require_questions(folder / "questions" / f"{name}.jsonl", prompts)
        self._score_file = LineFile(folder / "scores" / f"{name}.jsonl")
        self._response_file = LineFile(folder / "responses" / f"{name}.jsonl")
        self._results = {_key(row): row for row in read_rows(self._score_file.path, SCORE)}
        self._responses: dict[Key, dict[str, Any]] = {}
        self._texts: dict[Key, str] = {}
        for row in read_rows(self._response_file.path, RESPONSE):
            key = _key(row)
            self._responses[key] = row
            if key not in self._results or self._results[key]["failure"]:
                self._texts[key] = row["text"]
            del row["text"], row["reasoning"]

    def __enter__(self) -> BenchmarkFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._response_file.close()
        self._score_file.close()

    def missing(self) -> list[SampleRequest]:
        """Responses still to be sampled."""
        return [request for request in self.grid if request.key not in self._responses]

    def unjudged(self) -> list[tuple[SampleRequest, str]]:
        """Responses found on disk without a result, or with a verifier failure, with their texts."""
        return [(request, self._texts[request.key]) for request in self.grid if request.key in self._texts]

    def add_response(self, sampled: Sampled) -> None:
        row = _row(sampled.request, sampled, RESPONSE)
        self._response_file.append(row)
        del row["text"], row["reasoning"]
        self._responses[_key(row)] = row

    def add_result(self, request: SampleRequest, result: VerifierResult) -> None:
        row = _row(request, result, SCORE)
        self._score_file.append(row)
        self._results[_key(row)] = row

    def scored(self) -> list[ScoredResponse]:
        """Every judged response, by question and sample."""
        known = self._responses.keys() & self._results.keys()
        return [_scored(self._responses[r.key], self._results[r.key]) for r in self.grid if r.key in known]


def _require_questions(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write the questions, or check that those on disk are the same."""
    rows = [
        {
            "question": prompt.id,
            "prompt": prompt.text,
            "answer": prompt.answer[:_SHOWN_ANSWER],
            "answer_sha256": hashlib.sha256(prompt.answer.encode()).hexdigest(),
        }
        for prompt in prompts
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists():
        with explained_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{path}: the questions, or their prompts or answers, have changed since this evaluation began; name "
            f"another folder with --out, or remove this one"
        )


def read_evaluation(folder: Path) -> tuple[Results, dict[str, list[ScoredResponse]]]:
    """The results of an evaluation folder, and the responses by benchmark."""
    from forkrl.report.progress import progress  # imports the plotting libraries

    results = read_results(folder)
    scored = {}
    for row in progress(results.tables["benchmarks"].to_dict("records"), f"reading {folder.name}"):
        name = row["benchmark"]
        scored[name] = _read_responses(folder, name)
        if len(scored[name]) != row["questions"] * row["samples"]:
            raise UserError(
                f"{folder}: {name} has {len(scored[name])} responses to {row['questions']} questions, not "
                f"{row['samples']} to each; {_how_to_finish(folder)}"
            )
    return results, scored


def read_results(folder: Path) -> Results:
    path = folder / RESULTS
    if not path.is_file():
        if (folder / "settings.json").is_file() and (folder / "responses").is_dir():
            raise UserError(f"{folder}: this evaluation is not finished; {_how_to_finish(folder)}")
        raise UserError(f"{folder}: is not an evaluation (no {RESULTS}); name a folder that forkrl eval --out wrote")
    schema = store.read_json(path).get("schema")
    if schema != SCHEMA:
        raise UserError(f"{path}: has schema {schema!r}, not {SCHEMA!r}; evaluate again with this version of ForkRL")
    return store.read_results(folder)


def unfinished_benchmarks(results: Results) -> list[str]:
    """Benchmarks with responses but no results: results are written one benchmark at a time."""
    finished = set(results.tables["benchmarks"]["benchmark"])
    return sorted(path.stem for path in (results.folder / "responses").glob("*.jsonl") if path.stem not in finished)


def read_questions(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """``prompt`` and ``answer`` of each question by id; empty if they were not stored."""
    path = folder / "questions" / f"{name}.jsonl"
    return {row["question"]: row for row in read_rows(path, QUESTION)} if path.is_file() else {}


def read_texts(folder: Path, name: str, wanted: Set[Key]) -> dict[Key, str]:
    """Texts of the ``wanted`` responses, preceded by a server's separate reasoning, which is not judged."""
    rows = read_rows(folder / "responses" / f"{name}.jsonl", RESPONSE)
    return {
        _key(row): f"<think>{row['reasoning']}</think>{row['text']}" if row["reasoning"] else row["text"]
        for row in rows
        if _key(row) in wanted
    }


def read_rows(path: Path, kinds: Kinds) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, validated to have the keys and types of ``kinds``."""
    remedy = f"remove that line, then {_how_to_finish(path.parent.parent)}"
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path} line {number}"
            try:
                row = json_object(line, place)
            except UserError as error:
                raise UserError(f"{error}; {remedy}") from None
            for key, allowed in kinds.items():
                value = row.get(key)
                if type(value) not in allowed or (isinstance(value, float) and not math.isfinite(value)):
                    raise UserError(f"{place}: {key} is {kind_of(value)}; {remedy}")
            if not 0 <= row.get("score", 0) <= 1:
                raise UserError(f"{place}: score {row['score']} is not in [0, 1]; {remedy}")
            yield row


def _read_responses(folder: Path, name: str) -> list[ScoredResponse]:
    """Each response with its last result: failed ones may have been judged again."""
    responses, results = (_by_key(folder, part, name) for part in ("responses", "scores"))
    if missing := [key for key in responses if key not in results]:
        question, sample = missing[0]
        raise UserError(
            f"{folder}: sample {sample} of question {question} of {name} has no result; {_how_to_finish(folder)}"
        )
    return [_scored(row, results[key]) for key, row in responses.items()]


def _by_key(folder: Path, part: str, name: str) -> dict[Key, dict[str, Any]]:
    """Rows of a file, the last per response, without texts."""
    path = folder / part / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: is missing; {_how_to_finish(folder)}")
    kinds = RESPONSE if part == "responses" else SCORE
    return {_key(row): row | {"text": "", "reasoning": ""} for row in read_rows(path, kinds)}


def _scored(response: Mapping[str, Any], result: Mapping[str, Any]) -> ScoredResponse:
    row = {**response, **result, "score": float(result["score"])}
    return ScoredResponse(**{name: row[name] for name in ScoredResponse.__slots__})


def _row(request: SampleRequest, found: Sampled | VerifierResult, kinds: Kinds) -> dict[str, Any]:
    """A row: the request's key, and the fields of ``found`` in ``kinds``."""
    key = dict(zip(("question", "sample"), request.key, strict=True))
    return key | {name: getattr(found, name) for name in kinds if name not in key}


def _key(row: Mapping[str, Any]) -> Key:
    return row["question"], row["sample"]


def _how_to_finish(folder: Path) -> str:
    return f"run its forkrl eval command again with --out {folder}, which samples and judges only what is missing"
