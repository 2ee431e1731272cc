"""The files of one benchmark in an evaluation's folder: its questions, and responses and results as they come.

A line is written whole or not at all, and what a kill or a power cut leaves of a last one is dropped, so that an
evaluation goes on from the response it had come to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from forkrl.errors import UserError
from forkrl.evaluation.folder import RESPONSE, SCORE, Key, Kinds, checked_rows
from forkrl.evaluation.responses import ScoredResponse
from forkrl.evaluation.samplers import Sampled, SampleRequest
from forkrl.store.atomic import explained_write_errors, fsync, write_text
from forkrl.types import Prompt, VerifierResult

_SHOWN_ANSWER = 2000
"""Characters of an answer that are kept: the tests of a programming task are megabytes."""
_BLOCK = 1 << 20
_UNJUDGED = {"failure": "not judged"}


class LineFile:
    """A file of JSON objects, one a line, that only grows.

    Args:
        path: the file; its folder is made, and half a last line is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._descriptor, _end_of_whole_lines(self._descriptor))

    def rows(self, kinds: Kinds) -> Iterator[dict[str, Any]]:
        """What the file holds, line by line; see ``checked_rows``."""
        return checked_rows(self.path, kinds)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line."""
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
        """Wait until all lines are on the disk, and close the file."""
        with explained_write_errors(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            fsync(self.path.parent)


def _end_of_whole_lines(descriptor: int) -> int:
    """Bytes up to the last line break."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - _BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class BenchmarkFiles:
    """What is known of one benchmark so far: which responses there are, and which of them are judged.

    Texts, which can be gigabytes, stay on the disk, but for those that are still to be judged.

    Args:
        folder: of the evaluation.
        name: of the benchmark; the files' names.
        prompts: its questions, as the model reads them.
        samples: responses to each.
    """

    def __init__(self, folder: Path, name: str, prompts: Sequence[Prompt], samples: int) -> None:
        self.grid = [SampleRequest(prompt, sample) for prompt in prompts for sample in range(samples)]
        _require_questions(folder / "questions" / f"{name}.jsonl", prompts)
        self._score_file = LineFile(folder / "scores" / f"{name}.jsonl")
        self._response_file = LineFile(folder / "responses" / f"{name}.jsonl")
        self._results = {_key(row): row for row in self._score_file.rows(SCORE)}  # of several, the last
        self._responses: dict[Key, dict[str, Any]] = {}
        self._texts: dict[Key, str] = {}
        for row in self._response_file.rows(RESPONSE):
            key, text = _key(row), row.pop("text")
            del row["reasoning"]
            self._responses[key] = row
            if self._results.get(key, _UNJUDGED)["failure"]:
                self._texts[key] = text

    def __enter__(self) -> BenchmarkFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._response_file.close()
        self._score_file.close()

    def missing(self) -> list[SampleRequest]:
        """Responses that are still to be sampled."""
        return [request for request in self.grid if (request.prompt.id, request.sample) not in self._responses]

    def unjudged(self) -> list[tuple[SampleRequest, str]]:
        """Responses that stood here without a result, or whose verifier could not answer, with their texts."""
        pairs = ((request, (request.prompt.id, request.sample)) for request in self.grid)
        return [(request, self._texts[key]) for request, key in pairs if key in self._texts]

    def add_response(self, sampled: Sampled) -> None:
        """Keep a response."""
        prompt, sample = sampled.request
        row = {
            "question": prompt.id,
            "sample": sample,
            "text": sampled.text,
            "reasoning": sampled.reasoning,
            "tokens": sampled.tokens,
            "finished": sampled.finished,
            "entropy": sampled.entropy,
        }
        self._response_file.append(row)
        del row["text"], row["reasoning"]
        self._responses[_key(row)] = row

    def add_result(self, request: SampleRequest, result: VerifierResult) -> None:
        """Keep a result."""
        row = {
            "question": request.prompt.id,
            "sample": request.sample,
            "score": result.score,
            "failure": result.failure,
            "answer": result.answer,
        }
        self._score_file.append(row)
        self._results[_key(row)] = row

    def scored(self) -> list[ScoredResponse]:
        """Every judged response, in the order of the questions, without its text."""
        keys = ((request.prompt.id, request.sample) for request in self.grid)
        return [
            ScoredResponse(**self._responses[key] | self._results[key], text="")
            for key in keys
            if key in self._responses and key in self._results
        ]


def _key(row: Mapping[str, Any]) -> Key:
    return row["question"], row["sample"]


def _require_questions(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write down the questions; where they are written already, they must be these."""
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
            f"{path}: the questions, or their prompts or answers, were others when this evaluation began; name another "
            f"folder with --out, or remove this one"
        )
