"""Shared data types, from prompt to gradient step.

Shape legend, used in every module: ``B`` sequences, ``T`` token positions, ``V`` vocabulary, ``D`` hidden,
``P`` prompts, ``G`` rollouts per prompt (the group), ``N`` flattened rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from torch import Tensor


def require_tensors(**values: object) -> None:
    """Raise TypeError for an argument that is not a torch tensor, such as a NumPy array or a list."""
    import torch

    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise TypeError(f"{name}: torch tensor expected, got {kind}; convert it with torch.as_tensor")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, exactly as the model reads it, and the answer for its verifier.

    ``place`` is its location in the user's data for error messages ("train.jsonl line 7"); may be empty.
    ``source`` is its part of a mixed task; empty in a task of one part. ``level`` is that of a curriculum, or 0.
    ``templated``: a chat template has wrapped the text and added special tokens.
    """

    id: str
    text: str
    answer: str
    place: str = field(default="", compare=False)
    source: str = ""
    level: int = 0
    templated: bool = False


class Judgement(NamedTuple):
    """What a verifier function may return instead of a bare score.

    ``answer`` is the final answer that it read, normalised so that equal answers are mostly equal text, for votes among
    responses; "" if it found none, None if it does not say.
    """

    score: float
    answer: str | None = None


FAILURES = ("timeout", "crash", "memory", "error")
"""Why a verifier gave no score: too slow, its process died, out of memory, it raised or returned no score."""


@dataclass(frozen=True, slots=True)
class VerifierResult:
    """The result of one response.

    ``score`` is the correctness in [0, 1]. ``failure`` is empty, or one of ``FAILURES``: the score is then 0, and the
    reason is counted and logged. ``answer`` is the final answer that the verifier read, as in ``Judgement``.
    """

    score: float
    failure: str = ""
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    """A verifier function and its options.

    ``path`` is ``"module:function"``; the function takes ``(answer, response)`` strings and returns a score in [0, 1]
    or a ``Judgement``. ``options`` are further keyword arguments, as JSON. ``timeout_s`` is the wall-clock limit for
    one response; None: the recipe's ``reward.timeout_s``.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled response.

    ``logprobs`` and ``entropy`` (nats) are fp32 ``[T]``, over the full vocabulary at the sampling temperature.
    ``response_ids`` includes the closing stop token if ``finished``; ``text`` does not.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: Tensor
    entropy: Tensor
    text: str
    finished: bool

    def __len__(self) -> int:
        return len(self.response_ids)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The ``G`` responses to one prompt, and once scored, a result for each."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    results: tuple[VerifierResult, ...] = ()

    @property
    def scores(self) -> tuple[float, ...]:
        return tuple(result.score for result in self.results)


class TemperatureRule(Protocol):
    """A temperature for every position by its entropy, such as ``forkrl.ForkTemperature``."""

    def rescale(self, scores: Tensor, entropy: Tensor) -> Tensor:
        """Scores ``[S, V]`` whose softmax is drawn from, given log-probs and their entropies ``[S]``."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an engine samples. ``temperature`` 0 is greedy (log-probs and entropy then refer to temperature 1).

    With ``fork_temperature``, tokens are drawn at its two temperatures, while log-probs and entropy are those of the
    unscaled distribution; ``temperature`` must stay 1.
    """

    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    fork_temperature: TemperatureRule | None = None

    def __post_init__(self) -> None:
        if self.fork_temperature is not None and self.temperature != 1:
            raise ValueError(f"temperature = {self.temperature:g} along with {self.fork_temperature}: leave it at 1")


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Sequences padded on the right, seen as next-token predictions.

    Position ``t`` reads ``input_ids[b, t]`` and predicts ``targets[b, t]``, the token after it, so every ``[B, T]``
    field is about a *prediction*. ``response_mask`` is True where the model wrote the target.
    """

    input_ids: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, False on padding
    response_mask: Tensor  # [B, T] bool
    old_logprobs: Tensor  # [B, T] fp32, of the policy that sampled; 0 outside the response
    rollout_entropy: Tensor  # [B, T] fp32 nats, of the policy that sampled; 0 outside the response
    advantages: Tensor  # [B] fp32
    selected: Tensor | None = None  # [B, T] bool, where chosen before the first update; None: each update chooses

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_mask.sum())

    def rows(self, index: Tensor | Sequence[int]) -> TokenBatch:
        """The given sequences, in the given order, cut to the longest of them."""
        longest = int(self.attention_mask[index].sum(1).max())
        return self._each(lambda field: field[index] if field.ndim == 1 else field[index, :longest])

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return self._each(lambda field: field.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        fields: list[Any] = [getattr(self, name) for name in self.__slots__]
        changed: list[Any] = [None if field is None else change(field) for field in fields]
        return TokenBatch(*changed)


class TokenStats(NamedTuple):
    """fp32 log-prob of every target and entropy (nats) of every position, of one shape."""

    logprobs: Tensor
    entropy: Tensor


class LossOutput(NamedTuple):
    """A scalar to call ``backward`` on, and detached scalars to log."""

    loss: Tensor
    metrics: dict[str, Tensor]


class RolloutEngine(Protocol):
    """Samples responses from the current policy."""

    def check_prompts(self, prompts: Sequence[Prompt], response_tokens: int) -> None:
        """Raise UserError for a prompt that leaves no room for a response of ``response_tokens`` tokens."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        sampling: SamplingParams,
        generator: torch.Generator,
        on_finished: Callable[[Prompt, Rollout], None] | None = None,
    ) -> list[RolloutGroup]:
        """Sample ``group_size`` responses to each prompt, in the order of the prompts.

        The same weights, prompts, sampling and generator state give the same responses. ``on_finished`` is called with
        each response as soon as it has ended. Raises UserError for a prompt that leaves no room for an answer.
        """
        ...


class Verifier(Protocol):
    """Judges responses; never raises for what a response contains."""

    @property
    def first_failures(self) -> Mapping[str, str]:
        """For each kind of failure seen, the prompt and message of the first."""
        ...

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
        """A result for each pair of a prompt and a response, in order."""
        ...

    def submit(self, items: Sequence[tuple[Prompt, str]]) -> Future[list[VerifierResult]]:
        """The same, asynchronously."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """Training prompts, held-out prompts, and verifiers.

    ``verifiers`` has one for every ``Prompt.source`` ("" in a task of one part); it is empty if there are no answers.
    ``fingerprint`` changes whenever the prompts do: a resumed run refuses other data.
    """

    name: str
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    verifiers: Mapping[str, VerifierSpec]
    fingerprint: str = field(default="")
