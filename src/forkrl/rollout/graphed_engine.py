"""The embedded engine with CUDA graphs: one launch per step, and a host check for ended sequences every few tokens.

Tokens computed after the end of a response are discarded. Random numbers are drawn for all rows and rows leave at
other times than in ``EmbeddedEngine``, so the same seed gives different, still reproducible responses.

Shapes: ``S`` rows of the batch, ``P`` prompts, ``T`` tokens, ``N`` tokens of a stride, ``D`` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from forkrl.errors import UserError
from forkrl.model.policy import Policy
from forkrl.rollout.embedded import EmbeddedEngine, Prefix, build_rollout, read_prompts, stop_tokens
from forkrl.rollout.flat_step import reproducible
from forkrl.rollout.graphed_step import LEAST_ROWS, GraphedStep, bucket
from forkrl.rollout.sampling import sample_tokens
from forkrl.types import Rollout, SamplingParams

STRIDE = 8
"""Tokens between checks for ended sequences (each a host synchronisation); wastes about four tokens per response."""


class GraphedEngine(EmbeddedEngine):
    """``EmbeddedEngine`` with CUDA graphs; on devices other than GPUs it runs the same steps without graphs.

    Buffers (see ``graphed_step``) and graphs exist only during one call of ``stream``, to leave memory for training.
    """

    def _decode_waves(
        self, waves: Sequence[Sequence[Prefix]], sampling: SamplingParams, generator: torch.Generator
    ) -> Iterator[tuple[int, int, Rollout]]:
        if self.workers.count > 1:
            raise ValueError("graphs are of one worker")
        if not waves:
            return
        capacity = max(max(len(prefix.ids) for prefix in wave) + max(_rooms(wave, sampling)) for wave in waves)
        with torch.no_grad():
            step = GraphedStep(self.policy, max(map(len, waves)), capacity)
        for number, prefixes_S in enumerate(waves):
            (seed,) = self.draw_seeds(1, generator)
            own = torch.Generator(self.policy.device).manual_seed(seed)
            for place, rollout in decode_in_strides(self.policy, step, prefixes_S, sampling, own):
                self.workers.local.add_counts(finished=1)
                yield number, place, rollout


def require_graphs(policy: Policy) -> None:
    """Raise UserError if the device or model cannot use CUDA graphs."""
    remedy = "set rollout.cuda_graphs = false (a run that began with it needs a new --out)"
    if policy.device.type != "cuda":
        raise UserError(
            f"rollout.cuda_graphs = true: the model is on {policy.device}, which has no CUDA graphs; {remedy}"
        )
    if not reproducible(policy):
        raise UserError(
            f"rollout.cuda_graphs = true: {type(policy.model).__name__} with these options has no decoding step of "
            f"fixed shapes; Llama, Mistral, Qwen2 and Qwen3 with full attention have one; {remedy}"
        )


@torch.no_grad()
def decode_in_strides(
    policy: Policy,
    step: GraphedStep,
    prefixes_S: Sequence[Prefix],
    sampling: SamplingParams,
    generator: torch.Generator,
) -> Iterator[tuple[int, Rollout]]:
    """Decode one batch; yield each rollout, with its index in the batch, after the stride in which it ends.

    Copies of the first sequence, marked as ended, pad the batch to a bucket of rows.
    """
    ids_S, room = [prefix.ids for prefix in prefixes_S], _rooms(prefixes_S, sampling)
    num_rows, most = bucket(len(ids_S), LEAST_ROWS), max(room)
    stop_ids = torch.tensor(stop_tokens(policy, sampling), device=policy.device)
    tokens_ST = torch.zeros((num_rows, most), dtype=torch.int64, device=policy.device)
    logprobs_ST, entropy_ST = torch.zeros(2, num_rows, most, device=policy.device)
    hidden_PD, cache, seen_PT, owner_S = read_prompts(policy, ids_S, 0)  # step.begin copies it
    owner_S = torch.nn.functional.pad(owner_S, (0, num_rows - len(ids_S)), value=int(owner_S[0]))
    step.begin(cache, seen_PT, owner_S)
    hidden_SD = hidden_PD[owner_S]
    del cache, hidden_PD

    row, going = list(range(num_rows)), [place < len(ids_S) for place in range(num_rows)]
    row_S = torch.arange(num_rows, device=policy.device)
    for start in range(0, most, STRIDE):
        end = min(start + STRIDE, most)
        drawn_S, written = _stride(step, hidden_SD, end - start, sampling, generator)
        for each_ST, written_SN in zip((tokens_ST, logprobs_ST, entropy_ST), written, strict=True):
            each_ST[row_S, start:end] = written_SN
        stops = [start + count for count in _count_to_stop(written[0], stop_ids).tolist()]  # host synchronisation
        ended = sorted(
            (min(stops[place], room[row[place]]), place)
            for place in range(len(row))
            if going[place] and min(stops[place], room[row[place]]) <= end
        )
        for length, place in ended:
            going[place] = False
            which = row[place]
            told = (each_ST[which, :length].cpu() for each_ST in (tokens_ST, logprobs_ST, entropy_ST))
            yield which, build_rollout(policy, ids_S[which], *told, finished=stops[place] <= room[which])
        if not any(going):
            return
        num_rows = bucket(sum(going), LEAST_ROWS)
        if num_rows < len(row):
            kept = _kept_places(going, num_rows)
            step.keep(kept)
            row, going = [row[place] for place in kept], [going[place] for place in kept]
            row_S, drawn_S = torch.tensor(row, device=policy.device), drawn_S[torch.tensor(kept, device=policy.device)]
        hidden_SD = step.advance(drawn_S)


def _rooms(prefixes: Sequence[Prefix], sampling: SamplingParams) -> list[int]:
    return [sampling.max_response_tokens - len(prefix.response_ids) for prefix in prefixes]


def _stride(
    step: GraphedStep, hidden_SD: Tensor, count: int, sampling: SamplingParams, generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Draw ``count`` tokens: the last, and all ``[S, N]`` with log-probs and entropies."""
    drawn = [sample_tokens(step.logits(hidden_SD), sampling, generator)]
    while len(drawn) < count:
        # Ended rows continue. Positions beyond the model's last are safe: they are rotary angles, not table indices.
        drawn.append(sample_tokens(step.logits(step.advance(drawn[-1][0])), sampling, generator))
    return drawn[-1][0], tuple(torch.stack(each, 1) for each in zip(*drawn, strict=True))


def _count_to_stop(tokens_SN: Tensor, stop_ids: Tensor) -> Tensor:
    """Tokens of each row up to and including the first stop token; INT32_MAX without one."""
    stop_SN = torch.isin(tokens_SN, stop_ids)
    none = torch.iinfo(torch.int32).max
    return torch.where(stop_SN.any(1), stop_SN.int().argmax(1) + 1, none)


def _kept_places(going: Sequence[bool], num_rows: int) -> list[int]:
    """The source of each remaining row: itself, or an unfinished row that would be cut off."""
    homeless = [place for place in range(num_rows, len(going)) if going[place]]
    return [place if going[place] or not homeless else homeless.pop() for place in range(num_rows)]
