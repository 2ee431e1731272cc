"""Responses and their tokens on disk, part by part: ``tokens/part-00000.parquet`` and ``responses/part-00000.parquet``.

A part is done when its file in ``responses/`` is there: it is written last. Responses are generated, or read from a
file of the user's; either way the source cuts them into parts that do not depend on how often the work was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from forkrl.analysis import TOKEN_SCHEMA
from forkrl.analysis.token_pass import Written, measure_responses
from forkrl.analysis.token_rows import SourceResponse, token_rows
from forkrl.analysis.token_table import TOP, part_paths, reading_parquet
from forkrl.commands.runner import say_kept
from forkrl.commands.session import Session
from forkrl.model.token_texts import TokenTexts
from forkrl.parallel.workers import Workers
from forkrl.report.progress import progress
from forkrl.rollout.held_out import evaluation_sampling
from forkrl.rollout.scoring import score_groups
from forkrl.store.atomic import explained_write_errors, fsync, temporary_beside
from forkrl.store.run_folder import encodable_text

RESPONSE_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),  # of the prompt, from 0; "prompt" in the table of tokens
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("finished", pa.bool_()),  # null where nobody knows
        pa.field("correct", pa.bool_()),  # null where nothing judged
        pa.field("failure", pa.string(), nullable=False),  # why a verifier could not judge
    ]
)
GROUP_TOKENS = 1 << 16
"""Tokens of a row group: memory in reading and writing is bounded by it, or by the longest response."""


class ResponseSource(Protocol):
    """Where responses come from, in parts of a fixed cut."""

    num_parts: int

    def part(self, index: int) -> list[SourceResponse]:
        """The responses of a part, ordered by prompt; the same whenever it is asked for."""
        ...


class GeneratedResponses:
    """``num_samples`` responses to each of the session's prompts, a batch of the engine at a time.

    Every part draws from a generator of its own, seeded by the recipe's seed and the part's number.
    """

    def __init__(self, session: Session, num_samples: int, temperature: float, prompts_per_part: int) -> None:
        self._session = session
        self._num_samples = num_samples
        self._sampling = evaluation_sampling(session.config, temperature, session.policy)
        self._prompts_per_part = prompts_per_part
        self.num_parts = -(-len(session.prompts) // prompts_per_part)

    def part(self, index: int) -> list[SourceResponse]:
        start = index * self._prompts_per_part
        prompts = self._session.prompts[start : start + self._prompts_per_part]
        digest = hashlib.sha256(f"responses/{self._session.config.seed}/{index}".encode()).digest()
        generator = torch.Generator(self._session.policy.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        groups = self._session.engine.generate(
            prompts, group_size=self._num_samples, sampling=self._sampling, generator=generator
        )
        if self._session.verifier is not None:
            groups = score_groups(groups, self._session.verifier)
        return [
            SourceResponse(
                prompt_id=group.prompt.id,
                prompt=group.prompt.text,
                number=start + place,
                sample=sample,
                text=rollout.text,
                written=Written(rollout.prompt_ids, rollout.response_ids),
                finished=rollout.finished,
                correct=group.results[sample].score == 1 if group.results else None,
                failure=group.results[sample].failure if group.results else "",
            )
            for place, group in enumerate(groups)
            for sample, rollout in enumerate(group.rollouts)
        ]


def write_missing_parts(folder: Path, source: ResponseSource, workers: Workers, temperature: float) -> None:
    """Measure and write the parts that are not there yet, with progress and time left."""
    tables = ("tokens", "responses")
    for table in tables:
        (folder / table).mkdir(exist_ok=True)
    missing = [
        index for index in range(source.num_parts) if not all(_path(folder, table, index).exists() for table in tables)
    ]
    say_kept(source.num_parts - len(missing), source.num_parts, "parts", folder)
    texts = TokenTexts(workers.policy.tokenizer)
    for index in progress(missing, "measuring tokens"):
        responses = source.part(index)
        with writing_parquet(_path(folder, "tokens", index), TOKEN_SCHEMA) as writer:
            for group in _groups(responses):
                written = [response.written for response in group]
                details = measure_responses(workers, written, temperature=temperature, top=TOP)
                writer.write_table(token_rows(group, details, texts))
        with writing_parquet(_path(folder, "responses", index), RESPONSE_SCHEMA) as writer:
            writer.write_table(_response_rows(responses))


def read_responses(
    folder: Path, columns: Sequence[str] | None = None, numbers: Collection[int] | None = None
) -> pd.DataFrame:
    """The table of responses: all of it, or some columns, or those to some prompts."""
    chosen = None if numbers is None else [("number", "in", list(numbers))]
    names = None if columns is None else list(columns)
    frames = []
    for path in part_paths(folder / "responses"):
        with reading_parquet(path):
            frames.append(pq.read_table(path, columns=names, filters=chosen).to_pandas())
    return pd.concat(frames, ignore_index=True)


def _groups(responses: Sequence[SourceResponse]) -> Iterator[list[SourceResponse]]:
    """Consecutive responses of at most ``GROUP_TOKENS`` tokens together, at least one."""
    group: list[SourceResponse] = []
    size = 0
    for response in responses:
        length = len(response.written.response_ids)
        if group and size + length > GROUP_TOKENS:
            yield group
            group, size = [], 0
        group.append(response)
        size += length
    if group:
        yield group


def _response_rows(responses: Sequence[SourceResponse]) -> pa.Table:
    rows = [
        {
            "prompt_id": response.prompt_id,
            "prompt": encodable_text(response.prompt),
            "number": response.number,
            "sample": response.sample,
            "response": encodable_text(response.text),
            "prompt_token_ids": list(response.written.prompt_ids),
            "token_ids": list(response.written.response_ids),
            "finished": response.finished,
            "correct": response.correct,
            "failure": response.failure,
        }
        for response in responses
    ]
    return pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA)


def _path(folder: Path, table: str, index: int) -> Path:
    return folder / table / f"part-{index:05d}.parquet"


@contextmanager
def writing_parquet(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet writer whose file appears at ``path`` all at once, when everything is in it."""
    temporary = temporary_beside(path)
    with explained_write_errors(path):
        try:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                yield writer
            fsync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)
