"""The engines of an evaluation: asked for responses, they yield each as it finishes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from forkrl.types import Prompt, SamplingParams

if TYPE_CHECKING:  # torch, which an evaluation on a server need not load
    from forkrl.rollout.embedded import EmbeddedEngine


class SampleRequest(NamedTuple):
    """One response that is still to be sampled: to which prompt, and which of its responses, counted from 0."""

    prompt: Prompt
    sample: int


class Sampled(NamedTuple):
    """A response that has finished. ``tokens`` is its length, ``entropy`` its mean in nats, None if unknown.

    ``reasoning`` is what a server returned separately from the text; it is stored, and not judged.
    """

    request: SampleRequest
    text: str
    tokens: int
    finished: bool
    entropy: float | None
    reasoning: str = ""


class EvalSampling(NamedTuple):
    """How responses are sampled: ``temperature`` 0 is greedy; ``stop`` are further strings that end a response."""

    max_response_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...]


def request_seed(seed: int, question: str, sample: int) -> int:
    """A 31-bit seed for one response, the same on every machine and in any order of requests.

    Some servers keep seeds in 32 bits, signed or not, and take -1 for "any".
    """
    # Length-prefixed, so that two different triples never give the same text.
    digest = hashlib.sha256(f"{seed}/{len(question)}/{question}/{sample}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little") >> 1


class Sampler(Protocol):
    """An engine of an evaluation; ``name`` is how results call it."""

    name: str

    def sample(self, requests: Sequence[SampleRequest], sampling: EvalSampling) -> Iterator[Sampled]:
        """Sample a response to every request, yielding each as it finishes, in any order."""
        ...


class EmbeddedSampler:
    """The embedded engine, whose responses are drawn in waves: those of a wave share their random numbers.

    A wave of which any response is asked for is decoded whole, with the random numbers that it has in an evaluation
    that is never interrupted, and only what was asked for is yielded. So an interruption changes no number; and drawing
    anew the responses alone that had not finished would favour short ones.

    Args:
        engine: with the model.
        grid: every response of the benchmark, in order, asked for or not: waves are cut from it.
    """

    name = "torch"

    def __init__(self, engine: EmbeddedEngine, grid: Sequence[SampleRequest]) -> None:
        self._engine = engine
        size = engine.wave_sequences
        self._waves = [grid[start : start + size] for start in range(0, len(grid), size)]

    def sample(self, requests: Sequence[SampleRequest], sampling: EvalSampling) -> Iterator[Sampled]:
        """See ``Sampler``; responses come wave by wave, the shorter ones of a wave first."""
        from forkrl.rollout.held_out import evaluation_generator

        wanted = {(request.prompt.id, request.sample) for request in requests}
        generator = evaluation_generator(sampling.seed, self._engine.policy.device)
        how = SamplingParams(
            max_response_tokens=sampling.max_response_tokens,
            temperature=sampling.temperature,
            stop_token_ids=self._engine.policy.stop_token_ids(sampling.stop),
        )
        for wave in self._waves:
            if wanted.isdisjoint((request.prompt.id, request.sample) for request in wave):
                self._engine.pass_over(len(wave), generator)
                continue
            prefixes = [self._engine.prefix(request.prompt) for request in wave]
            for place, _, rollout in self._engine.stream(prefixes, count=1, sampling=how, generator=generator):
                request = wave[place]
                if (request.prompt.id, request.sample) in wanted:
                    entropy = float(rollout.entropy.mean())
                    yield Sampled(request, rollout.text, len(rollout), rollout.finished, entropy)
