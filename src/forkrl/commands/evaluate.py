"""``forkrl eval``: benchmarks, or a recipe's own task, on a model or on a run's newest checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from forkrl.commands.eval_benchmarks import AskedBenchmark, all_verifiers, ask_benchmarks, ask_task, prompt_renderer
from forkrl.commands.eval_engines import EvalEngine, PromptFormat, identity, open_eval_engine
from forkrl.commands.judging import Judging
from forkrl.commands.options import EvalOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.runner import open_work_folder
from forkrl.commands.subject import Subject, open_subject
from forkrl.config import TrainConfig
from forkrl.evaluation.eval_report import write_eval_report
from forkrl.evaluation.folder import RESULTS, SCHEMA, read_results
from forkrl.evaluation.response_files import BenchmarkFiles
from forkrl.evaluation.samplers import EvalSampling
from forkrl.evaluation.summary import summarise_benchmark
from forkrl.model.prompt_tokens import PromptCheck
from forkrl.report.progress import progress
from forkrl.rewards import open_verifier
from forkrl.rewards.pool import VerifierPool
from forkrl.store.atomic import write_json
from forkrl.store.results import command_line
from forkrl.tasks import check_prompts
from forkrl.types import VerifierSpec

BENCHMARK_SAMPLES = 16
"""Responses to each question of a benchmark, as in the paper, unless another number is given."""
_VERSIONED = ("forkrl", "torch", "transformers", "math-verify", "datasets", "vllm")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished evaluation: its folder, ``results.json`` as it stands there, and the page."""

    folder: Path
    results: dict[str, Any]
    page: Path


def evaluate_model(options: EvalOptions) -> Evaluation:
    """Sample what is missing, judge it, summarise; all of it in a folder that the same call goes on with.

    Which prompts without benchmarks: see ``open_subject``. The first ``eval.problems`` of a run are those it was
    evaluated on while it trained, so that the two figures compare. ``rollout.top_p`` and ``top_k`` never apply.
    """
    subject, asked = _subject_and_benchmarks(options)
    prompt_format: PromptFormat = "chat" if subject.config.task.chat_template else "plain"
    with open_eval_engine(subject, options, prompt_format) as engine:
        if asked:
            render = prompt_renderer(prompt_format, engine.tokenizer)
            asked = [benchmark.rendered(render) for benchmark in asked]
            _require_known_characters(asked, engine, subject)
        else:
            asked = ask_task(subject, engine.tokenizer, subject.limit, max_prompt_tokens=engine.max_prompt_tokens)
        config = engine.settings_for([prompt for benchmark in asked for prompt in benchmark.prompts])
        question = _question(subject, engine, config, asked, options)
        with open_work_folder(options.out or _default_folder(options), question) as folder, ExitStack() as stack:
            # All of them before the first is sampled: what cannot go on is refused now.
            files = [
                stack.enter_context(BenchmarkFiles(folder, each.name, each.prompts, question["samples"]))
                for each in asked
            ]
            pool = stack.enter_context(open_verifier(all_verifiers(asked), config.reward))
            for benchmark, file in zip(asked, files, strict=True):
                _evaluate(folder, benchmark, file, question, engine, pool)
            return Evaluation(folder, read_results(folder), write_eval_report(folder))


def _subject_and_benchmarks(options: EvalOptions) -> tuple[Subject, list[AskedBenchmark]]:
    """The model and settings to look at it under, and the benchmarks that were named, their prompts not yet put into
    the engine's form. Everything that needs no model is refused here."""
    subject = open_subject(options)
    if not options.bench:
        return subject, []
    asked = ask_benchmarks(options.bench, options.mirror, _limit(subject, options), subject.config.sandbox)
    for benchmark in asked:
        if benchmark.notice:
            print(f"forkrl: {benchmark.notice}", file=sys.stderr)
    task = subject.config.task.model_copy(update={"chat_template": options.prompt == "chat"})
    return subject._replace(config=subject.config.model_copy(update={"task": task})), asked


def _require_known_characters(asked: Sequence[AskedBenchmark], engine: EvalEngine, subject: Subject) -> None:
    if engine.tokenizer is not None:
        check = PromptCheck(engine.tokenizer, max_tokens=engine.max_prompt_tokens)
        prompts = [prompt for benchmark in asked for prompt in benchmark.prompts]
        check_prompts(prompts, check, allow_unknown=subject.config.task.allow_unknown_tokens)


def _limit(subject: Subject, options: EvalOptions) -> int | None:
    """How many questions, from the first; None: all. A recipe's ``eval.problems`` is for its own task."""
    if not options.bench:
        return subject.limit
    return subject.config.eval.problems if "eval.problems" in subject.given else None


def _default_folder(options: EvalOptions) -> Path:
    folder = parse_reference(options.model).default_folder("benchmarks" if options.bench else "eval")
    return folder if folder.parent.name == "analysis" else Path("evals") / folder.name.removesuffix("-benchmarks")


def _question(
    subject: Subject,
    engine: EvalEngine,
    config: TrainConfig,
    asked: Sequence[AskedBenchmark],
    options: EvalOptions,
) -> dict[str, Any]:
    """Whatever the numbers of a benchmark hang on, but for its questions: those are kept beside its responses, so that
    further benchmarks may join the folder."""
    prompt_format = "chat" if config.task.chat_template else "plain" if options.bench else "template"
    # A benchmark's own go with its name, but for the limits of programs.
    judged = config.sandbox.model_dump(mode="json") if options.bench else _as_json(all_verifiers(asked))
    takes_default = bool(options.bench) and "eval.samples" not in subject.given
    return {
        "schema": SCHEMA,
        **identity(subject, options),
        "task": "" if options.bench else asked[0].title,
        "sandbox" if options.bench else "verifiers": judged,
        "prompt_format": prompt_format,
        "problems": _limit(subject, options),
        "samples": BENCHMARK_SAMPLES if takes_default else config.eval.samples,
        "temperature": config.eval.temperature,
        "seed": config.seed,
        "max_response_tokens": config.rollout.max_response_tokens,
        "rollout.stop": list(config.rollout.stop),
        **engine.facts,
    }


def _evaluate(
    folder: Path,
    benchmark: AskedBenchmark,
    files: BenchmarkFiles,
    question: Mapping[str, Any],
    engine: EvalEngine,
    pool: VerifierPool,
) -> None:
    """Bring one benchmark to its end, and put its figures into ``results.json``."""
    sampling = EvalSampling(
        max_response_tokens=question["max_response_tokens"],
        temperature=question["temperature"],
        seed=question["seed"],
        stop=tuple(question["rollout.stop"]),
    )
    tokens, seconds = _sample_and_judge(files, engine, pool, sampling, benchmark.title)
    earlier = next((each for each in _earlier(folder) if each["name"] == benchmark.name), {})
    figures = {
        "name": benchmark.name,
        "title": benchmark.title,
        "hub": benchmark.hub,
        "revision": benchmark.revision,
        "fingerprint": benchmark.fingerprint,
        "questions": len(benchmark.prompts),
        "available_questions": benchmark.available,
        "expected_questions": benchmark.expected,
        "notice": benchmark.notice,
        "verifiers": _as_json(benchmark.verifiers),
        # Of the last call that sampled anything.
        "seconds": seconds if tokens else earlier.get("seconds", 0.0),
        "tokens_per_s": tokens / seconds if tokens else earlier.get("tokens_per_s"),
        **summarise_benchmark(files.scored(), question["samples"]),
    }
    # What could not be judged has just been tried, if by an earlier call too.
    figures["first_failure"] = next(iter(pool.first_failures.values()), "") if figures["failures"] else ""
    _write_results(folder, question, figures)


def _sample_and_judge(
    files: BenchmarkFiles, engine: EvalEngine, pool: VerifierPool, sampling: EvalSampling, title: str
) -> tuple[int, float]:
    """Sample and judge what is missing; returns the tokens sampled, and the seconds it took."""
    missing = files.missing()
    if 0 < len(missing) < len(files.grid):
        kept = len(files.grid) - len(missing)
        print(f"forkrl: {title}: {kept} of {len(files.grid)} responses are there already", file=sys.stderr)
    began, tokens = time.monotonic(), 0
    with Judging(pool, files) as judging:
        for request, text in files.unjudged():
            judging.add(request, text)
        responses, before = engine.sampler(files.grid).sample(missing, sampling), engine.finished()
        for sampled in progress(
            responses, f"{title}: responses", total=len(missing), finished=lambda: engine.finished() - before
        ):
            files.add_response(sampled)
            judging.add(sampled.request, sampled.text)
            tokens += sampled.tokens
        seconds = time.monotonic() - began
        judging.finish()
    return tokens, seconds


def _write_results(folder: Path, question: Mapping[str, Any], figures: dict[str, Any]) -> None:
    """Put a benchmark's figures among those that the folder has."""
    benchmarks = {each["name"]: each for each in _earlier(folder)} | {figures["name"]: figures}
    results = {
        "schema": SCHEMA,
        "model": question["model"],
        "engine": question["engine"],
        "command": command_line(),
        "seed": question["seed"],
        "temperature": question["temperature"],
        "samples": question["samples"],
        "max_response_tokens": question["max_response_tokens"],
        "prompt_format": question["prompt_format"],
        "versions": {name: found for name in _VERSIONED if (found := _version(name))},
        "benchmarks": list(benchmarks.values()),
    }
    write_json(folder / RESULTS, results)


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """The figures of the benchmarks that the folder holds already."""
    return list(read_results(folder)["benchmarks"]) if (folder / RESULTS).exists() else []


def _as_json(verifiers: Mapping[str, VerifierSpec]) -> dict[str, Any]:
    return {source: [spec.path, dict(spec.options)] for source, spec in verifiers.items()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
