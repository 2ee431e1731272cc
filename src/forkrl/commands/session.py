"""An open model with its prompts, and what samples and judges: what commands work with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from forkrl.commands.subject import Subject
from forkrl.config import TrainConfig
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.workers import Workers, open_workers
from forkrl.rewards import open_verifier
from forkrl.rewards.code import with_sandbox
from forkrl.rewards.pool import VerifierPool
from forkrl.rollout import open_engine
from forkrl.rollout.embedded import EmbeddedEngine
from forkrl.tasks import open_evaluation_task, open_task
from forkrl.types import Prompt, Task


@dataclass(frozen=True, slots=True)
class Session:
    """An open model with its prompts, and what samples and judges."""

    config: TrainConfig
    workers: Workers
    engine: EmbeddedEngine
    task: Task
    prompts: Sequence[Prompt]
    verifier: VerifierPool | None
    """None where the prompts have no answers: nothing can be judged."""

    @property
    def policy(self) -> Policy:
        return self.workers.policy

    def waves(self, group_size: int) -> list[Sequence[Prompt]]:
        """The prompts in parts that fill whole batches of the engine: progress is seen, and no batch is left half
        empty."""
        size = math.lcm(self.engine.wave_sequences, group_size) // group_size
        return [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]


@contextmanager
def open_model(subject: Subject) -> Iterator[Workers]:
    """Load the model and start its workers."""
    policy = open_policy(subject.config.model, subject.config.runtime.device)
    with open_workers(policy, None, subject.config.runtime) as workers:
        yield workers


@contextmanager
def open_session(subject: Subject) -> Iterator[Session]:
    """Load the model and its prompts, check every prompt, and start workers and verifiers."""
    with ExitStack() as stack:
        workers = stack.enter_context(open_model(subject))
        open_it = open_evaluation_task if subject.whole else open_task
        max_tokens = subject.config.rollout.max_prompt_tokens
        task = open_it(subject.config.task, workers.policy.tokenizer, max_prompt_tokens=max_tokens)
        prompts = task.held_out[: subject.limit]
        engine = open_engine(workers, subject.config)
        config = checked_config(subject, engine, prompts)
        verifiers = with_sandbox(task.verifiers, config.sandbox)
        verifier = stack.enter_context(open_verifier(verifiers, config.reward)) if verifiers else None
        yield Session(config, workers, engine, task, prompts, verifier)


def session_settings(session: Session) -> dict[str, Any]:
    """The settings that name the prompts, the sampling and the verifiers."""
    config = session.config
    return {
        "task": session.task.name,
        "data": session.task.fingerprint,
        "verifier": {source: spec.path for source, spec in session.task.verifiers.items()},
        "seed": config.seed,
        "max_response_tokens": config.rollout.max_response_tokens,
        "stop": list(config.rollout.stop),
    }


def part_seed(kind: str, seed: int, part: int) -> int:
    """The seed of one part of the work, which therefore does not depend on the parts before it."""
    digest = hashlib.sha256(f"{kind}/{seed}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def graphs_fact(config: TrainConfig) -> dict[str, bool]:
    """Recorded only if on, so that work folders without CUDA graphs stay resumable."""
    return {"rollout.cuda_graphs": True} if config.rollout.cuda_graphs else {}


def checked_config(subject: Subject, engine: EmbeddedEngine, prompts: Sequence[Prompt]) -> TrainConfig:
    """The subject's settings, once every prompt is found to fit; with the length of responses that the model's
    positions leave, where none was chosen.
    """
    if not subject.bounded:
        return _bounded_by_positions(subject.config, engine, prompts)
    engine.check_prompts(prompts, subject.config.rollout.max_response_tokens)
    return subject.config


def _bounded_by_positions(config: TrainConfig, engine: EmbeddedEngine, prompts: Sequence[Prompt]) -> TrainConfig:
    """No length of responses was chosen: the default, or as much as the model has positions for."""
    longest = max((engine.count_tokens(prompt) for prompt in prompts), default=0)
    positions = getattr(engine.policy.model.config, "max_position_embeddings", None)
    if positions is None or longest + config.rollout.max_response_tokens <= positions:
        return config
    limit = {"max_response_tokens": max(positions - longest, 1)}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=limit)})
