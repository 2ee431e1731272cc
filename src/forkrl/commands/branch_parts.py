"""Branches on disk: ``parts/part-00000.parquet`` …, one row per response with all its branches.

A part covers a few prompts and has its own generator, seeded by the recipe's seed and the part number, so resuming
reproduces an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from forkrl.analysis.branching import choose_positions
from forkrl.analysis.measure import TokenDetails, Written, measure_responses, num_tokens
from forkrl.commands.session import Session, part_seed
from forkrl.model.stop_tokens import response_text
from forkrl.model.token_texts import TokenTexts
from forkrl.report.remaining import MEASURING, MEASURING_COST, SAMPLING, PartWork
from forkrl.rollout.embedded import Prefix, stop_tokens
from forkrl.rollout.held_out import evaluation_sampling, sample_and_score
from forkrl.store.parquet import part_path, reading_parquet, write_rows
from forkrl.store.run_folder import encodable_text
from forkrl.types import Prompt, Rollout, RolloutGroup, Verifier, VerifierResult

BRANCH = pa.struct(
    [
        pa.field("position", pa.int32(), nullable=False),  # in the response, from 0
        pa.field("kind", pa.string(), nullable=False),  # why it was chosen: "fork", "random" or "low"
        pa.field("entropy", pa.float32(), nullable=False),  # nats
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # 1: most likely
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("taken", pa.bool_(), nullable=False),  # by the response itself
        pa.field("exact", pa.bool_(), nullable=False),  # ends the response: judged once, nothing sampled
        pa.field("cut", pa.float32(), nullable=False),  # fraction of continuations that hit the length limit
        pa.field("length", pa.float32(), nullable=False),  # mean tokens of the complete response
        pa.field("failures", pa.int32(), nullable=False),  # continuations that could not be judged; they score 0
        pa.field("scores", pa.list_(pa.float32()), nullable=False),  # one per continuation
    ]
)
PART_SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.int32(), nullable=False),  # index, from 0
        pa.field("sample", pa.int32(), nullable=False),  # index among the responses to the prompt, from 0
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("tokens", pa.list_(pa.string()), nullable=False),
        pa.field("entropy", pa.list_(pa.float32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("finished", pa.bool_(), nullable=False),
        pa.field("branches", pa.list_(BRANCH), nullable=False),
    ]
)
CONTINUING = "continuing branches"
"""A stage, next to those of ``forkrl.report.remaining``."""
WAVES_PER_PART = 4
"""Minimum engine batches per part. The last batch is rarely full, and a kill loses at most one part."""


@dataclass(frozen=True, slots=True)
class Design:
    """Positions of each kind, alternatives per position and continuations per branch, all at one temperature."""

    responses: int
    forks: int
    random: int
    low: int
    alternatives: int
    continuations: int
    temperature: float

    @property
    def positions(self) -> int:
        """Positions per response, if it is long enough."""
        return self.forks + self.random + self.low

    @property
    def sequences_per_prompt(self) -> int:
        """Minimum, with no alternative ending the response. The token taken may add one branch per position."""
        return self.responses * self.positions * self.alternatives * self.continuations


class Try(NamedTuple):
    """A branch to continue: its response, its prefix, and the ``BRANCH`` columns known so far."""

    owner: int
    prompt: Prompt
    prefix: Prefix
    ends: bool
    stopped: bool
    facts: dict[str, Any]


def prompts_per_part(design: Design, wave_sequences: int) -> int:
    """Enough prompts to fill a few engine batches."""
    return max(1, -(-WAVES_PER_PART * wave_sequences // design.sequences_per_prompt))


def missing_parts(folder: Path, prompts: Sequence[Prompt], size: int) -> dict[int, Sequence[Prompt]]:
    """Missing parts with their prompts. A last part with too few prompts counts as missing."""
    parts = {start // size: prompts[start : start + size] for start in range(0, len(prompts), size)}
    return {index: part for index, part in parts.items() if not _holds(part_path(folder / "parts", index), part)}


def _holds(path: Path, prompts: Sequence[Prompt]) -> bool:
    """Whether the part exists and starts with these prompts."""
    if not path.exists():
        return False
    with reading_parquet(path):
        rows = pq.read_table(path, columns=["prompt", "prompt_id"]).to_pylist()
    found = {row["prompt"]: row["prompt_id"] for row in rows}
    return list(found.values())[: len(prompts)] == [encodable_text(prompt.id) for prompt in prompts]


def write_part(folder: Path, index: int, first: int, rows: Sequence[dict[str, Any]]) -> None:
    """Write a part atomically; its prompts are numbered from ``first``."""
    numbered = [row | {"prompt": first + row["prompt"]} for row in rows]
    write_rows(part_path(folder / "parts", index), numbered, PART_SCHEMA)


def read_parts(folder: Path, size: int, num_prompts: int) -> list[dict[str, Any]]:
    """Rows of the first ``num_prompts`` prompts, in order, from parts of ``size`` prompts."""
    paths = [part_path(folder / "parts", index) for index in range(-(-num_prompts // size))]
    rows = []
    for path in paths:
        with reading_parquet(path):
            rows += pq.read_table(path, schema=PART_SCHEMA).to_pylist()
    return [row for row in rows if row["prompt"] < num_prompts]


def branches_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """All branches as one table for ``forkrl.analysis.branching``, with all ``BRANCH`` columns."""
    place = ("prompt", "sample", "prompt_id")
    return pd.DataFrame([{name: row[name] for name in place} | branch for row in rows for branch in row["branches"]])


class PartSampler:
    def __init__(self, session: Session, verifier: Verifier, design: Design) -> None:
        self._session, self._verifier, self._design = session, verifier, design
        self._sampling = evaluation_sampling(session.config, design.temperature, session.policy)
        self._stops = stop_tokens(session.policy, self._sampling)
        self._texts = TokenTexts(session.policy.tokenizer)

    def work(self, num_prompts: int) -> PartWork:
        """How far the parts of ``num_prompts`` prompts are."""
        design = self._design
        branches = design.positions * design.alternatives * design.continuations  # about half a response each
        costs = {SAMPLING: 1.0, MEASURING: MEASURING_COST, CONTINUING: branches / 2}
        return PartWork(self._session.workers, num_prompts * design.responses, costs)

    def rows(self, part: int, prompts: Sequence[Prompt], work: PartWork) -> list[dict[str, Any]]:
        """Rows of ``PART_SCHEMA``, prompts numbered from 0; deterministic."""
        seed = part_seed("branches", self._session.config.seed, part)
        generator = torch.Generator(self._session.policy.device).manual_seed(seed)
        size = len(prompts) * self._design.responses
        with work.part(size):
            with work.sampling(SAMPLING, size, self._session.engine.wave_sequences):
                groups = sample_and_score(
                    self._session.engine, self._verifier, prompts,
                    group_size=self._design.responses, sampling=self._sampling, generator=generator,
                )  # fmt: skip
            rows = [row for number, group in enumerate(groups) for row in self._response_rows(number, group)]
            tries = self._tries(groups, np.random.default_rng(seed), work)
            for each, branch in zip(tries, self._try_all(tries, generator, work), strict=True):
                rows[each.owner]["branches"].append(each.facts | branch)
        return rows

    def _response_rows(self, number: int, group: RolloutGroup) -> list[dict[str, Any]]:
        return [
            {
                "prompt": number,
                "sample": place,
                "prompt_id": encodable_text(group.prompt.id),
                "prompt_text": encodable_text(group.prompt.text),
                "token_ids": list(rollout.response_ids),
                "tokens": [self._texts[token] for token in rollout.response_ids],
                "entropy": rollout.entropy.tolist(),
                "logprobs": rollout.logprobs.tolist(),
                "score": result.score,
                "finished": rollout.finished,
                "branches": [],
            }
            for place, (rollout, result) in enumerate(zip(group.rollouts, group.results, strict=True))
        ]

    def _tries(self, groups: Sequence[RolloutGroup], draws: np.random.Generator, work: PartWork) -> list[Try]:
        """All branches of all responses: the most likely tokens at the chosen positions, and the token taken."""
        design = self._design
        rollouts = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        written = [Written(rollout.prompt_ids, rollout.response_ids) for _, rollout in rollouts]
        with work.measuring(num_tokens(written)):
            details = measure_responses(
                self._session.workers, written, temperature=design.temperature, top=design.alternatives
            )
        tries = []
        for owner, ((prompt, rollout), detail) in enumerate(zip(rollouts, details, strict=True)):
            entropy = rollout.entropy.numpy()
            chosen = choose_positions(entropy, draws, forks=design.forks, random=design.random, low=design.low)
            for position, kind in zip(chosen["position"], chosen["kind"], strict=True):
                facts = {"position": int(position), "kind": kind, "entropy": float(entropy[position])}
                tries += self._tries_at(owner, prompt, rollout, candidates(rollout, detail, int(position)), facts)
        return tries

    def _tries_at(
        self,
        owner: int,
        prompt: Prompt,
        rollout: Rollout,
        tokens: dict[int, tuple[int, float]],
        facts: dict[str, Any],
    ) -> list[Try]:
        position, tries = facts["position"], []
        for token, (rank, probability) in tokens.items():
            prefix = Prefix(rollout.prompt_ids, (*rollout.response_ids[:position], token))
            stopped = token in self._stops
            more = {
                "token_id": token, "token": self._texts[token], "rank": rank, "probability": probability,
                "taken": token == rollout.response_ids[position],
            }  # fmt: skip
            ends = stopped or len(prefix.response_ids) == self._sampling.max_response_tokens
            tries.append(Try(owner, prompt, prefix, ends, stopped, facts | more))
        return tries

    def _try_all(self, tries: Sequence[Try], generator: torch.Generator, work: PartWork) -> list[dict[str, Any]]:
        """Continue and judge each branch and return its remaining ``BRANCH`` columns."""
        engine, count = self._session.engine, self._design.continuations
        prefixes = [each.prefix for each in tries if not each.ends]
        with work.sampling(CONTINUING, count * len(prefixes), engine.wave_sequences):
            continued = iter(engine.continue_from(prefixes, count=count, sampling=self._sampling, generator=generator))
        outcomes = [
            [(each.prefix.response_ids, each.stopped)]
            if each.ends
            else [(each.prefix.response_ids + more.response_ids, more.finished) for more in next(continued)]
            for each in tries
        ]
        items = [
            (each.prompt, response_text(self._session.policy.tokenizer, ids, finished=finished))
            for each, responses in zip(tries, outcomes, strict=True)
            for ids, finished in responses
        ]
        results = iter(self._verifier.verify(items))
        return [
            _outcome(each.ends, responses, [next(results) for _ in responses])
            for each, responses in zip(tries, outcomes, strict=True)
        ]


def candidates(rollout: Rollout, detail: TokenDetails, position: int) -> dict[int, tuple[int, float]]:
    """Rank and probability, by token id, of the most likely tokens at a position and of the token taken."""
    top = zip(detail.top_ids[position].tolist(), detail.top_probs[position].tolist(), strict=True)
    tokens = {token: (rank, probability) for rank, (token, probability) in enumerate(top, start=1)}
    taken = rollout.response_ids[position]
    if taken not in tokens:
        tokens[taken] = (int(detail.ranks[position]), float(detail.logprobs[position].exp()))
    return tokens


def _outcome(
    exact: bool, responses: Sequence[tuple[tuple[int, ...], bool]], results: Sequence[VerifierResult]
) -> dict[str, Any]:
    return {
        "exact": exact,
        "cut": sum(not finished for _, finished in responses) / len(responses),
        "length": sum(len(ids) for ids, _ in responses) / len(responses),
        "failures": sum(bool(result.failure) for result in results),
        "scores": [result.score for result in results],
    }
