"""The tokens a command looks at: of responses generated or given, each measured, kept part by part in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.commands.options import AnalyzeOptions, DriftOptions
from forkrl.commands.ready_responses import ReadyResponses
from forkrl.commands.runner import open_work_folder, stored_question, weights_fingerprint
from forkrl.commands.session import open_session
from forkrl.commands.subject import ALLOW_UNKNOWN, Subject, open_subject
from forkrl.commands.token_parts import GeneratedResponses, write_missing_parts
from forkrl.errors import UserError, notice
from forkrl.model.policy import open_policy
from forkrl.parallel.workers import open_workers


class Request(NamedTuple):
    """Which responses to measure; sampled with the subject's settings unless they are in a file."""

    subject: Subject
    responses: Path | None
    skip_unusable: bool

    @property
    def temperature(self) -> float:
        """Of sampling."""
        return self.subject.config.eval.temperature

    @property
    def entropy_temperature(self) -> float:
        """At which entropies are measured: those of greedy responses are at temperature 1."""
        return self.temperature or 1.0


def make_request(options: AnalyzeOptions | DriftOptions) -> Request:
    """The request that the options of a command make; those without effect are refused."""
    subject, responses = open_subject(options), options.responses
    if responses is not None:
        given = [f"--{name}" for name in ("problems", "samples") if getattr(options, name) is not None]
        unread = ("task.", "rollout.", "reward.", "eval.problems", "eval.samples", "seed")
        given += [override for override in options.all_overrides if _is_unread(override, unread)]
        if given:
            raise UserError(f"{given[0]}: has no effect along with --responses {responses}: nothing is generated")
    elif options.skip_unusable:
        raise UserError("--skip-unusable: has no effect without --responses")
    return Request(subject, responses, options.skip_unusable)


def _is_unread(override: str, unread: tuple[str, ...]) -> bool:
    return override.startswith(unread) and override.partition("=")[0].strip() != ALLOW_UNKNOWN


def collect_tokens(folder: Path, request: Request, question: Mapping[str, Any]) -> list[str]:
    """Fill ``tokens/`` and ``responses/`` in the folder, from where an earlier session stopped.

    Args:
        folder: of the work; refused if it holds the answer to another question.
        request: which responses.
        question: what more the command asks; its ``schema`` is among it.

    Returns:
        Sentences on what was left out.
    """
    config = request.subject.config
    asked = {
        **question,
        "model": request.subject.name,
        "weights": config.model.path,
        "revision": config.model.revision,
        "fingerprint": weights_fingerprint(config.model.path),
        "precision": config.model.precision,
        "temperature": request.temperature,
    }
    if request.responses is not None:
        return _measure_ready(folder, request, request.responses, asked)
    _measure_generated(folder, request, asked)
    return []


def _measure_generated(folder: Path, request: Request, asked: dict[str, Any]) -> None:
    """Sample, judge and measure what is not in the folder yet."""
    samples = request.subject.config.eval.samples
    with open_session(request.subject) as session:
        earlier = stored_question(folder).get("prompts_per_part")
        asked |= {
            "data": session.task.fingerprint,
            "prompts": len(session.prompts),
            "samples": samples,
            "seed": session.config.seed,
            "max_response_tokens": session.config.rollout.max_response_tokens,
            "stop": list(session.config.rollout.stop),
            # An earlier session's cut stands: it decides which responses share a generator, and another number of
            # workers may be at work now.
            "prompts_per_part": earlier or max(session.engine.wave_sequences // samples, 1),
        }
        with open_work_folder(folder, asked):
            source = GeneratedResponses(session, samples, request.temperature, asked["prompts_per_part"])
            write_missing_parts(folder, source, session.workers, request.entropy_temperature)


def _measure_ready(folder: Path, request: Request, responses: Path, asked: dict[str, Any]) -> list[str]:
    """Measure the ready responses that are not in the folder yet."""
    config = request.subject.config
    policy = open_policy(config.model, config.runtime.device)
    source = ReadyResponses(
        responses,
        policy,
        skip_unusable=request.skip_unusable,
        templated=_is_templated(request.subject),
        allow_unknown=config.task.allow_unknown_tokens,
    )
    asked |= {"responses": str(responses), "data": source.fingerprint}
    with ExitStack() as stack:
        stack.enter_context(open_work_folder(folder, asked))
        workers = stack.enter_context(open_workers(policy, None, config.runtime))
        write_missing_parts(folder, source, workers, request.entropy_temperature)
    if not source.skipped.count:
        return []
    sentence = f"{source.skipped.count} rows of {responses.name} could not be used and are left out"
    notice(f"{sentence}:\n{source.skipped.listing()}")
    return [f"{sentence}; {source.skipped.first}"]


def _is_templated(subject: Subject) -> bool:
    """Whether the prompts that the subject reads come from a chat template: those of a run that uses one."""
    parts = subject.config.task.parts or (subject.config.task,)
    return subject.run is not None and all(part.chat_template for part in parts)
