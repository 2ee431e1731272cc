"""The benchmarks: source of the questions, their columns, prompts and verifiers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from forkrl.errors import UserError
from forkrl.types import VerifierSpec

GYM = "gym:"
"""Prefix of a reasoning-gym generator: ``gym:chain_sum``."""
PROMPT = "{prompt}"
BOXED = PROMPT + "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The paper's prompt (arXiv 2506.01939v2, section 5.2)."""
MATH = VerifierSpec("forkrl.rewards.math:verify_math")
CODE = VerifierSpec("forkrl.rewards.code:verify_code")
"""Its options are the recipe's ``[sandbox]``."""

Row = Mapping[str, Any]


class QuestionAndAnswer(NamedTuple):
    """Raw values of a row; missing or wrongly typed text is rejected later."""

    question: Any
    answer: Any


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark on the hub.

    ``revision``: commit to load; None: the newest. ``files``: JSONL files of a repository whose split cannot be loaded.
    ``prepare``: makes question and answer of a row, reading further ``columns``; None: they are columns. ``wanted``:
    selects rows. ``question``: prompt template with ``{prompt}``.
    """

    name: str
    title: str
    hub: str
    prompt_column: str
    answer_column: str
    expected_questions: int
    split: str = "test"
    subset: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    prepare: Callable[[Row], QuestionAndAnswer] | None = None
    wanted: Callable[[Row], bool] | None = None
    question: str = BOXED
    verifier: VerifierSpec = MATH

    @property
    def all_columns(self) -> tuple[str, ...]:
        return (self.prompt_column, self.answer_column, *self.columns)

    def question_and_answer(self, row: Row) -> QuestionAndAnswer:
        if self.prepare is not None:
            return self.prepare(row)
        return QuestionAndAnswer(row[self.prompt_column], row[self.answer_column])


def find_benchmark(name: str) -> Benchmark:
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--bench {name}: no such benchmark; {guess}forkrl eval --list shows all of them")


def runs_programs(names: Sequence[str]) -> bool:
    return any(name in BENCHMARKS and BENCHMARKS[name].verifier == CODE for name in names)


def after_hashes(row: Row) -> QuestionAndAnswer:
    """GSM8K: the answer column is a worked solution, with the number after ``####``."""
    answer = row["answer"]
    if isinstance(answer, str):
        answer = answer.partition("####")[2].strip().replace(",", "")
    return QuestionAndAnswer(row["question"], answer)


def with_context(row: Row) -> QuestionAndAnswer:
    """OlympiadBench: some questions have a context; the answer is a list, usually of one."""
    question, context, answers = row["question"], row["context"], row["final_answer"]
    if isinstance(context, str) and context.strip() and isinstance(question, str):
        question = f"{context.strip()}\n{question}"
    if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers):
        answers = ", ".join(answers)
    return QuestionAndAnswer(question, answers)


_CODE_TASK = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
_WITH_STARTER_CODE = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
_FROM_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
_FIRST_CONTEST, _END_OF_CONTESTS = "2024-08-01", "2025-02-01"


def in_paper_window(row: Row) -> bool:
    """LiveCodeBench v5 as in the paper: contests from August 2024 until before February 2025."""
    return _FIRST_CONTEST <= str(row["contest_date"])[:10] < _END_OF_CONTESTS


def code_question(row: Row) -> QuestionAndAnswer:
    """LiveCodeBench's own prompt: a program that reads stdin, or a class to complete."""
    from forkrl.rewards.code import tests_from_livecodebench

    question, starter = row["question_content"], row["starter_code"]
    if isinstance(question, str) and question.strip():
        wording = _WITH_STARTER_CODE if starter else _FROM_STDIN
        question = (
            f"{_CODE_TASK}\n\n### Question:\n{question}\n\n### Format: {wording}\n"
            f"```python\n{starter or '# YOUR CODE HERE'}\n```\n\n### Answer: (use the provided format with backticks)\n"
        )
    return QuestionAndAnswer(question, tests_from_livecodebench(row))


_FUNCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    f"```\n{PROMPT}\n```\n"
)
"""EvalPlus's prompt for chat models."""


def function_to_complete(row: Row) -> QuestionAndAnswer:
    """HumanEval: the prompt is the start of the program; the tests are ``assert`` statements."""
    from forkrl.rewards.code import repack_tests

    prompt, name = row["prompt"], row["entry_point"]
    try:
        tests = repack_tests(json.dumps({"prompt": prompt, "test": row["test"], "entry_point": name}))
    except ValueError as error:
        raise UserError(f"humaneval: the tests of {name!r} cannot be used: {error}") from None
    return QuestionAndAnswer(prompt.strip() if isinstance(prompt, str) else prompt, tests)


_ENTRIES: Sequence[Benchmark] = (
    Benchmark(
        "aime24", "AIME'24", "HuggingFaceH4/aime_2024", "problem", "answer", 30, split="train",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    ),
    Benchmark(
        "aime25", "AIME'25", "math-ai/aime25", "problem", "answer", 30,
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
    ),
    Benchmark(
        "amc23", "AMC'23", "math-ai/amc23", "question", "answer", 40,
        revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
    ),
    Benchmark(
        "math500", "MATH500", "HuggingFaceH4/MATH-500", "problem", "answer", 500,
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    ),
    Benchmark("minerva", "Minerva", "math-ai/minervamath", "question", "answer", 272),
    Benchmark(
        "olympiad", "OlympiadBench", "Hothan/OlympiadBench", "question", "final_answer", 674, split="train",
        subset="OE_TO_maths_en_COMP", columns=("context",), prepare=with_context,
        revision="91184b52131e7fc9455fef848035173aea8cc01a",
    ),
    Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "question", "answer", 1319, subset="main", prepare=after_hashes),
    Benchmark(
        "livecodebench", "LiveCodeBench v5", "livecodebench/code_generation_lite", "question_content",
        "private_test_cases", 279, revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
        files=("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl"),
        columns=("public_test_cases", "metadata", "starter_code", "contest_date"),
        wanted=in_paper_window, prepare=code_question, question=PROMPT, verifier=CODE,
    ),
    Benchmark(
        "humaneval", "HumanEval", "openai/openai_humaneval", "prompt", "test", 164, columns=("entry_point",),
        prepare=function_to_complete, question=_FUNCTION, verifier=CODE,
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    ),
)  # fmt: skip
BENCHMARKS: dict[str, Benchmark] = {entry.name: entry for entry in _ENTRIES}
