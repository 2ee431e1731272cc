"""The checks of ``forkrl preview`` that need no model: golds, duplicates, overlap, lengths. Records are JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from forkrl.config import RewardConfig, TaskConfig, TrainConfig
from forkrl.config.secret_values import is_address
from forkrl.evaluation.benchmarks import BENCHMARKS, CODE
from forkrl.evaluation.questions import local_questions
from forkrl.model.prompt_tokens import prompt_token_ids
from forkrl.report.progress import progress
from forkrl.rewards import open_verifier
from forkrl.rewards.answer_format import VERIFIERS_OF_ANSWERS
from forkrl.rewards.code.test_cases import CODE_VERIFIER
from forkrl.tasks.checks import Gold, gold_of, gold_verifier, prompts_with, repeated_questions, summarise_lengths
from forkrl.types import Prompt, Task, VerifierResult, VerifierSpec

_VERIFIED_AT_ONCE = 512
_FIRST = 3
Record = dict[str, Any]


def check_data(config: TrainConfig, task: Task, tokenizer: PreTrainedTokenizerBase, mirror: Path | None) -> Record:
    """Counts, duplicates, overlap, lengths and golds of a task, and the ``problems`` that make it unusable."""
    lengths = _check_lengths([*task.train, *task.held_out], tokenizer, config.rollout.max_prompt_tokens)
    golds = check_golds(parts_of(config.task), task, config.reward)
    repeated = repeated_questions(task.train)
    shared = repeated_questions(task.train, task.held_out)
    return {
        "task": task.name,
        "training": len(task.train),
        "held_out": len(task.held_out),
        "examples": len(task.examples),
        "duplicates": {"dropped": task.left_out.get("duplicates", 0), **_pairs(repeated)},
        "overlap": {"dropped": task.left_out.get("held_out", 0), **_pairs(shared)},
        "benchmarks": _check_benchmarks(config.task, task, mirror),
        "prompt_tokens": lengths,
        "golds": golds,
        "problems": _problems(lengths, golds),
    }


def parts_of(config: TaskConfig) -> dict[str, TaskConfig]:
    """The settings by ``Prompt.source``."""
    return {part.label: part for part in config.parts} or {"": config}


def place_of(prompt: Prompt) -> str:
    return prompt.place or f"prompt {prompt.id}"


def check_golds(parts: Mapping[str, TaskConfig], task: Task, settings: RewardConfig) -> Record:
    """Send every gold answer through its own verifier."""
    golds: list[Gold] = []
    unchecked: list[str] = []
    for prompt in [*task.train, *task.held_out]:
        gold = gold_of(parts[prompt.source], prompt)
        if why := _why_unchecked(parts[prompt.source].verifier, gold):
            unchecked.append(why)
        elif gold is not None:
            golds.append(gold)
    verifiers = {source: gold_verifier(parts[source], spec) for source, spec in task.verifiers.items()}
    results, error = _best_results(golds, verifiers, settings) if golds else ([], "")
    found = list(zip(golds, results, strict=True))
    return {
        "checked": len(golds),
        "unchecked": len(unchecked),
        "why_unchecked": ", or ".join(sorted(set(unchecked))),
        "unread": _unread_sources(found, verifiers),
        "error": error,
        "failed": [
            {
                "place": place_of(gold.prompt),
                "source": gold.prompt.source,
                "answer": gold.answer,
                "score": result.score,
                "failure": result.failure,
                "read": result.answer,
            }
            for gold, result in found
            if result.score < 1
        ],
    }


def _why_unchecked(verifier: str, gold: Gold | None) -> str:
    if gold is None:
        return "answers are tests, not programs" if verifier == CODE_VERIFIER else "the generator names no answer"
    return "the verifier is a server, for which requests may be slow or costly" if is_address(verifier) else ""


def _unread_sources(found: Sequence[tuple[Gold, VerifierResult]], verifiers: Mapping[str, VerifierSpec]) -> list[str]:
    """Sources whose custom verifier, without an answer format, judges gold answers but accepts none in any form."""
    own = {source for source, spec in verifiers.items() if spec.path not in VERIFIERS_OF_ANSWERS}
    judged = {gold.prompt.source for gold, result in found if len(gold.responses) > 1 and not result.failure}
    return sorted((own & judged) - {gold.prompt.source for gold, result in found if result.score == 1})


def _best_results(
    golds: Sequence[Gold], verifiers: Mapping[str, VerifierSpec], settings: RewardConfig
) -> tuple[list[VerifierResult], str]:
    """The best result of each gold over the ways to write it, and the verifier's first error."""
    checked = {gold.prompt.source for gold in golds}
    best: dict[int, VerifierResult] = {}
    with open_verifier({source: verifiers[source] for source in checked}, settings) as pool:
        pool.announce = lambda _: None  # the report says it
        for form in range(max(len(gold.responses) for gold in golds)):
            left = [
                number
                for number, gold in enumerate(golds)
                if form < len(gold.responses) and (number not in best or best[number].score < 1)
            ]
            chunks = [left[start : start + _VERIFIED_AT_ONCE] for start in range(0, len(left), _VERIFIED_AT_ONCE)]
            for numbers in progress(chunks, "checking gold answers"):
                # Without its text: the end of a prompt may open a `<think>` block that a gold answer does not close.
                asked = [(replace(golds[number].prompt, text=""), golds[number].responses[form]) for number in numbers]
                for number, result in zip(numbers, pool.verify(asked), strict=True):
                    if number not in best or result.score > best[number].score:
                        best[number] = result
        return [best[number] for number in range(len(golds))], next(iter(pool.first_failures.values()), "")


def _check_lengths(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, limit: int) -> Record:
    lengths = [len(prompt_token_ids(tokenizer, prompt)) for prompt in progress(prompts, "counting tokens")]
    over = [place_of(prompt) for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
    return {"lengths": summarise_lengths(lengths), "limit": limit, "over": len(over), "first_over": over[:_FIRST]}


def _check_benchmarks(config: TaskConfig, task: Task, mirror: Path | None) -> Record:
    """Questions of benchmarks in the data; only for data sets, with the benchmarks of their kind."""
    code = {part.verifier == CODE_VERIFIER for part in parts_of(config).values() if part.name == "dataset"}
    names = [name for name, each in BENCHMARKS.items() if (each.verifier == CODE) in code]
    found, missing = local_questions(names, mirror)
    compared = {}
    for questions in found:
        texts = [prompt.question for prompt in questions.prompts]
        training, held_out = prompts_with(texts, task.train), prompts_with(texts, task.held_out)
        compared[questions.name] = {
            "questions": len(texts),
            "training": len(training),
            "held_out": len(held_out),
            "first": [place_of(prompt) for prompt in [*training, *held_out][:_FIRST]],
        }
    return {"compared": compared, "missing": missing}


def _pairs(pairs: Sequence[tuple[Prompt, Prompt]]) -> Record:
    first = [f"{place_of(one)} and {place_of(other)}" for one, other in pairs[:_FIRST]]
    return {"kept": len(pairs), "first": first}


def _problems(lengths: Record, golds: Record) -> list[str]:
    problems = []
    if failed := [each for each in golds["failed"] if each["source"] not in golds["unread"]]:
        first = failed[0]
        problems.append(
            f"{len(failed):,} of {golds['checked']:,} gold answers get no full reward from their own verifier, the "
            f"first at {first['place']} ({first['answer'][:60]!r}); correct or remove them, or change "
            f"task.answer_format or task.verifier"
        )
    if lengths["over"]:
        problems.append(
            f"{lengths['over']:,} prompts have more than rollout.max_prompt_tokens = {lengths['limit']} tokens, the "
            f"first at {lengths['first_over'][0]}; raise the limit, or remove them (task.skip_bad_rows = true leaves "
            f"out such rows of a data set)"
        )
    return problems
