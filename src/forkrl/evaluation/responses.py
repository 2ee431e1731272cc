"""A response of an evaluation with its result: what every figure of an evaluation is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """One response to one question, judged.

    ``question`` is the id of the prompt, ``sample`` counts its responses from 0, and ``tokens`` is the length of the
    response. ``entropy`` is its mean in nats, None where the engine does not say. ``failure`` is empty when the
    verifier answered. ``answer`` is what it read as the final answer: "" where it found none, None where it does not
    say.
    """

    question: str
    sample: int
    text: str
    tokens: int
    finished: bool
    entropy: float | None
    score: float
    failure: str
    answer: str | None
