"""``forkrl analyze``: where a model forks (arXiv 2506.01939v2, section 3), on its own responses or on given ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl import analysis
from forkrl.atomic import write_text
from forkrl.commands.ready_responses import ReadyResponses
from forkrl.commands.subject import Subject, open_session, open_subject
from forkrl.commands.token_parts import GeneratedResponses, read_responses, write_missing_parts
from forkrl.commands.work_folder import default_folder, open_work_folder, weights_fingerprint
from forkrl.errors import UserError
from forkrl.intervals import ClusterSums, Estimate
from forkrl.model import open_policy
from forkrl.progress import printable
from forkrl.replicas import open_replicas

SCHEMA = "forkrl-analysis/1"


@dataclass(frozen=True, slots=True)
class Analysis:
    """What an analysis found, beside the tables of tokens and responses in ``folder``."""

    folder: Path
    facts: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    notes: list[str]

    @property
    def threshold(self) -> float:
        """Entropy above which a token is a fork, in nats."""
        return float(self.facts["threshold"])


def analyze_model(
    model: str,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    responses: Path | None = None,
    skip_unusable: bool = False,
    problems: int | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    threshold: float | None = None,
    min_count: int = 100,
    out: Path | None = None,
) -> Analysis:
    """Generate (or read) responses, measure every token, and find the patterns of the paper and some more.

    Work is kept part by part in ``out``: the same call goes on where an interrupted one stopped, and one that finished
    only makes its tables anew.

    Args:
        model: a model folder or hub id, or a run folder: its newest checkpoint. Which prompts: see ``open_subject``.
        recipe: where task and rollout settings come from, unless ``model`` is a run.
        overrides: ``section.key=value``.
        responses: a JSONL file of ready responses (see ``ReadyResponses``); then nothing is generated.
        skip_unusable: of it, leave out rows that cannot be used.
        problems: prompts, from the first; None: what the settings say.
        samples: responses to each; None: ``eval.samples``.
        temperature: of sampling and of the distribution measured; 0 samples greedily and measures at 1.
            None: ``eval.temperature``.
        threshold: entropy above which a token is a fork, in nats; None: the 80th percentile found.
        min_count: types and contexts seen less often are left out of the tables.
        out: folder; None: ``RUN/analysis/analyze`` or ``analyses/NAME-analyze``.

    Raises:
        UserError: model, data, responses, a setting or the folder cannot be used.
    """
    if min_count < 1:
        raise UserError(f"--min-count {min_count}: at least 1")
    if threshold is not None and not 0 <= threshold < float("inf"):
        raise UserError(f"--threshold {threshold}: an entropy in nats, at least 0")
    arguments = {"problems": problems, "samples": samples, "temperature": temperature}
    subject = open_subject(model, recipe=recipe, overrides=overrides, arguments=arguments, activity="an analysis")
    temperature = subject.config.eval.temperature if temperature is None else temperature
    samples_each = subject.config.eval.samples if samples is None else samples
    folder = out or default_folder(model, "analyze")
    if responses is None:
        notes = _measure_generated(subject, folder, problems, samples_each, temperature)
    else:
        _require_only_responses(responses, problems, samples, overrides)
        notes = _measure_ready(subject, folder, responses, temperature, skip_unusable)
    return summarise(folder, threshold, min_count, notes)


def summarise(folder: Path, threshold: float | None, min_count: int, notes: list[str]) -> Analysis:
    """Make every table from the parts in ``folder``, and write them: ``tables/*.csv`` and ``analysis.json``."""
    tokens = folder / "tokens"
    summary = analysis.entropy_summary(tokens)
    fork = float(summary["value"]["percentile_80"]) if threshold is None else threshold
    per_response = analysis.response_table(tokens, fork)
    tables = {
        "summary": summary,
        "histogram": analysis.entropy_histogram(tokens),
        "types": analysis.token_types(tokens, min_count, fork),
        "contexts": analysis.fork_contexts(tokens, fork, min_count=min_count),
        "positions": analysis.fork_positions(tokens, fork),
        "correctness": analysis.correct_against_incorrect(tokens, fork),
        "density": analysis.density_against_correctness(per_response),
        "responses": per_response,
    }
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    facts = {
        "schema": SCHEMA,
        "model": settings["model"],
        "threshold": fork,
        "threshold_is": "given" if threshold is not None else "the 80th percentile",
        "min_count": min_count,
        "prompts": int(per_response["prompt"].nunique()),
        "responses": len(per_response),
        **_outcomes(folder),
        **{name: float(value) for name, value in summary["value"].items()},
    }
    (folder / "tables").mkdir(exist_ok=True)
    for name, table in tables.items():
        write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=name == "summary"))
    write_text(folder / "analysis.json", json.dumps(facts, indent=2) + "\n")
    return Analysis(folder, facts, tables, notes)


def describe_analysis(found: Analysis) -> str:
    """The main figures as a few lines for a person."""
    facts, types = found.facts, found.tables["types"]
    lines = [
        f"{facts['model']}: {facts['tokens']:,.0f} tokens of {facts['responses']:,} responses "
        f"to {facts['prompts']:,} prompts",
        f"entropy below 0.01 nats  {facts['share_below_0.01']:.2%} of tokens  (the paper's Qwen3-8B: 50.64%)",
        f"80th percentile          {facts['percentile_80']:.3f} nats  (the paper's Qwen3-8B: 0.672)",
    ]
    if facts["accuracy"] is not None:
        interval = f"95% [{facts['accuracy_low']:.3f}, {facts['accuracy_high']:.3f}]"
        lines.append(f"accuracy                 {facts['accuracy']:.3f}  {interval}")
    if types.empty:
        lines.append(f"no token type was seen {facts['min_count']} times: lower --min-count for tables of types")
    else:
        lines.append(f"highest mean entropy     {_listed(types.head(8))}")
        lines.append(f"lowest mean entropy      {_listed(types.tail(8)[::-1])}")
    return "\n".join([*lines, *found.notes])


def _listed(types: pd.DataFrame) -> str:
    return "  ".join(
        f"{printable(text)!r} {mean:.2f}" for text, mean in zip(types["text"], types["mean_entropy"], strict=True)
    )


def _measure_generated(
    subject: Subject, folder: Path, problems: int | None, num_samples: int, temperature: float
) -> list[str]:
    """Sample, judge and measure what is not in the folder yet."""
    with open_session(subject, problems) as session:
        question = {
            **_common_question(subject, temperature),
            "data": session.task.fingerprint,
            "prompts": len(session.prompts),
            "samples": num_samples,
            "seed": session.config.seed,
            "max_response_tokens": session.config.rollout.max_response_tokens,
            "stop": list(session.config.rollout.stop),
            # Part of the question: it decides which responses share a generator.
            "prompts_per_part": _prompts_per_part(folder, len(session.waves(num_samples)[0])),
        }
        with open_work_folder(folder, question):
            source = GeneratedResponses(session, num_samples, temperature, question["prompts_per_part"])
            write_missing_parts(folder, source, session.replicas, temperature or 1.0)
    return []


def _measure_ready(
    subject: Subject, folder: Path, responses: Path, temperature: float, skip_unusable: bool
) -> list[str]:
    """Measure the ready responses that are not in the folder yet."""
    policy = open_policy(subject.config.model, subject.config.runtime.device)
    source = ReadyResponses(responses, policy, skip_unusable=skip_unusable)
    question = {
        **_common_question(subject, temperature),
        "responses": str(responses),
        "data": source.fingerprint,
    }
    with ExitStack() as stack:
        stack.enter_context(open_work_folder(folder, question))
        replicas = stack.enter_context(open_replicas(policy, None, subject.config.runtime))
        write_missing_parts(folder, source, replicas, temperature or 1.0)
    if not source.skipped:
        return []
    return [f"{len(source.skipped)} rows of {responses.name} could not be used and are left out; {source.skipped[0]}"]


def _common_question(subject: Subject, temperature: float) -> dict[str, Any]:
    config = subject.config
    return {
        "schema": SCHEMA,
        "model": subject.name,
        "weights": config.model.path,
        "revision": config.model.revision,
        "fingerprint": weights_fingerprint(config.model.path),
        "precision": config.model.precision,
        "temperature": temperature,
    }


def _prompts_per_part(folder: Path, default: int) -> int:
    """What an earlier session on this folder took, for another number of replicas may be at work now."""
    try:
        stored = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
    earlier = stored.get("prompts_per_part")
    return earlier if isinstance(earlier, int) and earlier > 0 else default


def _require_only_responses(
    responses: Path, problems: int | None, samples: int | None, overrides: Sequence[str]
) -> None:
    given = [f"--{name}" for name, value in (("problems", problems), ("samples", samples)) if value is not None]
    given += [
        override for override in overrides if override.startswith(("task.", "rollout.", "reward.", "eval.", "seed"))
    ]
    if given:
        raise UserError(f"{given[0]}: has no effect along with --responses {responses}, where nothing is generated")


def _outcomes(folder: Path) -> dict[str, Any]:
    """Accuracy with its interval, and the shares cut at the limit and not judged; None where nobody knows."""
    responses = read_responses(folder, ["number", "finished", "correct", "failure"])
    accuracy = Estimate(float("nan"), float("nan"), float("nan"))
    judged = responses[responses["correct"].notna()]
    sums = ClusterSums(2)
    for _, group in judged.groupby("number"):
        sums.add([float(group["correct"].astype(float).sum()), len(group)])
    if len(judged):
        accuracy = sums.share(0, 1)
    known = responses["finished"].dropna()
    values = {
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "truncated_fraction": float((~known.astype(bool)).mean()) if len(known) else float("nan"),
    }
    figures: dict[str, Any] = {name: None if value != value else value for name, value in values.items()}
    return figures | {"judged": len(judged), "verifier_failures": int((responses["failure"] != "").sum())}


def write_analysis_report(found: Analysis) -> Path:
    return found.folder / "report.html"
