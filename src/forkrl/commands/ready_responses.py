"""Existing responses: JSON lines with prompt and response, tokenised for the model that reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.analysis.measure import SourceResponse, Written, require_positions, response_token_ids
from forkrl.errors import UserError
from forkrl.model.policy import Policy
from forkrl.model.prompt_tokens import PromptCheck
from forkrl.report.progress import progress
from forkrl.store.run_folder import encodable_text
from forkrl.tasks.json_lines import BadRows, json_object, kind_of, require_characters
from forkrl.types import Prompt

PART_TOKENS = 1 << 14
"""Minimum tokens per part, the unit that an interruption can lose."""


class _Row(NamedTuple):
    place: str
    offset: int
    response: SourceResponse


class ReadyResponses:
    """The responses of a JSONL file, grouped by prompt in order of first appearance.

    A row has ``prompt`` (text, exactly as the model read it) and ``response`` (text), or ``token_ids`` where the text
    does not survive the tokenizer. Optional: ``correct`` (bool) or ``score`` (1 is correct), and ``prompt_id``. All
    rows are validated before any work starts; only their file offsets stay in memory.

    Args:
        skip_unusable: leave out and count unusable rows.
        templated: prompts come from a chat template, which already added special tokens.
        allow_unknown: accept prompts with characters unknown to the tokenizer.
    """

    wave = 0

    def __init__(
        self,
        path: Path,
        policy: Policy,
        *,
        skip_unusable: bool = False,
        templated: bool = False,
        allow_unknown: bool = False,
    ) -> None:
        self._path, self._policy = path, policy
        self._templated, self._allow_unknown = templated, allow_unknown
        self._check = PromptCheck(policy.tokenizer)
        self.skipped = BadRows()
        by_prompt: dict[tuple[str, str], list[tuple[int, int]]] = {}
        digest = hashlib.sha256()
        for row in progress(self._rows(), f"reading {path.name}"):
            length = len(row.response.written.response_ids)
            by_prompt.setdefault((row.response.prompt_id, row.response.prompt_text), []).append((row.offset, length))
            digest.update(repr((row.response.prompt_id, row.response.written, row.response.correct)).encode())
        self.fingerprint = digest.hexdigest()[:16]
        if not skip_unusable:
            total = self.skipped.count + sum(len(rows) for rows in by_prompt.values())
            self.skipped.require_none(str(path), total, "leave such rows out with --skip-unusable")
        if not by_prompt:
            reasons = f":\n{self.skipped.listing()}" if self.skipped.count else ""
            raise UserError(f"{path}: holds no response that can be used{reasons}")
        self._parts = _cut(by_prompt)
        self.num_parts = len(self._parts)

    def num_responses(self, index: int) -> int:
        return len(self._parts[index])

    def part(self, index: int) -> list[SourceResponse]:
        responses = []
        with self._path.open("rb") as file:
            for offset, number, sample in self._parts[index]:
                file.seek(offset)
                response = self._parse(file.readline(), f"{self._path.name} at byte {offset}")
                responses.append(response._replace(prompt=number, sample=sample))
        return responses

    def _rows(self) -> Iterator[_Row]:
        try:
            with self._path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    place = f"{self._path.name} line {number}"
                    try:
                        if line.strip():
                            yield _Row(place, offset, self._parse(line, place))
                    except UserError as error:
                        self.skipped.add(error)
                    offset += len(line)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from None

    def _parse(self, line: bytes, place: str) -> SourceResponse:
        values = json_object(line, place)
        prompt = values.get("prompt")
        if not isinstance(prompt, str):
            raise UserError(f"{place}: prompt is {kind_of(prompt)}, not text; give it exactly as the model read it")
        require_characters(prompt, "prompt", place)
        prompt_ids = self._check(
            Prompt("", prompt, "", place, templated=self._templated), allow_unknown=self._allow_unknown
        )
        response_ids, text = self._response(values, place)
        written = Written(prompt_ids, response_ids)
        require_positions(self._policy.model, written, place)
        given_id = values.get("prompt_id")
        return SourceResponse(
            prompt_id=encodable_text(str(given_id))
            if given_id is not None
            else hashlib.sha256(prompt.encode()).hexdigest()[:16],
            prompt=0,
            prompt_text=prompt,
            sample=0,
            text=text,
            written=written,
            finished=None,
            correct=_correct(values, place),
        )

    def _response(self, values: dict[str, Any], place: str) -> tuple[tuple[int, ...], str]:
        tokenizer, given = self._policy.tokenizer, values.get("token_ids")
        if given is not None:
            size = self._policy.head_weight.shape[0]
            if not isinstance(given, list) or not given or not all(type(i) is int and 0 <= i < size for i in given):
                raise UserError(f"{place}: token_ids is not a list of ids from 0 to {size - 1}, at least one")
            return tuple(given), str(tokenizer.decode(list(given)))
        text = values.get("response")
        if not isinstance(text, str):
            raise UserError(
                f"{place}: has no response (text) and no token_ids; it has {', '.join(values) or 'nothing'}"
            )
        if not text:
            raise UserError(f"{place}: response is empty; remove the row")
        require_characters(text, "response", place)
        return response_token_ids(tokenizer, text, place), text


def _cut(by_prompt: dict[tuple[str, str], list[tuple[int, int]]]) -> list[list[tuple[int, int, int]]]:
    """Parts of whole prompts: (offset, prompt number, sample) of each response."""
    parts: list[list[tuple[int, int, int]]] = [[]]
    size = 0
    for number, rows in enumerate(by_prompt.values()):
        tokens = sum(length for _, length in rows)
        if parts[-1] and size + tokens > PART_TOKENS:
            parts.append([])
            size = 0
        parts[-1] += [(offset, number, sample) for sample, (offset, _) in enumerate(rows)]
        size += tokens
    return parts


def _correct(values: dict[str, Any], place: str) -> bool | None:
    correct, score = values.get("correct"), values.get("score")
    if correct is not None:
        if not isinstance(correct, bool):
            raise UserError(f"{place}: correct = {correct!r} is neither true nor false")
        return correct
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise UserError(f"{place}: score = {score!r} is not a number from 0 to 1")
    return score == 1
