"""``forkrl eval``: a model on a prompt file or on held-out problems, or a run's newest checkpoint on its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forkrl.atomic import write_json
from forkrl.commands.subject import Session, open_session, open_subject
from forkrl.errors import UserError
from forkrl.evaluation.held_out import evaluation_generator, evaluation_sampling, sample_and_score, summarise
from forkrl.progress import progress
from forkrl.types import RolloutGroup


def evaluate_model(
    model: str,
    *,
    recipe: Path | None,
    overrides: Sequence[str],
    problems: int | None,
    samples: int | None,
    temperature: float | None,
    out: Path | None,
) -> dict[str, Any]:
    """Sample, score, summarise; returns the figures, and writes them to ``out`` as JSON.

    Which prompts: see ``open_subject``. The first ``eval.problems`` of a run are those it was evaluated on while it
    trained, so that the two figures compare.

    Args:
        model: a model folder or hub id, or a run folder: its newest checkpoint, with the run's own settings.
        recipe: where task, rollout and reward settings come from otherwise.
        overrides: ``section.key=value``.
        problems: prompts, from the first. None: ``eval.problems``, or of a data set that is evaluated whole, all
            (there only an override sets ``eval.problems``: a recipe's bounds the time of training's evaluations).
        samples: responses to each; None: ``eval.samples``.
        temperature: of sampling, 0 is greedy; None: ``eval.temperature``. ``rollout.top_p`` and ``top_k`` never apply.
        out: JSON file, or None.

    Raises:
        UserError: the model, the data or a setting cannot be used, an override has no effect, or ``out`` cannot be
            written; all before the first response is sampled.
    """
    if out is not None:
        _check_out(out)
    arguments = {"problems": problems, "samples": samples, "temperature": temperature}
    subject = open_subject(model, recipe=recipe, overrides=overrides, arguments=arguments, activity="an evaluation")
    num_samples = subject.config.eval.samples if samples is None else samples
    temperature = subject.config.eval.temperature if temperature is None else temperature
    with open_session(subject, problems) as session:
        groups = _sample_all(session, num_samples, temperature)
    task = session.task
    figures = {
        "schema": "forkrl-eval/1",
        "model": model,
        "task": task.name,
        "prompts": "all" if subject.whole and subject.config.task.name == "dataset" else "held-out",
        "problems_available": len(task.held_out),
        "data_fingerprint": task.fingerprint,
        "seed": subject.config.seed,
        "temperature": temperature,
        **summarise(groups),
    }
    if out is not None:
        write_json(out, figures)
    return figures


def describe_figures(figures: dict[str, Any]) -> str:
    """The figures as a few lines for a person."""
    problems, samples, available = (int(figures[name]) for name in ("problems", "samples", "problems_available"))
    share = f"all {problems}" if problems == available else f"the first {problems} of {available}"
    kind = "held-out problems" if figures["prompts"] == "held-out" else "problems"
    lines = [
        f"{figures['model']} on {share} {kind} of {figures['task']}, {samples} response(s) each, "
        f"temperature {figures['temperature']:g}",
        f"accuracy (avg@{samples})  {_with_interval(figures, 'accuracy')}",
    ]
    names = (name for name in figures if name.startswith("pass@") and name.count("_") == 0)
    lines += [f"{name:18}  {_with_interval(figures, name)}" for name in names]
    lines.append(
        f"mean length {figures['length']:.1f} tokens, {figures['truncated_fraction']:.1%} cut at the limit, "
        f"mean entropy {figures['entropy']:.3f} nats"
    )
    if figures["verifier_failures"]:
        lines.append(f"{figures['verifier_failures']:.0f} responses could not be verified and count as wrong")
    return "\n".join(lines)


def _with_interval(figures: dict[str, Any], name: str) -> str:
    return f"{figures[name]:.3f}  95% [{figures[name + '_low']:.3f}, {figures[name + '_high']:.3f}]"


def _sample_all(session: Session, num_samples: int, temperature: float) -> list[RolloutGroup]:
    """All responses with their verdicts."""
    if session.verifier is None:
        raise UserError(f"{session.task.name}: its rows have no answers, so nothing can be judged")
    sampling = evaluation_sampling(session.config, temperature, session.policy)
    generator = evaluation_generator(session.config, session.policy.device)
    groups: list[RolloutGroup] = []
    for wave in progress(session.waves(num_samples), "evaluating"):
        groups += sample_and_score(
            session.engine, session.verifier, wave, group_size=num_samples, sampling=sampling, generator=generator
        )
    return groups


def _check_out(out: Path) -> None:
    """Refuse before hours of sampling what could not be written after them."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: the folder {out.parent} may not be written; choose another")
