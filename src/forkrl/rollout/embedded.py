"""The embedded engine: batched sampling in this process from the weights being trained.

Shapes: ``P`` prompts, ``S`` sequences being decoded, ``T`` tokens, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from forkrl.errors import TrainingHalted, out_of_memory_names
from forkrl.model.policy import Policy, require_positions
from forkrl.model.prompt_tokens import prompt_token_ids
from forkrl.model.stop_tokens import response_text
from forkrl.parallel.processes import return_freed_memory
from forkrl.parallel.workers import Worker, Workers
from forkrl.rollout.flat_step import FlatStep, reproducible
from forkrl.rollout.growing_cache import build_cache, select_sequences
from forkrl.rollout.sampling import sample_tokens
from forkrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

COMPACT_FRACTION = 0.03
"""Share of finished sequences at which the batch is compacted; compaction copies parts of the cache."""


class Prefix(NamedTuple):
    """A prompt, and possibly the beginning of a response."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.response_ids


class Ended(NamedTuple):
    """A finished continuation: the index of its prefix, its number within the prefix, and the rollout."""

    prefix: int
    number: int
    rollout: Rollout


class EmbeddedEngine:
    """Samples from a ``Policy``; records fp32 log-prob and entropy of every token without a second pass.

    ``max_sequences`` is per worker; prompts longer than ``max_prompt_tokens`` are rejected.
    """

    def __init__(self, workers: Workers, *, max_prompt_tokens: int, max_sequences: int = 256) -> None:
        self.workers = workers
        self.policy = workers.policy
        self.max_prompt_tokens = max_prompt_tokens
        self.max_sequences = max_sequences

    @property
    def wave_sequences(self) -> int:
        """Sequences decoded at once by all workers."""
        return self.max_sequences * self.workers.count

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        sampling: SamplingParams,
        generator: torch.Generator,
        on_finished: Callable[[Prompt, Rollout], None] | None = None,
    ) -> list[RolloutGroup]:
        """Sample ``group_size`` responses per prompt, in prompt order; raises as ``stream``."""
        rollouts: list[dict[int, Rollout]] = [{} for _ in prompts]
        prefixes = [self.prefix(prompt) for prompt in prompts]
        for ended in self.stream(prefixes, count=group_size, sampling=sampling, generator=generator):
            rollouts[ended.prefix][ended.number] = ended.rollout
            if on_finished is not None:
                on_finished(prompts[ended.prefix], ended.rollout)
        return [RolloutGroup(prompt, _in_order(own)) for prompt, own in zip(prompts, rollouts, strict=True)]

    def continue_from(
        self, prefixes: Sequence[Prefix], *, count: int, sampling: SamplingParams, generator: torch.Generator
    ) -> list[tuple[Rollout, ...]]:
        """All continuations from ``stream``, in prefix order."""
        continued: list[dict[int, Rollout]] = [{} for _ in prefixes]
        for ended in self.stream(prefixes, count=count, sampling=sampling, generator=generator):
            continued[ended.prefix][ended.number] = ended.rollout
        return [_in_order(own) for own in continued]

    def stream(
        self, prefixes: Sequence[Prefix], *, count: int, sampling: SamplingParams, generator: torch.Generator
    ) -> Iterator[Ended]:
        """Sample ``count`` continuations per prefix; yield each when it ends (several workers: after its wave).

        The rollout's prompt is the whole prefix; ids, log-probs, entropy and text cover only new tokens. Prefix
        response and continuation together have at most ``sampling.max_response_tokens`` tokens. Waves are sorted by the
        length of the prefix response; each worker prefills a prefix once per wave. Raises UserError (too few
        positions), ValueError (no room for a token) or TrainingHalted (logits not finite, out of memory).
        """
        limit = sampling.max_response_tokens
        longest = max((len(prefix.prompt_ids) for prefix in prefixes), default=0)
        require_positions(self.policy.model.config, longest, limit)
        if any(len(prefix.response_ids) >= limit for prefix in prefixes):
            raise ValueError(f"a prefix holds a response of {limit} tokens or more, the limit: nothing can follow it")
        order = sorted(range(len(prefixes)), key=lambda index: len(prefixes[index].response_ids))
        owners = [(index, number) for index in order for number in range(count)]
        with out_of_memory_names("rollout.max_sequences", self.max_sequences):
            for start in range(0, len(owners), self.wave_sequences):
                wave = owners[start : start + self.wave_sequences]
                for place, rollout in self._decode_wave([prefixes[index] for index, _ in wave], sampling, generator):
                    yield Ended(*wave[place], rollout)

    def pass_over(self, num_sequences: int, generator: torch.Generator) -> None:
        """Advance ``generator`` past a wave of ``num_sequences`` without decoding it."""
        size = -(-num_sequences // self.workers.count)
        self.draw_seeds(-(-num_sequences // size), generator)

    def check_prompts(self, prompts: Sequence[Prompt], response_tokens: int) -> None:
        """Raise UserError before a run starts if prompt plus ``response_tokens`` exceeds the model's positions."""
        longest = max(map(self.count_tokens, prompts), default=0)
        require_positions(self.policy.model.config, longest, response_tokens)

    def count_tokens(self, prompt: Prompt) -> int:
        return len(self.prefix(prompt).prompt_ids)

    def _decode_wave(
        self, prefixes_S: Sequence[Prefix], sampling: SamplingParams, generator: torch.Generator
    ) -> Iterator[tuple[int, Rollout]]:
        """Yield (sequence index, rollout); every worker uses its own random numbers."""
        size = -(-len(prefixes_S) // self.workers.count)
        parts = [prefixes_S[start : start + size] for start in range(0, len(prefixes_S), size)]
        seeded = list(zip(parts, self.draw_seeds(len(parts), generator), strict=True))
        if self.workers.count == 1:
            yield from _decode_part(self.workers.local, seeded[0], sampling)
            return
        by_worker = self.workers.map(_decode_whole_part, seeded, sampling)
        yield from enumerate(rollout for rollouts in by_worker for rollout in rollouts)

    def draw_seeds(self, count: int, generator: torch.Generator) -> list[int]:
        seeds: list[int] = torch.randint(2**62, (count,), device=generator.device, generator=generator).tolist()
        return seeds

    def prefix(self, prompt: Prompt) -> Prefix:
        return Prefix(prompt_token_ids(self.policy.tokenizer, prompt, max_tokens=self.max_prompt_tokens))


def _in_order(rollouts: dict[int, Rollout]) -> tuple[Rollout, ...]:
    return tuple(rollouts[number] for number in range(len(rollouts)))


def _decode_part(
    worker: Worker, part: tuple[Sequence[Prefix], int], sampling: SamplingParams
) -> Iterator[tuple[int, Rollout]]:
    prefixes_S, seed = part
    return_freed_memory()  # of the wave or update before, which had other sizes
    generator = torch.Generator(worker.policy.device).manual_seed(seed)

    room_before, then = 0, time.monotonic_ns()

    def count(sampled: int, room: int) -> None:
        nonlocal room_before, then
        now, first = time.monotonic_ns(), room_before == 0
        begun = {"begun": sampled, "reading_ns": now - then} if first else {"working_ns": now - then}
        worker.add_counts(steps=1, tokens=sampled, room=room - room_before, **begun)
        room_before, then = room, now

    for ended in decode(worker.policy, prefixes_S, sampling, generator, on_step=count):
        worker.add_counts(finished=1)
        yield ended


def _decode_whole_part(worker: Worker, part: tuple[Sequence[Prefix], int], sampling: SamplingParams) -> list[Rollout]:
    return list(_in_order(dict(_decode_part(worker, part, sampling))))


@torch.no_grad()
def decode(
    policy: Policy,
    prefixes_S: Sequence[Prefix],
    sampling: SamplingParams,
    generator: torch.Generator,
    interrupted: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, int], None] = lambda sampled, room: None,
    on_tokens: Callable[[Tensor, Tensor], None] = lambda tokens_S, entropy_S: None,
) -> Iterator[tuple[int, Rollout]]:
    """Decode one batch; yield each rollout, with its index in the batch, as soon as it ends.

    ``interrupted`` is called after every token; once True, the remaining sequences are yielded unfinished. ``on_step``
    gets how many tokens were sampled and how many may follow, ``on_tokens`` every decoded row's token and its entropy
    (nats), ``[S]`` each, finished rows included. Buffers keep the original order; ``row_S`` maps the
    decoding batch to it.
    """
    device, num_sequences, ids_S = policy.device, len(prefixes_S), [prefix.ids for prefix in prefixes_S]
    stop_ids = torch.tensor(stop_tokens(policy, sampling), device=device)
    tokens_left = [sampling.max_response_tokens - len(prefix.response_ids) for prefix in prefixes_S]
    lengths_S, max_tokens = torch.tensor(tokens_left, device=device), max(tokens_left)
    tokens_ST = torch.zeros((num_sequences, max_tokens), dtype=torch.int64, device=device)
    logprobs_ST, entropy_ST = torch.zeros(2, num_sequences, max_tokens, device=device)
    finished_S = torch.zeros(num_sequences, dtype=torch.bool, device=device)

    row_S, going_S = torch.arange(num_sequences, device=device), ~finished_S
    hidden_SD, cache, seen_ST = _read_prompts(policy, ids_S, max_tokens)
    position_S, cached = seen_ST.sum(1), seen_ST.shape[1]
    seen_ST = torch.nn.functional.pad(seen_ST, (0, max_tokens), value=True)
    advance, to_logits, num_before = choose_step(policy), policy.head_in_precision(), num_sequences
    for step in range(max_tokens):
        drawn_S, logprobs_S, entropy_S = sample_tokens(to_logits(hidden_SD), sampling, generator)
        tokens_ST[row_S, step], logprobs_ST[row_S, step], entropy_ST[row_S, step] = drawn_S, logprobs_S, entropy_S
        on_tokens(drawn_S, entropy_S)
        stopped_S = torch.isin(drawn_S, stop_ids) & going_S
        lengths_S[row_S[stopped_S]] = step + 1
        finished_S[row_S[stopped_S]] = True
        if interrupted():
            lengths_S[row_S[going_S & ~stopped_S]] = step + 1

        before_S, going_S = going_S, ~finished_S[row_S] & (lengths_S[row_S] > step + 1)
        left_S = (lengths_S[row_S] - step - 1) * going_S
        num_going, room = torch.stack([going_S.sum(), left_S.sum()]).tolist()  # one transfer from an accelerator
        on_step(num_before, room)
        if num_going < num_before:
            for row in row_S[before_S & ~going_S].tolist():
                length, finished = int(lengths_S[row]), bool(finished_S[row])
                written = (tokens_ST[row, :length], logprobs_ST[row, :length], entropy_ST[row, :length])
                yield row, build_rollout(policy, ids_S[row], *written, finished=finished)
        if num_going == 0:
            return
        num_before = num_going
        if len(row_S) - num_going >= COMPACT_FRACTION * len(row_S):
            index_S = _close_gaps(going_S, num_going)
            select_sequences(cache, index_S)
            row_S, drawn_S, position_S = row_S[index_S], drawn_S[index_S], position_S[index_S]
            seen_ST, going_S = seen_ST[index_S], going_S[index_S]
        hidden_SD = advance(drawn_S, position_S, seen_ST[:, : cached + step + 1], cache)
        position_S = position_S + going_S  # finished sequences must not exceed the model's last position


def _close_gaps(going_S: Tensor, num_going: int) -> Tensor:
    """Rows to keep: the last unfinished rows move into the slots of finished ones."""
    index_S = torch.arange(num_going, device=going_S.device)
    index_S[~going_S[:num_going]] = going_S[num_going:].nonzero()[:, 0] + num_going
    return index_S


def choose_step(policy: Policy) -> Callable[[Tensor, Tensor, Tensor, DynamicCache], Tensor]:
    """A decoding step: newest tokens, their positions, mask ``[S, T]`` and cache to last hidden states."""
    return FlatStep(policy).hidden_states if reproducible(policy) else partial(_model_step, policy)


def _model_step(policy: Policy, tokens_S: Tensor, position_S: Tensor, seen_ST: Tensor, cache: DynamicCache) -> Tensor:
    ids_S1, position_S1 = tokens_S[:, None], position_S[:, None]
    return policy.hidden_states(ids_S1, seen_ST, position_ids=position_S1, cache=cache, use_cache=True)[:, -1]


def _read_prompts(
    policy: Policy, prompts_S: Sequence[tuple[int, ...]], max_tokens: int
) -> tuple[Tensor, DynamicCache, Tensor]:
    """Prefill each distinct prompt once, padded on the left; at most ``max_tokens`` follow.

    Returns last hidden states ``[S, D]``, cache and bool ``[S, T]`` (False: padding).
    """
    distinct = list(dict.fromkeys(prompts_S))
    longest = max(map(len, distinct))
    pad_id = policy.tokenizer.eos_token_id
    ids_PT = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in distinct])
    mask_PT = torch.tensor([[False] * (longest - len(ids)) + [True] * len(ids) for ids in distinct])
    ids_PT, mask_PT = ids_PT.to(policy.device), mask_PT.to(policy.device)
    cache = build_cache(policy.model.config, longest + max_tokens)
    hidden_PTD = policy.hidden_states(
        ids_PT, mask_PT, position_ids=(mask_PT.cumsum(1) - 1).clamp_min(0), cache=cache, use_cache=True
    )
    place = {ids: index for index, ids in enumerate(distinct)}
    owner_S = torch.tensor([place[ids] for ids in prompts_S], device=policy.device)
    hidden_SD = hidden_PTD[owner_S, -1]
    del hidden_PTD  # before the cache grows
    select_sequences(cache, owner_S)
    return hidden_SD, cache, mask_PT[owner_S]


def build_rollout(
    policy: Policy,
    prompt_ids: tuple[int, ...],
    tokens_T: Tensor,
    logprobs_T: Tensor,
    entropy_T: Tensor,
    *,
    finished: bool,
) -> Rollout:
    """A rollout of one sequence; raises TrainingHalted unless log-probs and entropies are finite."""
    if not (logprobs_T.isfinite().all() and entropy_T.isfinite().all()):
        raise TrainingHalted("the model's logits are NaN or infinite while sampling; its weights have diverged")
    ids = tokens_T.tolist()
    return Rollout(
        prompt_ids=prompt_ids,
        response_ids=tuple(ids),
        logprobs=logprobs_T.clone().cpu(),
        entropy=entropy_T.clone().cpu(),
        text=response_text(policy.tokenizer, ids, finished=finished),
        finished=finished,
    )


def stop_tokens(policy: Policy, sampling: SamplingParams) -> tuple[int, ...]:
    """Ids of all tokens that end a response, always including the model's own."""
    return tuple(dict.fromkeys([*policy.stop_token_ids(), *sampling.stop_token_ids]))
