"""Checks of a task before training: gold answers, repeated questions, lengths of prompts, pass rates."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from forkrl.config import TaskConfig
from forkrl.config.task import ANSWER_FORMATS
from forkrl.rewards.answer_format import VERIFIERS_OF_ANSWERS
from forkrl.rewards.code.test_cases import CODE_VERIFIER
from forkrl.rewards.countdown import parse_problem
from forkrl.tasks.countdown import write_solution
from forkrl.tasks.rendering import gold_response
from forkrl.types import Prompt, VerifierSpec

_MIN_WORDS = 8
"""Shorter questions may be contained in others by chance."""
_FORMS = (r"{answer}", *(response for _, response in ANSWER_FORMATS.values() if response != "{answer}"))
"""How a gold answer is written for a verifier that looks for the answer itself."""


class Gold(NamedTuple):
    """A gold answer, and the responses of which one must get full reward."""

    prompt: Prompt
    answer: str
    responses: tuple[str, ...]


def gold_of(config: TaskConfig, prompt: Prompt) -> Gold | None:
    """The gold answer of a prompt, written as responses; None if there is no written answer.

    Countdown: a solution found by search. Without an answer format, the forms that verifiers commonly read.
    """
    if config.name.startswith("countdown"):
        solution = write_solution(*parse_problem(prompt.answer))
        return None if solution is None else Gold(prompt, solution, (solution,))
    if config.verifier == CODE_VERIFIER:
        return None
    answer = json.loads(prompt.answer)["answer"] if config.name == "reasoning-gym" else prompt.answer
    if answer is None:
        return None
    reads_tags = config.name == "reasoning-gym" and config.answer_format is None
    if config.few_shot_response or config.answer_format in ANSWER_FORMATS or reads_tags:
        written = [gold_response(config, answer).removeprefix(config.assistant_prefill)]
    elif config.answer_format:
        written = [answer]
    else:
        written = [form.replace("{answer}", answer) for form in _FORMS]
    return Gold(prompt, answer, tuple(written))


def gold_verifier(config: TaskConfig, spec: VerifierSpec) -> VerifierSpec:
    """The verifier for the responses of ``gold_of``. A regular expression says nothing about how to write an answer, so
    the answer goes to the verifier as if it had been found."""
    if spec.answer_format in ("", *ANSWER_FORMATS) or config.few_shot_response:
        return spec
    return replace(spec, path=VERIFIERS_OF_ANSWERS.get(spec.path, spec.path), answer_format="", prefill="")


def repeated_questions(first: Iterable[Prompt], second: Iterable[Prompt] | None = None) -> list[tuple[Prompt, Prompt]]:
    """Pairs of prompts with the same question but for whitespace: within ``first``, or of ``first`` with ``second``."""
    earlier: dict[str, Prompt] = {}
    pairs = []
    for prompt in first:
        if earlier.setdefault(_key(prompt), prompt) is not prompt and second is None:
            pairs.append((earlier[_key(prompt)], prompt))
    return pairs if second is None else [(earlier[_key(each)], each) for each in second if _key(each) in earlier]


def _key(prompt: Prompt) -> str:
    return " ".join(prompt.question.split())


def prompts_with(questions: Iterable[str], prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts whose question is, or from eight words on contains, one of ``questions``; whitespace is ignored."""
    whole = {tuple(question.split()) for question in questions}
    by_start: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for words in whole:
        if len(words) >= _MIN_WORDS:
            by_start[words[:_MIN_WORDS]].append(words)
    return [prompt for prompt in prompts if _holds(tuple(prompt.question.split()), whole, by_start)]


def _holds(
    words: tuple[str, ...], whole: set[tuple[str, ...]], by_start: Mapping[tuple[str, ...], list[tuple[str, ...]]]
) -> bool:
    return words in whole or any(
        words[start : start + len(wanted)] == wanted
        for start in range(len(words) - _MIN_WORDS + 1)
        for wanted in by_start.get(words[start : start + _MIN_WORDS], ())
    )


def summarise_lengths(lengths: Sequence[int]) -> dict[str, float]:
    """Minimum, median, 95th percentile and maximum."""
    shares = {"min": 0, "median": 50, "95%": 95, "max": 100}
    values = np.percentile(np.asarray(lengths), list(shares.values()), method="higher")
    return dict(zip(shares, map(float, values), strict=True))


def bin_pass_rates(passed: Sequence[int], samples: int) -> dict[str, int]:
    """Number of prompts by pass rate: none, up to a quarter, …, all."""
    edges = {"0%": 0.0, "to 25%": 0.25, "to 50%": 0.5, "to 75%": 0.75, "below 100%": 1 - 0.5 / samples, "100%": 1.0}
    counts = dict.fromkeys(edges, 0)
    for number in passed:
        counts[next(name for name, edge in edges.items() if number / samples <= edge)] += 1
    return counts
