"""The engine of an evaluation, opened with its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from forkrl.commands.options import EvalOptions
from forkrl.commands.session import checked_config, open_model
from forkrl.commands.subject import Subject
from forkrl.commands.work_folder import weights_fingerprint
from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.evaluation.samplers import EmbeddedSampler, Sampler, VllmSampler
from forkrl.rollout.vllm_engine import VllmEngine
from forkrl.types import Prompt


@contextmanager
def open_sampler(subject: Subject, options: EvalOptions, prompt_format: Literal["plain", "chat"]) -> Iterator[Sampler]:
    if options.server is not None:
        if subject.run is not None:
            raise UserError(f"--server {options.server}: give the model's name at the server in place of the run")
        from forkrl.evaluation.server import CONCURRENCY, ServerSampler

        concurrency = options.concurrency or CONCURRENCY
        yield ServerSampler(options.server, subject.name, prompt_format=prompt_format, concurrency=concurrency)
    else:
        with open_model(subject.config) as engine:
            yield VllmSampler(engine) if isinstance(engine, VllmEngine) else EmbeddedSampler(engine)


def settings_for(subject: Subject, sampler: Sampler, prompts: Sequence[Prompt]) -> TrainConfig:
    """The settings for these prompts, after checking that each fits; a server checks this itself."""
    return checked_config(subject, sampler.engine, prompts) if isinstance(sampler, EmbeddedSampler) else subject.config


def identity(subject: Subject, options: EvalOptions) -> dict[str, Any]:
    """Which model it is, as far as this process can tell."""
    model = subject.config.model
    return {
        "model": subject.name,
        "engine": "server" if options.server is not None else subject.config.rollout.engine,
        "checkpoint": subject.checkpoint,
        "model.revision": model.revision,
        "weights": weights_fingerprint(model.path) if options.server is None else "",
    }


def engine_facts(subject: Subject, sampler: Sampler) -> dict[str, Any]:
    """Other settings that decide which random numbers each response gets."""
    if not isinstance(sampler, EmbeddedSampler):
        return {}
    workers = sampler.engine.workers
    if isinstance(sampler, VllmSampler):
        return {"model.precision": subject.config.model.precision, "device": workers.policy.device.type}
    return {
        "model.precision": subject.config.model.precision,
        "rollout.max_sequences": subject.config.rollout.max_sequences,
        "runtime.workers": workers.count,
        "device": workers.policy.device.type,
    }
