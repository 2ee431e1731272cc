"""What the engines of an evaluation have in common: asked for responses, they yield each as it finishes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from forkrl.types import Prompt


class SampleRequest(NamedTuple):
    """One response that is still to be sampled: to which prompt, and which of its responses, counted from 0."""

    prompt: Prompt
    sample: int


class Sampled(NamedTuple):
    """A response that has finished. ``tokens`` is its length, ``entropy`` its mean in nats, None if unknown."""

    request: SampleRequest
    text: str
    tokens: int
    finished: bool
    entropy: float | None


class EvalSampling(NamedTuple):
    """How responses are sampled: ``temperature`` 0 is greedy; ``stop`` are further strings that end a response."""

    max_response_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...]


class Sampler(Protocol):
    """An engine of an evaluation; ``name`` is how results call it."""

    name: str

    def sample(self, requests: Sequence[SampleRequest], sampling: EvalSampling) -> Iterator[Sampled]:
        """Sample a response to every request, yielding each as it finishes, in any order.

        Raises:
            UserError: the engine cannot go on, such as a server that stopped to answer; what was yielded counts.
        """
        ...
