"""Tokens for ``analyze`` and ``drift``: sampled or given responses, measured part by part.

Each part is ``tokens/part-NNNNN.parquet``, then ``responses/part-NNNNN.parquet``, whose presence marks it done. The
split into parts does not depend on interruptions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from forkrl.analysis import TOKEN_SCHEMA
from forkrl.analysis.measure import SourceResponse, Written, measure_responses, num_tokens, token_rows
from forkrl.analysis.token_table import TOP
from forkrl.commands.options import AnalyzeOptions, DriftOptions
from forkrl.commands.ready_responses import ReadyResponses
from forkrl.commands.session import Session, open_session, part_seed, session_settings
from forkrl.commands.subject import ALLOW_UNKNOWN, Subject, open_subject
from forkrl.commands.work_folder import open_work_folder, say_kept, stored_settings
from forkrl.errors import UserError, notice
from forkrl.model.policy import open_policy
from forkrl.model.token_texts import TokenTexts
from forkrl.parallel.workers import Workers, open_workers
from forkrl.report.progress import counting
from forkrl.report.remaining import MEASURING, MEASURING_COST, SAMPLING, PartWork
from forkrl.rollout.held_out import evaluation_sampling
from forkrl.rollout.scoring import score_groups
from forkrl.store.parquet import part_path, part_paths, reading_parquet, writing_parquet
from forkrl.store.run_folder import encodable_text
from forkrl.types import Prompt

RESPONSE_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.int32(), nullable=False),  # index, from 0
        pa.field("sample", pa.int32(), nullable=False),  # index among the responses to the prompt, from 0
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("finished", pa.bool_()),  # null if unknown
        pa.field("correct", pa.bool_()),  # null if not judged
        pa.field("failure", pa.string(), nullable=False),  # why the verifier could not judge
    ]
)
GROUP_TOKENS = 1 << 16
"""Tokens per row group: bounds memory when reading and writing, unless one response is longer."""


def open_response_subject(options: AnalyzeOptions | DriftOptions) -> Subject:
    """The model and its settings; rejects options without effect."""
    if options.responses is not None:
        given = [f"--{name}" for name in ("problems", "samples", "engine") if getattr(options, name) is not None]
        unread = ("task.", "rollout.", "reward.", "eval.problems", "eval.samples", "seed")
        given += [
            override
            for override in options.all_overrides
            if override.startswith(unread) and override.partition("=")[0].strip() != ALLOW_UNKNOWN
        ]
        if given:
            what = f"--responses {options.responses}"
            raise UserError(f"{given[0]}: has no effect along with {what}: nothing is generated")
    elif options.skip_unusable:
        raise UserError("--skip-unusable: has no effect without --responses")
    return open_subject(options)


def entropy_temperature(subject: Subject) -> float:
    """Temperature at which entropies are measured: 1 for greedy responses."""
    return subject.config.eval.temperature or 1.0


def collect_tokens(
    folder: Path, subject: Subject, options: AnalyzeOptions | DriftOptions, settings: Mapping[str, Any]
) -> list[str]:
    """Fill ``tokens/`` and ``responses/``; adds the sampling settings to ``settings``. Returns notes on omissions."""
    if options.responses is not None:
        return _measure_ready(folder, subject, options.responses, options.skip_unusable, settings)
    samples = subject.config.eval.samples
    with open_session(subject) as session:
        asked = {
            **settings,
            **session_settings(session),
            "prompts": len(session.prompts),
            "samples": samples,
            # Keep an earlier call's part size: it decides which responses share a generator, and the number of
            # workers may have changed.
            "prompts_per_part": stored_settings(folder).get("prompts_per_part")
            or max(session.engine.wave_sequences // samples, 1),
        }
        with open_work_folder(folder, asked):
            source = GeneratedResponses(session, samples, asked["prompts_per_part"])
            write_missing_parts(folder, source, session.workers, entropy_temperature(subject))
    return []


def _measure_ready(
    folder: Path, subject: Subject, responses: Path, skip_unusable: bool, settings: Mapping[str, Any]
) -> list[str]:
    config = subject.config
    policy = open_policy(config.model, config.runtime.device)
    parts = config.task.parts or (config.task,)
    source = ReadyResponses(
        responses,
        policy,
        skip_unusable=skip_unusable,
        templated=subject.run is not None and all(part.chat_template for part in parts),
        allow_unknown=config.task.allow_unknown_tokens,
    )
    with ExitStack() as stack:
        asked = {**settings, "responses": str(responses), "data": source.fingerprint}
        stack.enter_context(open_work_folder(folder, asked))
        workers = stack.enter_context(open_workers(policy, None, config.runtime))
        write_missing_parts(folder, source, workers, entropy_temperature(subject))
    if not source.skipped.count:
        return []
    sentence = f"{source.skipped.count} rows of {responses.name} could not be used and are left out"
    notice(f"{sentence}:\n{source.skipped.listing()}")
    return [f"{sentence}; {source.skipped.first}"]


class ResponseSource(Protocol):
    num_parts: int
    wave: int
    """Responses sampled at once; 0: they are given."""

    def part(self, index: int) -> list[SourceResponse]:
        """Responses of a part, ordered by prompt; deterministic."""
        ...

    def num_responses(self, index: int) -> int: ...


class GeneratedResponses:
    """``num_samples`` responses per prompt of the session; each part has a generator seeded by seed and part number."""

    def __init__(self, session: Session, num_samples: int, prompts_per_part: int) -> None:
        self._session, self.wave = session, session.engine.wave_sequences
        self._num_samples = num_samples
        self._sampling = evaluation_sampling(session.config, session.config.eval.temperature, session.policy)
        self._prompts_per_part = prompts_per_part
        self.num_parts = -(-len(session.prompts) // prompts_per_part)

    def num_responses(self, index: int) -> int:
        return len(self._prompts(index)) * self._num_samples

    def _prompts(self, index: int) -> Sequence[Prompt]:
        return self._session.prompts[index * self._prompts_per_part :][: self._prompts_per_part]

    def part(self, index: int) -> list[SourceResponse]:
        start, prompts = index * self._prompts_per_part, self._prompts(index)
        seed = part_seed("responses", self._session.config.seed, index)
        generator = torch.Generator(self._session.policy.device).manual_seed(seed)
        groups = self._session.engine.generate(
            prompts, group_size=self._num_samples, sampling=self._sampling, generator=generator
        )
        if self._session.verifier is not None:
            groups = score_groups(groups, self._session.verifier)
        return [
            SourceResponse(
                prompt_id=group.prompt.id,
                prompt=start + place,
                prompt_text=group.prompt.text,
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
    tables = ("tokens", "responses")
    for table in tables:
        (folder / table).mkdir(exist_ok=True)
    missing = [
        index
        for index in range(source.num_parts)
        if not all(part_path(folder / table, index).exists() for table in tables)
    ]
    say_kept(source.num_parts - len(missing), source.num_parts, "parts", folder)
    costs = {SAMPLING: 1.0, MEASURING: MEASURING_COST} if source.wave else {MEASURING: 1.0}
    work = PartWork(workers, sum(map(source.num_responses, missing)), costs)
    with counting(lambda: work.stage, work.total, work.finished, work.seconds_left):
        for index in missing:
            size = source.num_responses(index)
            with work.part(size):
                with work.sampling(SAMPLING, size, source.wave) if source.wave else nullcontext():
                    responses = source.part(index)
                with work.measuring(num_tokens(response.written for response in responses)):
                    _measure_part(folder, index, responses, workers, temperature)


def _measure_part(
    folder: Path, index: int, responses: Sequence[SourceResponse], workers: Workers, temperature: float
) -> None:
    texts = TokenTexts(workers.policy.tokenizer)
    with writing_parquet(part_path(folder / "tokens", index), TOKEN_SCHEMA) as writer:
        for group in _groups(responses):
            written = [response.written for response in group]
            details = measure_responses(workers, written, temperature=temperature, top=TOP)
            writer.write_table(token_rows(group, details, texts))
    with writing_parquet(part_path(folder / "responses", index), RESPONSE_SCHEMA) as writer:
        writer.write_table(_response_rows(responses))


def read_responses(
    folder: Path, columns: Sequence[str] | None = None, prompts: Collection[int] | None = None
) -> pd.DataFrame:
    """The table of responses, optionally restricted to columns and prompts."""
    chosen = None if prompts is None else [("prompt", "in", list(prompts))]
    names = None if columns is None else list(columns)
    frames = []
    for path in part_paths(folder / "responses"):
        with reading_parquet(path):
            frames.append(pq.read_table(path, columns=names, filters=chosen).to_pandas())
    return pd.concat(frames, ignore_index=True)


def _groups(responses: Sequence[SourceResponse]) -> Iterator[list[SourceResponse]]:
    """Consecutive responses with at most ``GROUP_TOKENS`` tokens in total, at least one response."""
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
            "prompt": response.prompt,
            "sample": response.sample,
            "prompt_text": encodable_text(response.prompt_text),
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
