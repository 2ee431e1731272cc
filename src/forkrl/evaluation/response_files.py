"""The files of one benchmark in an evaluation's folder: its questions, and responses and verdicts as they come.

A line is written whole or not at all, and what a kill or a power cut leaves of a last one is dropped, so that an
evaluation goes on from the response it had come to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from forkrl.atomic import explained_write_errors, fsync, write_text
from forkrl.errors import UserError
from forkrl.evaluation.responses import ScoredResponse
from forkrl.evaluation.samplers import Sampled, SampleRequest
from forkrl.tasks.json_lines import json_object
from forkrl.types import Prompt, Verdict

_SHOWN_ANSWER = 2000
"""Characters of an answer that are kept: the tests of a programming task are megabytes."""


class LineFile:
    """A file of JSON objects, one a line, that only grows.

    Args:
        path: the file; its folder is made.

    Raises:
        UserError: a line is damaged, or the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.ftruncate(self._descriptor, whole)
        lines = content[:whole].split(b"\n")[:-1]
        self.rows = [json_object(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            UserError: the disk is full or refuses; the part of the line that it took is taken back.
        """
        line = memoryview(json.dumps(row).encode("ascii") + b"\n")
        with explained_write_errors(self.path):
            end = os.fstat(self._descriptor).st_size
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except BaseException:
                os.ftruncate(self._descriptor, end)
                raise
        self.rows.append(dict(row))

    def close(self) -> None:
        """Wait until all lines are on the disk, and close the file."""
        with explained_write_errors(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            fsync(self.path.parent)


Key = tuple[str, int]


class BenchmarkFiles:
    """What is known of one benchmark so far: which responses there are, and which of them are judged.

    Args:
        folder: of the evaluation.
        name: of the benchmark; the files' names.
        prompts: its questions, as the model reads them.
        samples: responses to each.

    Raises:
        UserError: the folder holds responses to other questions, or a file is damaged.
    """

    def __init__(self, folder: Path, name: str, prompts: Sequence[Prompt], samples: int) -> None:
        self.prompts = prompts
        self.grid = [SampleRequest(prompt, sample) for prompt in prompts for sample in range(samples)]
        _require_questions(folder / "questions" / f"{name}.jsonl", prompts)
        self._responses = LineFile(folder / "responses" / f"{name}.jsonl")
        self._verdicts = LineFile(folder / "verdicts" / f"{name}.jsonl")

    def __enter__(self) -> BenchmarkFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._responses.close()
        self._verdicts.close()

    def missing(self) -> list[SampleRequest]:
        """Responses that are still to be sampled."""
        known = set(map(_key, self._responses.rows))
        return [request for request in self.grid if (request.prompt.id, request.sample) not in known]

    def unjudged(self) -> list[tuple[SampleRequest, str]]:
        """Responses without a verdict, and those whose verifier could not answer, with their texts."""
        judged = {key for key, row in self._latest_verdicts().items() if not row["failure"]}
        texts = {_key(row): row["text"] for row in self._responses.rows}
        return [
            (request, texts[key])
            for request in self.grid
            if (key := (request.prompt.id, request.sample)) in texts and key not in judged
        ]

    def add_response(self, sampled: Sampled) -> None:
        """Keep a response."""
        prompt, sample = sampled.request
        self._responses.append(
            {
                "question": prompt.id,
                "sample": sample,
                "text": sampled.text,
                "tokens": sampled.tokens,
                "finished": sampled.finished,
                "entropy": sampled.entropy,
            }
        )

    def add_verdict(self, request: SampleRequest, verdict: Verdict) -> None:
        """Keep a verdict."""
        self._verdicts.append(
            {
                "question": request.prompt.id,
                "sample": request.sample,
                "score": verdict.score,
                "failure": verdict.failure,
                "answer": verdict.answer,
            }
        )

    def scored(self) -> list[ScoredResponse]:
        """Every judged response, in the order of the questions."""
        responses = {_key(row): row for row in self._responses.rows}
        verdicts = self._latest_verdicts()
        keys = [(request.prompt.id, request.sample) for request in self.grid]
        return [
            ScoredResponse(**responses[key], **{name: verdicts[key][name] for name in ("score", "failure", "answer")})
            for key in keys
            if key in responses and key in verdicts
        ]

    def _latest_verdicts(self) -> dict[Key, dict[str, Any]]:
        return {_key(row): row for row in self._verdicts.rows}  # of several, the last


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
