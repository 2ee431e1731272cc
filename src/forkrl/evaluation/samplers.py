"""The engine interface of an evaluation, and the engines of this machine. Another: ``server``."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from forkrl.report.remaining import SamplingTime
from forkrl.types import Prompt, SamplingParams

if TYPE_CHECKING:  # torch, not needed with a server
    from transformers import PreTrainedTokenizerBase

    from forkrl.rollout.embedded import EmbeddedEngine
    from forkrl.rollout.vllm_engine import VllmEngine
    from forkrl.types import Rollout

Key = tuple[str, int]
"""Question id, and index of the response from 0."""


class SampleRequest(NamedTuple):
    """One response to sample; ``sample`` is its index, from 0."""

    prompt: Prompt
    sample: int

    @property
    def key(self) -> Key:
        return self.prompt.id, self.sample


class Sampled(NamedTuple):
    """``entropy``: mean in nats or None. ``reasoning``: returned separately by a server; stored, not judged."""

    request: SampleRequest
    text: str
    tokens: int
    finished: bool
    entropy: float | None
    reasoning: str = ""


class EvalSampling(NamedTuple):
    """``temperature`` 0 is greedy; ``stop``: additional strings that end a response."""

    max_response_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...]


def request_seed(seed: int, question: str, sample: int) -> int:
    """A 31-bit seed for one response, independent of machine and request order.

    Some servers keep seeds in 32 bits, signed or not, and take -1 for "any".
    """
    # Length-prefixed, so that different triples never give the same text.
    digest = hashlib.sha256(f"{seed}/{len(question)}/{question}/{sample}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little") >> 1


class Sampler(ABC):
    """An engine with its model. None: a server keeps the tokenizer, or the engine has its own prompt limit."""

    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    max_prompt_tokens: int | None = None

    @abstractmethod
    def sample(
        self, requests: Sequence[SampleRequest], sampling: EvalSampling, grid: Sequence[SampleRequest] = ()
    ) -> Iterator[Sampled]:
        """Sample a response to every request, yielding each as it finishes, in any order.

        ``grid``: every response of the benchmark, in order; empty if ``requests`` are all of them.
        """

    def shown(self, requests: Sequence[SampleRequest], grid: Sequence[SampleRequest]) -> dict[str, Any]:
        """Arguments of ``forkrl.report.progress`` that count what ``sample`` decodes from now on, yielded or not."""
        return {"total": len(requests)}


class EmbeddedSampler(Sampler):
    """The embedded engine, which samples in waves with shared random numbers.

    A wave with missing responses is decoded completely with its original random numbers, and only the missing ones are
    yielded: an interruption changes no number. Sampling only unfinished responses again would favour short ones.
    """

    name = "torch"

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.engine = engine
        self.tokenizer = engine.policy.tokenizer
        self.max_prompt_tokens = engine.max_prompt_tokens

    def sample(
        self, requests: Sequence[SampleRequest], sampling: EvalSampling, grid: Sequence[SampleRequest] = ()
    ) -> Iterator[Sampled]:
        """Yields wave by wave, the shorter responses of a wave first."""
        from forkrl.rollout.held_out import evaluation_generator

        engine, grid, wanted = self.engine, grid or requests, {request.key for request in requests}
        generator, params = evaluation_generator(sampling.seed, engine.policy.device), self._params(sampling)
        for wave, decoded in self._waves(requests, grid):
            if not decoded:
                engine.pass_over(len(wave), generator)
                continue
            prefixes = [engine.prefix(request.prompt) for request in wave]
            for place, _, rollout in engine.stream(prefixes, count=1, sampling=params, generator=generator):
                if wave[place].key in wanted:
                    yield _sampled(wave[place], rollout)

    def shown(self, requests: Sequence[SampleRequest], grid: Sequence[SampleRequest]) -> dict[str, Any]:
        total = sum(len(wave) for wave, decoded in self._waves(requests, grid) if decoded)
        time = SamplingTime(self.engine.workers, total, self.engine.wave_sequences)
        return {"total": total, "finished": time.finished, "seconds_left": time}

    def _params(self, sampling: EvalSampling) -> SamplingParams:
        return SamplingParams(
            max_response_tokens=sampling.max_response_tokens,
            temperature=sampling.temperature,
            stop_token_ids=self.engine.policy.stop_token_ids(sampling.stop),
        )

    def _waves(
        self, requests: Sequence[SampleRequest], grid: Sequence[SampleRequest]
    ) -> Iterator[tuple[Sequence[SampleRequest], bool]]:
        """The waves of ``grid``, and whether each is decoded because it has some of ``requests``."""
        wanted, size = {request.key for request in requests}, self.engine.wave_sequences
        for start in range(0, len(grid), size):
            wave = grid[start : start + size]
            yield wave, not wanted.isdisjoint(request.key for request in wave)


class VllmSampler(EmbeddedSampler):
    """vLLM. Every response has its own seed, so the missing ones are sampled in one batch, without waves."""

    name = "vllm"
    engine: VllmEngine

    def sample(
        self, requests: Sequence[SampleRequest], sampling: EvalSampling, grid: Sequence[SampleRequest] = ()
    ) -> Iterator[Sampled]:
        """The seeds are those that a run's evaluation gives to the same responses."""
        from forkrl.rollout.held_out import evaluation_generator

        engine, grid = self.engine, grid or requests
        drawn = engine.draw_seeds(len(grid), evaluation_generator(sampling.seed, engine.policy.device))
        seeds = dict(zip((request.key for request in grid), drawn, strict=True))
        prefixes = [engine.prefix(request.prompt) for request in requests]
        of_requests = [seeds[request.key] for request in requests]
        for place, rollout in engine.stream_seeded(prefixes, of_requests, self._params(sampling)):
            yield _sampled(requests[place], rollout)

    def shown(self, requests: Sequence[SampleRequest], grid: Sequence[SampleRequest]) -> dict[str, Any]:
        return Sampler.shown(self, requests, grid)


def _sampled(request: SampleRequest, rollout: Rollout) -> Sampled:
    return Sampled(request, rollout.text, len(rollout), rollout.finished, float(rollout.entropy.mean()))
