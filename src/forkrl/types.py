"""Shared data types.

Axes in every module: ``B`` sequences, ``T`` token positions, ``V`` vocabulary, ``D`` hidden, ``P`` prompts,
``G`` rollouts per prompt (the group), ``N`` flattened rows.
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
    """Raise TypeError for an argument that is not a torch tensor."""
    import torch

    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise TypeError(f"{name}: torch tensor expected, got {kind}; convert it with torch.as_tensor")


class Counts(NamedTuple):
    """What a worker has done so far, readable by every process at any time; floats are means over workers."""

    finished: float = 0  # sequences sampled or measured
    begun: float = 0  # sequences with a sampled token
    steps: float = 0  # of decoding
    tokens: float = 0  # sampled or measured
    room: float = 0  # the most tokens that unfinished sequences may still get
    reading_ns: float = 0  # nanoseconds before the first tokens of a batch
    working_ns: float = 0  # nanoseconds of decoding after them, or of measuring


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model reads it, and the reference answer for its verifier.

    ``place`` locates it in the user's data for error messages ("train.jsonl line 7"). ``source`` is its part of a mixed
    task, or empty. ``level`` is its curriculum level, or 0. ``templated``: a chat template was applied. ``question``:
    the question without templates and examples, to find it in other data.
    """

    id: str
    text: str
    answer: str
    place: str = field(default="", compare=False)
    source: str = ""
    level: int = 0
    templated: bool = False
    question: str = field(default="", compare=False)


Messages = list[dict[str, str]]
"""Chat messages, each with ``role`` and ``content``."""


class Example(NamedTuple):
    """A question with its gold answer."""

    content: str | Messages
    answer: str


class Judgement(NamedTuple):
    """A score and the final answer (normalised, for majority votes): "" if none was found, None if not reported."""

    score: float
    answer: str | None = None


FAILURES = ("timeout", "crash", "memory", "error")
"""Why a verifier gave no score: timeout, dead process, out of memory, exception or invalid score."""


@dataclass(frozen=True, slots=True)
class VerifierResult:
    """The result of one response.

    ``score`` is in [0, 1]; it is 0 if ``failure`` (one of ``FAILURES``) is set. ``answer`` is as in ``Judgement``.
    ``terms``: results of ``reward.terms`` by name.
    """

    score: float
    failure: str = ""
    answer: str | None = None
    terms: Mapping[str, VerifierResult] = field(default_factory=dict, repr=False)


TERM = "reward.terms."
"""Before the name of one of ``reward.terms``: the source of its verifier."""


def term_source(term: str, source: str) -> str:
    """The ``Prompt.source`` for one of ``reward.terms``; ``source``: the prompt's own."""
    return f"{TERM}{term}\0{source}"


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    """A verifier function and its options.

    ``path`` is ``"module:function"``, from ``(answer, response)`` strings to a score in [0, 1] or a ``Judgement``.
    ``options`` are its keyword arguments. ``timeout_s`` is wall-clock per response; None: ``reward.timeout_s``.
    ``answer_format`` (``task.answer_format``): the verifier gets the answer that it finds; "": the whole response.
    ``prefill``: text at the end of the prompt that belongs to the response (``task.assistant_prefill``).
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None
    answer_format: str = ""
    prefill: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled response.

    ``logprobs`` and ``entropy`` (nats) are fp32 ``[T]``, over the full vocabulary at the sampling temperature, for the
    tokens that the model wrote. ``response_ids`` includes the stop token if ``finished``; ``text`` does not.
    ``written`` says of each of ``response_ids`` whether the model wrote it; empty: all. The others are tool output,
    user turns and template text of an environment. ``result``: the environment's score; None: a verifier scores.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: Tensor
    entropy: Tensor
    text: str
    finished: bool
    written: tuple[bool, ...] = ()
    result: VerifierResult | None = None

    def __len__(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.written) if self.written else len(self.response_ids)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The ``G`` responses to one prompt, with a result for each once scored."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    results: tuple[VerifierResult, ...] = ()

    @property
    def scores(self) -> tuple[float, ...]:
        return tuple(result.score for result in self.results)


class TemperatureRule(Protocol):
    """A temperature per position that depends on entropy, such as ``forkrl.ForkTemperature``."""

    def rescale(self, scores: Tensor, entropy: Tensor) -> Tensor:
        """Scores ``[S, V]`` whose softmax is sampled, given logits ``[S, V]`` and their softmax entropies ``[S]``.

        Adding a constant to a row of logits must not change that softmax.
        """
        ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an engine samples. ``temperature`` 0 is greedy (log-probs and entropy then refer to temperature 1).

    With ``fork_temperature``, sampling uses its two temperatures; log-probs and entropy are of the unscaled
    distribution, and ``temperature`` must be 1.
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
    """Right-padded sequences as next-token predictions.

    Position ``t`` reads ``input_ids[b, t]`` and predicts ``targets[b, t]``, the next token, so every ``[B, T]`` field
    describes a *prediction*. ``response_mask`` is True where the model wrote the target.
    """

    input_ids: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, False on padding
    response_mask: Tensor  # [B, T] bool
    old_logprobs: Tensor  # [B, T] fp32, the denominator of the ratio (loss.old_logprobs); 0 outside the response
    rollout_entropy: Tensor  # [B, T] fp32 nats, of the policy that sampled; 0 outside the response
    advantages: Tensor  # [B] fp32
    selected: Tensor | None = None  # [B, T] bool if selected before the first update; None: each update selects
    weights: Tensor | None = None  # [B, T] fp32, factors of the policy loss (correction, weights.rule); None: 1
    rewards: Tensor | None = None  # [B] fp32, as they enter the advantages; None: not known
    groups: Tensor | None = None  # [B] int64, equal for responses to one prompt; None: not known

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_mask.sum())

    def rows_by_prompt(self) -> dict[tuple[int, ...], list[int]]:
        """The sequences of each distinct prompt, in order."""
        num_prompt_B = (self.response_mask.int().argmax(1) + 1).tolist()
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, (ids, num_prompt) in enumerate(zip(self.input_ids.tolist(), num_prompt_B, strict=True)):
            rows.setdefault(tuple(ids[:num_prompt]), []).append(row)
        return rows

    def rows(self, index: Tensor | Sequence[int]) -> TokenBatch:
        """The given sequences in the given order, truncated to the longest."""
        longest = int(self.attention_mask[index].sum(1).max())
        return self._each(lambda field: field[index] if field.ndim == 1 else field[index, :longest])

    def to(self, device: torch.device | str) -> TokenBatch:
        return self._each(lambda field: field.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        fields: list[Any] = [getattr(self, name) for name in self.__slots__]
        changed: list[Any] = [None if field is None else change(field) for field in fields]
        return TokenBatch(*changed)


class TokenStats(NamedTuple):
    """fp32 log-prob of every target and entropy (nats) of every position, in the same shape."""

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
        """Sample ``group_size`` responses to each prompt, in prompt order.

        Deterministic given weights, prompts, sampling and generator state. ``on_finished`` is called as each response
        finishes. Raises UserError for a prompt that leaves no room for a response.
        """
        ...


class Verifier(Protocol):
    """Scores responses. Never raises because of a response's content."""

    @property
    def first_failures(self) -> Mapping[str, str]:
        """Prompt and message of the first failure of each kind."""
        ...

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
        """A result for each (prompt, response) pair, in order."""
        ...

    def submit(self, items: Sequence[tuple[Prompt, str]]) -> Future[list[VerifierResult]]:
        """Asynchronous ``verify``."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """Training prompts, held-out prompts and verifiers.

    ``verifiers`` has one per ``Prompt.source`` ("" if unmixed), or is empty if there are no answers. ``fingerprint``
    changes with the prompts: a run cannot be resumed on other data. ``examples``: the questions that all prompts show
    with their answers, by id. ``left_out``: rows of the data that are not used, by reason ("duplicates", "held_out": a
    training question that is held out).
    """

    name: str
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    verifiers: Mapping[str, VerifierSpec]
    fingerprint: str = field(default="")
    examples: Mapping[str, Example] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
