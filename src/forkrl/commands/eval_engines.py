"""What samples an evaluation: the embedded engine, vLLM, or a server; each opened once for all benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from forkrl.commands.options import EvalOptions
from forkrl.commands.runner import weights_fingerprint
from forkrl.commands.session import checked_config, graphs_fact, open_model
from forkrl.commands.subject import Subject
from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.evaluation.samplers import EmbeddedSampler, Sampler, SampleRequest
from forkrl.model.locations import model_location
from forkrl.model.stop_tokens import load_generation_config, stop_token_ids
from forkrl.model.support import require_no_adapter
from forkrl.parallel.workers import Workers
from forkrl.rollout import open_engine
from forkrl.types import Prompt

PromptFormat = Literal["plain", "chat"]


class EvalEngine(Protocol):
    """An engine with its model.

    ``facts`` are what the numbers hang on besides the settings of every evaluation; ``tokenizer`` is None where a
    server keeps it; ``max_prompt_tokens`` is None where the engine has its own limit.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    max_prompt_tokens: int | None
    facts: Mapping[str, Any]

    def settings_for(self, prompts: Sequence[Prompt]) -> TrainConfig:
        """The settings for these prompts, once each is known to fit."""
        ...

    def sampler(self, grid: Sequence[SampleRequest]) -> Sampler:
        """What samples a benchmark; ``grid`` is all of its responses, in order."""
        ...

    def finished(self) -> int:
        """How many responses it has sampled, handed out or not; 0 where it hands out each at once."""
        ...


class _Embedded:
    name = "torch"

    def __init__(self, subject: Subject, workers: Workers) -> None:
        self._subject = subject
        self._engine = open_engine(workers, subject.config)
        self.tokenizer: PreTrainedTokenizerBase | None = workers.policy.tokenizer
        self.max_prompt_tokens: int | None = self._engine.max_prompt_tokens
        # How sequences are divided decides which random numbers each of them gets.
        self.facts: Mapping[str, Any] = {
            "model.precision": subject.config.model.precision,
            "rollout.max_sequences": subject.config.rollout.max_sequences,
            "runtime.workers": workers.count,
            "device": workers.policy.device.type,
            **graphs_fact(subject.config),
        }

    def settings_for(self, prompts: Sequence[Prompt]) -> TrainConfig:
        return checked_config(self._subject, self._engine, prompts)

    def sampler(self, grid: Sequence[SampleRequest]) -> Sampler:
        return EmbeddedSampler(self._engine, grid)

    def finished(self) -> int:
        return self._engine.workers.sequences_finished


class _Whole:
    """An engine that needs no grid: every response has random numbers of its own."""

    def __init__(self, subject: Subject, sampler: Sampler, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.name = sampler.name
        self.tokenizer = tokenizer
        self.max_prompt_tokens: int | None = None
        self.facts: Mapping[str, Any] = {}
        self._config = subject.config
        self._sampler = sampler

    def settings_for(self, prompts: Sequence[Prompt]) -> TrainConfig:
        return self._config

    def sampler(self, grid: Sequence[SampleRequest]) -> Sampler:
        return self._sampler

    def finished(self) -> int:
        return 0


@contextmanager
def open_eval_engine(subject: Subject, options: EvalOptions, prompt_format: PromptFormat) -> Iterator[EvalEngine]:
    """Open the chosen engine with the subject's model."""
    model = subject.config.model
    if options.server is not None:
        if subject.run is not None:
            raise UserError(f"--server {options.server}: give the model's name at the server in place of the run")
        from forkrl.evaluation.server import CONCURRENCY, ServerSampler

        server = ServerSampler(
            options.server, subject.name, prompt_format=prompt_format, concurrency=options.concurrency or CONCURRENCY
        )
        yield _Whole(subject, server, None)
    elif options.engine == "vllm":
        from forkrl.evaluation.vllm import VllmSampler

        path = model_location(model.path)
        require_no_adapter(path, model.revision, model.path)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model.revision)
        generation = load_generation_config(path, model.revision)
        sampler = VllmSampler(
            path,
            revision=model.revision,
            seed=subject.config.seed,
            stop_token_ids=stop_token_ids(tokenizer, generation, subject.config.rollout.stop),
        )
        yield _Whole(subject, sampler, tokenizer)
    else:
        with open_model(subject) as workers:
            yield _Embedded(subject, workers)


def identity(subject: Subject, options: EvalOptions) -> dict[str, Any]:
    """Which model it is, as far as can be told from here."""
    model = subject.config.model
    return {
        "model": subject.name,
        "engine": options.engine_name,
        "checkpoint": subject.checkpoint,
        "model.revision": model.revision,
        "weights": weights_fingerprint(model.path) if options.server is None else "",
    }
