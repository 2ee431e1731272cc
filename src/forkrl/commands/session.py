"""A session: a loaded model with its prompts, engine and verifiers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from forkrl.commands.subject import Subject
from forkrl.config import TrainConfig
from forkrl.errors import notice
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.workers import Workers, open_workers
from forkrl.rewards import open_verifier
from forkrl.rewards.code import with_sandbox
from forkrl.rewards.pool import VerifierPool
from forkrl.rollout import EmbeddedEngine, open_engine
from forkrl.rollout.vllm_engine import VllmEngine, require_vllm
from forkrl.tasks import open_evaluation_task, open_task
from forkrl.types import Prompt, Task


@dataclass(frozen=True, slots=True)
class Session:
    config: TrainConfig
    workers: Workers
    engine: EmbeddedEngine
    task: Task
    prompts: Sequence[Prompt]
    verifier: VerifierPool | None
    """None if the prompts have no answers."""

    @property
    def policy(self) -> Policy:
        return self.workers.policy

    def waves(self, group_size: int) -> list[Sequence[Prompt]]:
        """Prompts in chunks that fill whole engine batches, so progress shows and no batch is half empty."""
        size = math.lcm(self.engine.wave_sequences, group_size) // group_size
        return [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]


@contextmanager
def open_model(config: TrainConfig) -> Iterator[EmbeddedEngine]:
    """The model with its engine, which is named unless it is PyTorch."""
    if config.rollout.engine == "vllm":  # before loading a model of many gigabytes
        require_vllm()
    policy = open_policy(config.model, config.runtime.device)
    with open_workers(policy, None, config.runtime) as workers:
        engine = open_engine(workers, config)
        if isinstance(engine, VllmEngine):
            notice(f"sampling with vLLM {engine.version}")
        yield engine


@contextmanager
def open_session(subject: Subject) -> Iterator[Session]:
    """Load the model, load and check the prompts, and start workers and verifiers."""
    with ExitStack() as stack:
        engine = stack.enter_context(open_model(subject.config))
        open_it = open_evaluation_task if subject.whole else open_task
        max_tokens = subject.config.rollout.max_prompt_tokens
        task = open_it(subject.config.task, engine.policy.tokenizer, max_prompt_tokens=max_tokens)
        prompts = task.held_out[: subject.limit]
        config = checked_config(subject, engine, prompts)
        verifiers = with_sandbox(task.verifiers, config.sandbox)
        verifier = stack.enter_context(open_verifier(verifiers, config.reward)) if verifiers else None
        yield Session(config, engine.workers, engine, task, prompts, verifier)


def session_settings(session: Session) -> dict[str, Any]:
    """The settings that identify the prompts, the sampling and the verifiers."""
    config = session.config
    formats = {source: spec.answer_format for source, spec in session.task.verifiers.items() if spec.answer_format}
    return {
        "engine": config.rollout.engine,
        "task": session.task.name,
        "data": session.task.fingerprint,
        "verifier": {source: spec.path for source, spec in session.task.verifiers.items()},
        **({"answer_format": formats} if formats else {}),
        "seed": config.seed,
        "max_response_tokens": config.rollout.max_response_tokens,
        "stop": list(config.rollout.stop),
    }


def part_seed(kind: str, seed: int, part: int) -> int:
    """Seed of one part, independent of the parts before it."""
    digest = hashlib.sha256(f"{kind}/{seed}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def checked_config(subject: Subject, engine: EmbeddedEngine, prompts: Sequence[Prompt]) -> TrainConfig:
    """The subject's settings, after checking that every prompt fits and limiting an unset response length."""
    if not subject.bounded:
        return _bounded_by_positions(subject.config, engine, prompts)
    engine.check_prompts(prompts, subject.config.rollout.max_response_tokens)
    return subject.config


def _bounded_by_positions(config: TrainConfig, engine: EmbeddedEngine, prompts: Sequence[Prompt]) -> TrainConfig:
    """The default response length, or less if the model has fewer positions."""
    longest = max((engine.count_tokens(prompt) for prompt in prompts), default=0)
    positions = getattr(engine.policy.model.config, "max_position_embeddings", None)
    if positions is None or longest + config.rollout.max_response_tokens <= positions:
        return config
    limit = {"max_response_tokens": max(positions - longest, 1)}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=limit)})
