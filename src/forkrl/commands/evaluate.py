"""An evaluation of a model or a run's newest checkpoint, on benchmarks or on a recipe's own task."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import pandas as pd

from forkrl.commands.eval_engines import engine_facts, identity, open_sampler, settings_for
from forkrl.commands.options import EvalOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.subject import Subject, open_subject
from forkrl.commands.work_folder import open_work_folder, say_kept
from forkrl.config import TrainConfig
from forkrl.errors import UserError, notice
from forkrl.evaluation.folder import SCHEMA, BenchmarkFiles, read_results
from forkrl.evaluation.paper import TABLE_2
from forkrl.evaluation.questions import Questions, benchmark_questions, prompt_renderer, task_questions
from forkrl.evaluation.samplers import EvalSampling, Sampler, SampleRequest
from forkrl.evaluation.shelves import read_shelves, unanswered_responses
from forkrl.evaluation.summary import mean_over_benchmarks, summarise_benchmark
from forkrl.model.prompt_tokens import PromptCheck
from forkrl.report.eval_page import eval_headline, eval_notes, eval_page
from forkrl.report.page import Page
from forkrl.report.progress import progress
from forkrl.rewards import open_verifier
from forkrl.rewards.pool import VerifierPool
from forkrl.store.results import RESULTS, Results, write_results
from forkrl.tasks import check_prompts
from forkrl.types import FAILURES, VerifierResult, VerifierSpec

BENCHMARK_SAMPLES = 16
"""Default responses per question of a benchmark, as in the paper."""
_BENCH_REMEDY = "a benchmark's form is fixed; try --prompt chat, or a higher rollout.max_response_tokens"


def evaluate_model(options: EvalOptions) -> Results:
    """Sample what is missing, judge it and summarise; the same call resumes.

    ``open_subject`` says which prompts are used without benchmarks. For a run, the first ``eval.problems`` are those of
    its training-time evaluation, so the accuracies are comparable. ``rollout.top_p`` and ``top_k`` never apply.
    """
    subject, asked = _subject_and_benchmarks(options)
    prompt_format: Literal["plain", "chat"] = "chat" if subject.config.task.chat_template else "plain"
    with open_sampler(subject, options, prompt_format) as sampler:
        tokenizer, longest = sampler.tokenizer, sampler.max_prompt_tokens
        if asked:
            render = prompt_renderer(prompt_format, tokenizer)
            asked = [questions.rendered(render) for questions in asked]
        else:
            asked = task_questions(
                subject.config.task, tokenizer, subject.limit, whole=subject.whole, max_prompt_tokens=longest
            )
        prompts = [prompt for questions in asked for prompt in questions.prompts]
        if options.bench and tokenizer is not None:
            check = PromptCheck(tokenizer, max_tokens=longest)
            check_prompts(prompts, check, allow_unknown=subject.config.task.allow_unknown_tokens)
        config = settings_for(subject, sampler, prompts)
        settings = _settings(subject, config, asked, options) | engine_facts(subject, sampler)
        with open_work_folder(options.out or _default_folder(options), settings) as folder, ExitStack() as stack:
            # Open all files before sampling: a folder that cannot be resumed fails now.
            files = [
                stack.enter_context(BenchmarkFiles(folder, each.name, each.prompts, settings["samples"]))
                for each in asked
            ]
            pool = stack.enter_context(
                open_verifier(_verifiers(asked), config.reward, remedy=_BENCH_REMEDY if options.bench else "")
            )
            for questions, file in zip(asked, files, strict=True):
                results = _evaluate(folder, questions, file, settings, sampler, pool)
    return results


def make_page(results: Results) -> Page:
    return eval_page(results, read_shelves(results.folder), TABLE_2)


def _subject_and_benchmarks(options: EvalOptions) -> tuple[Subject, list[Questions]]:
    """Everything that can be rejected without loading the model is rejected here; prompts are not rendered yet."""
    subject = open_subject(options)
    if not options.bench:
        return subject, []
    asked = benchmark_questions(options.bench, options.mirror, _limit(subject, options), subject.config.sandbox)
    for questions in asked:
        if questions.notice:
            print(f"forkrl: {questions.notice}", file=sys.stderr)
    task = subject.config.task.model_copy(update={"chat_template": options.prompt == "chat"})
    return subject._replace(config=subject.config.model_copy(update={"task": task})), asked


def _limit(subject: Subject, options: EvalOptions) -> int | None:
    """How many questions to take from the start; None: all. A recipe's ``eval.problems`` is for its own task."""
    if not options.bench:
        return subject.limit
    return subject.config.eval.problems if "eval.problems" in subject.given else None


def _default_folder(options: EvalOptions) -> Path:
    folder = parse_reference(options.model).default_folder("benchmarks" if options.bench else "eval")
    return folder if folder.parent.name == "analysis" else Path("evals") / folder.name.removesuffix("-benchmarks")


def _settings(
    subject: Subject, config: TrainConfig, asked: Sequence[Questions], options: EvalOptions
) -> dict[str, Any]:
    """Every setting that changes the numbers. Questions are stored separately, so a folder can gain benchmarks."""
    # A benchmark's name determines its verifiers, except for the limits of programs.
    judged = config.sandbox.model_dump(mode="json") if options.bench else _as_json(_verifiers(asked))
    takes_default = bool(options.bench) and "eval.samples" not in subject.given
    return {
        "schema": SCHEMA,
        **identity(subject, options),
        "task": "" if options.bench else asked[0].title,
        "sandbox" if options.bench else "verifiers": judged,
        "prompt_format": "chat" if config.task.chat_template else "plain" if options.bench else "template",
        "problems": _limit(subject, options),
        "samples": BENCHMARK_SAMPLES if takes_default else config.eval.samples,
        "temperature": config.eval.temperature,
        "seed": config.seed,
        "max_response_tokens": config.rollout.max_response_tokens,
        "rollout.stop": list(config.rollout.stop),
    }


def _evaluate(
    folder: Path,
    questions: Questions,
    files: BenchmarkFiles,
    settings: Mapping[str, Any],
    sampler: Sampler,
    pool: VerifierPool,
) -> Results:
    """Finish one benchmark and write the results of all benchmarks in the folder."""
    sampling = EvalSampling(
        max_response_tokens=settings["max_response_tokens"],
        temperature=settings["temperature"],
        seed=settings["seed"],
        stop=tuple(settings["rollout.stop"]),
    )
    total = len(files.grid)
    say_kept(total - len(files.missing()), total, f"responses to {questions.title}", folder)
    tokens, seconds = _sample_and_judge(files, sampler, pool, sampling, questions.title)
    tables = summarise_benchmark(questions.name, files.scored(), settings["samples"])
    tables["unanswered"] = unanswered_responses(folder, questions.name, files.scored())
    earlier = _earlier_results(folder)
    verifiers = {questions.name: _as_json(questions.verifiers)}
    rows = [] if earlier is None else earlier.tables["benchmarks"].to_dict("records")
    before: dict[Any, Any] = next((row for row in rows if row["benchmark"] == questions.name), {})
    (figures,) = tables["benchmarks"]
    # Unjudged responses have just been retried, even those of an earlier call.
    failed = any(figures[f"failed_{reason}"] for reason in FAILURES)
    figures = {
        "benchmark": questions.name,
        "title": questions.title,
        **figures,
        "available_questions": questions.available_questions,
        "expected_questions": questions.expected_questions,
        "hub": questions.hub,
        "revision": questions.revision,
        "fingerprint": questions.fingerprint,
        "notice": questions.notice,
        "first_failure": next(iter(pool.first_failures.values()), "") if failed else "",
        # From the last call that sampled anything.
        "seconds": seconds if tokens else before.get("seconds", 0.0),
        "tokens_per_s": tokens / seconds if tokens else before.get("tokens_per_s", math.nan),
    }
    tables["benchmarks"] = [figures]
    if earlier is not None:
        verifiers = earlier.facts["verifiers"] | verifiers
        none = pd.DataFrame()  # an older version wrote fewer tables
        tables = {
            name: _replaced(earlier.tables.get(name, none), found, questions.name) for name, found in tables.items()
        }
    tables["mean"] = mean_over_benchmarks(tables["benchmarks"])
    frames = {name: pd.DataFrame(found) for name, found in tables.items()}
    return write_results(
        folder,
        SCHEMA,
        settings=settings,
        headline=eval_headline(frames["benchmarks"], frames["mean"]),
        notes=eval_notes(frames["benchmarks"]),
        facts={"verifiers": verifiers},
        tables=frames,
    )


def _earlier_results(folder: Path) -> Results | None:
    """Results in the folder. Damaged ones are dropped: the same command for the other benchmarks restores them."""
    try:
        return read_results(folder) if (folder / RESULTS).exists() else None
    except UserError as error:
        notice(f"{error} for each of the other benchmarks")
        return None


def _replaced(table: pd.DataFrame, rows: Sequence[dict[str, Any]], benchmark: str) -> list[dict[Any, Any]]:
    """The table's rows with those of a benchmark replaced in their place, or appended."""
    old = table.to_dict("records")
    place = next((index for index, row in enumerate(old) if row["benchmark"] == benchmark), len(old))
    return [*old[:place], *rows, *(row for row in old[place:] if row["benchmark"] != benchmark)]


def _sample_and_judge(
    files: BenchmarkFiles, sampler: Sampler, pool: VerifierPool, sampling: EvalSampling, title: str
) -> tuple[int, float]:
    """Sample and judge what is missing, concurrently; return the tokens sampled and the seconds taken."""
    missing = files.missing()
    pending: dict[Future[list[VerifierResult]], SampleRequest] = {}
    judged: SimpleQueue[Future[list[VerifierResult]]] = SimpleQueue()

    def judge(request: SampleRequest, text: str) -> None:
        future = pool.submit([(request.prompt, text)])
        pending[future] = request
        future.add_done_callback(judged.put)
        while not judged.empty():
            store_next()

    def store_next() -> None:
        future = judged.get()
        (result,) = future.result()
        files.add_result(pending.pop(future), result)

    began, tokens = time.monotonic(), 0
    try:
        for request, text in files.unjudged():
            judge(request, text)
        responses = sampler.sample(missing, sampling, files.grid)
        for sampled in progress(responses, f"{title}: responses", **sampler.shown(missing, files.grid)):
            files.add_response(sampled)
            judge(sampled.request, sampled.text)
            tokens += sampled.tokens
        seconds = time.monotonic() - began
        for _ in progress(range(len(pending)), "judging the last"):
            store_next()
    finally:
        for future in pending:
            future.cancel()
    return tokens, seconds


def _verifiers(asked: Sequence[Questions]) -> dict[str, VerifierSpec]:
    return {source: spec for questions in asked for source, spec in questions.verifiers.items()}


def _as_json(verifiers: Mapping[str, VerifierSpec]) -> dict[str, Any]:
    return {
        source: [spec.path, dict(spec.options), *([spec.answer_format] if spec.answer_format else [])]
        for source, spec in verifiers.items()
    }
