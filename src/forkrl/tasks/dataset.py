"""Prompts from your own data: JSONL, Parquet, a folder of them, or a data set of the Hugging Face hub.

Rows are read one by one and only distinct questions are kept, so a file with every question a hundred times over (as
DAPO-Math-17K is on the hub) costs its time to read and no more memory than its distinct questions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from forkrl.config import TaskConfig
from forkrl.config.secret_values import is_address
from forkrl.errors import UserError, notice
from forkrl.rewards.code.test_cases import CODE_VERIFIER, any_number_of_digits, repack_tests
from forkrl.tasks.bad_rows import BadRows
from forkrl.tasks.data_rows import NO_VERIFIER, Row, look_up, read_rows
from forkrl.tasks.json_lines import kind_of, require_characters
from forkrl.types import Prompt, Task, VerifierSpec

ApplyChatTemplate = Callable[[list[dict[str, str]]], str]
CheckPrompt = Callable[[Prompt], object]

_SKIP = "set task.skip_bad_rows = true to leave such rows out"


def load_dataset_task(
    config: TaskConfig, *, apply_chat_template: ApplyChatTemplate | None, check: CheckPrompt | None = None
) -> Task:
    """Read the prompts that ``config`` names and keep some aside.

    A question is text, or a list of chat messages whose last is the user's; ``config.template`` goes around that text,
    and with ``config.chat_template`` the tokenizer's chat template around all of it. A prompt's id is a hash of its
    question: it depends on no order, file or template. Duplicates are dropped and reported: the same question, or one
    that differs only in whitespace and has the same answer. Held-out prompts come from ``held_out_data``, or are those
    of ``held_out_rows`` lowest ids, which depends on no order either; a question that is held out is never trained on.
    A hub data set may name its split: ``"owner/name:test"``.

    Args:
        config: the recipe's ``task`` table.
        apply_chat_template: the tokenizer's: chat messages to the text that the model reads. None where it has none.
        check: raises UserError for a prompt that the model cannot read; its row is then a bad row.
    """
    if config.verifier == NO_VERIFIER:
        raise UserError(f"task.verifier = {NO_VERIFIER!r}: training needs something to judge responses by")
    read = _Reader(config, apply_chat_template, check)
    questions = read(config.data, "task.data")
    if config.held_out_data:
        aside = read(config.held_out_data, "task.held_out_data")
        keys = {question.key for question in aside.values()}
        shared = {id for id, question in questions.items() if id in aside or question.key in keys}
        if len(shared) == len(questions):
            raise UserError(f"{config.data}: every question is also in task.held_out_data; nothing is left to train on")
        if shared:
            notice(f"{len(shared):,} questions of {config.data} are held out and will not be trained on")
    else:
        if config.held_out_rows >= len(questions):
            raise UserError(
                f"task.held_out_rows = {config.held_out_rows} leaves nothing to train on: {config.data} has "
                f"{len(questions)} distinct questions; lower it, or name task.held_out_data"
            )
        aside = {id: questions[id] for id in sorted(questions)[: config.held_out_rows]}
        shared = set(aside)
    train = [question.prompt for id, question in questions.items() if id not in shared]
    held_out = [question.prompt for question in aside.values()]
    return Task(config.data, train, held_out, _verifiers(config), fingerprint_of(train, held_out))


def load_evaluation_task(
    config: TaskConfig, *, apply_chat_template: ApplyChatTemplate | None, check: CheckPrompt | None = None
) -> Task:
    """Read the prompts that ``config`` names for evaluation alone: nothing is split off, nothing is left to train on.

    They are all distinct questions of ``held_out_data``; where it is empty, all of ``data``. A benchmark of 30 rows
    needs no second file and no ``held_out_rows``. Whether a model has trained on them is for the caller to know. With
    the verifier "none", ``Task.verifiers`` is empty.

    Args:
        config: the recipe's ``task`` table.
        apply_chat_template: the tokenizer's: chat messages to the text that the model reads. None where it has none.
        check: raises UserError for a prompt that the model cannot read; its row is then a bad row.
    """
    source, key = (config.held_out_data, "task.held_out_data") if config.held_out_data else (config.data, "task.data")
    prompts = [question.prompt for question in _Reader(config, apply_chat_template, check)(source, key).values()]
    return Task(source, [], prompts, _verifiers(config), fingerprint_of([], prompts))


def _verifiers(config: TaskConfig) -> dict[str, VerifierSpec]:
    if config.verifier == NO_VERIFIER:
        return {}
    if is_address(config.verifier):
        options = config.verifier_options | {"url": config.verifier}
        return {"": VerifierSpec("forkrl.rewards.endpoint:verify_at_endpoint", options)}
    return {"": VerifierSpec(config.verifier, config.verifier_options)}


@dataclass(frozen=True, slots=True)
class _Question:
    prompt: Prompt
    key: str
    """Equal for questions that differ only in whitespace and have the same answer."""


class _Reader:
    """Reads the distinct questions of a source as prompts; collects bad rows and duplicates, and reports both."""

    def __init__(
        self, config: TaskConfig, apply_chat_template: ApplyChatTemplate | None, check: CheckPrompt | None
    ) -> None:
        self._config = config
        self._render = _Renderer(config, apply_chat_template)
        self._check = check

    def __call__(self, source: str, key: str) -> dict[str, _Question]:
        """Questions by id, in the order of their first appearance."""
        questions: dict[str, _Question] = {}
        keys: set[str] = set()
        bad, num_rows, num_duplicates = BadRows(), 0, 0
        for raw in read_rows(self._config, source, key):
            num_rows += 1
            try:
                question = self._question(raw.parsed(), questions, keys)
            except UserError as error:
                bad.add(error)
                continue
            if question is None:
                num_duplicates += 1
            else:
                questions[question.prompt.id] = question
                keys.add(question.key)
        self._report(source, bad, num_rows, num_duplicates)
        if not questions:
            raise UserError(f"{key} = {source!r} holds no rows" + (" that can be used" if num_rows else ""))
        return questions

    def _question(self, row: Row, known: Mapping[str, _Question], keys: set[str]) -> _Question | None:
        """The question of a row; None for a duplicate."""
        content, answer = _question_content(self._config, row), _answer_text(self._config, row)
        id = question_id(content)
        if id in known:
            earlier = known[id].prompt
            if earlier.answer != answer:
                raise UserError(
                    f"{row.place} asks what {earlier.place} asks, but its {self._config.answer_column} is "
                    f"{_short(answer)}, not {_short(earlier.answer)}; remove one of the two"
                )
            return None
        # Questions that differ only in whitespace may differ in meaning (grids, programs): their answers decide.
        key = hashlib.sha256(json.dumps([_single_spaced(content), answer]).encode()).hexdigest()[:16]
        if key in keys:
            return None
        prompt = self._render(id, content, answer, row.place)
        if self._check is not None:
            self._check(prompt)
        return _Question(prompt, key)

    def _report(self, source: str, bad: BadRows, num_rows: int, num_duplicates: int) -> None:
        if not self._config.skip_bad_rows:
            bad.require_none(source, num_rows, _SKIP)
        elif bad.count:
            notice(f"{source}: left out {bad.count:,} of {num_rows:,} rows (task.skip_bad_rows):\n{bad.listing()}")
        if num_duplicates:
            notice(
                f"{source}: dropped {num_duplicates:,} of {num_rows:,} rows as duplicates (the same question, or one "
                f"that differs only in whitespace, with the same answer)"
            )


def _single_spaced(content: str | list[dict[str, str]]) -> list[str]:
    """A question with every run of whitespace as one space."""
    messages = [content] if isinstance(content, str) else [part for message in content for part in message.values()]
    return [" ".join(text.split()) for text in messages]


def _question_content(config: TaskConfig, row: Row) -> str | list[dict[str, str]]:
    value = look_up(row, config.prompt_column, "task.prompt_column")
    if isinstance(value, str):
        return _checked_text(value, config.prompt_column, row.place)
    if not isinstance(value, list):
        raise UserError(f"{row.place}: {config.prompt_column} is {kind_of(value)}, not text or a list of chat messages")
    if not config.chat_template:
        raise UserError(
            f"{row.place}: {config.prompt_column} is a list of chat messages; set task.chat_template = true, or take "
            f'the text of one with task.prompt_column = "{config.prompt_column}.0.content"'
        )
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(
                f"{row.place}: {config.prompt_column} holds {_short(message)}, which has no role and content"
            )
        if not isinstance(message["content"], str):
            raise UserError(f"{row.place}: the content of a chat message is {kind_of(message['content'])}, not text")
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{row.place}: the last chat message of {config.prompt_column} is not the user's")
    for message in messages:
        _checked_text(message["content"], config.prompt_column, row.place, may_be_empty=message is not messages[-1])
    return messages


def _answer_text(config: TaskConfig, row: Row) -> str:
    if config.verifier == NO_VERIFIER:
        return ""
    value = look_up(row, config.answer_column, "task.answer_column")
    if config.verifier == CODE_VERIFIER:
        return _tests_text(config, value, row.place)
    if isinstance(value, list):
        raise UserError(
            f"{row.place}: {config.answer_column} is a list of {len(value)}; a verifier takes one answer, such as "
            f'task.answer_column = "{config.answer_column}.0"'
        )
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{row.place}: {config.answer_column} is {kind_of(value)}, not text or a number")
    return _checked_text(value, config.answer_column, row.place)


def _tests_text(config: TaskConfig, value: Any, place: str) -> str:
    """A program's tests: the ecosystem's JSON, as text or in the row itself."""
    with any_number_of_digits():
        text = json.dumps(value) if isinstance(value, dict | list) else value
    if not isinstance(text, str):
        raise UserError(f"{place}: {config.answer_column} is {kind_of(value)}, not the tests of a program")
    require_characters(text, config.answer_column, place)
    try:
        return repack_tests(text)
    except ValueError as error:
        raise UserError(f"{place}: {config.answer_column}: {error}") from None


def _checked_text(text: str, column: str, place: str, *, may_be_empty: bool = False) -> str:
    if not text.strip() and not may_be_empty:
        raise UserError(f"{place}: {column} is empty; remove the row or fill it in")
    require_characters(text, column, place)
    return text


class _Renderer:
    """Puts the recipe's template, and the chat template, around a question."""

    def __init__(self, config: TaskConfig, apply_chat_template: ApplyChatTemplate | None) -> None:
        if config.chat_template and apply_chat_template is None:
            raise UserError(
                "task.chat_template = true, but the model's tokenizer has no chat template; "
                "set it to false and write the whole prompt as task.template"
            )
        self._template = config.template
        self._apply = apply_chat_template if config.chat_template else None

    def __call__(self, id: str, content: str | list[dict[str, str]], answer: str, place: str) -> Prompt:
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        *before, last = messages
        # Not str.format: a question may hold braces of its own.
        text = self._template.replace("{prompt}", last["content"])
        if self._apply is not None:
            try:
                text = self._apply([*before, {"role": "user", "content": text}])
            except TemplateError as error:  # of some templates: a system message, or roles that do not alternate
                raise UserError(f"{place}: the tokenizer's chat template rejects the messages ({error})") from error
        return Prompt(id, text, answer, place, templated=self._apply is not None)


def question_id(content: str | list[dict[str, str]]) -> str:
    """The id of a question by what it asks alone: the same in every file, in any order, under any template."""
    canonical = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def fingerprint_of(train: list[Prompt], held_out: list[Prompt]) -> str:
    """A hash of all that the model reads and is judged by."""
    digest = hashlib.sha256()
    for name, prompts in (("train", train), ("held_out", held_out)):
        digest.update(f"{name} {len(prompts)}\n".encode())
        for prompt in prompts:
            digest.update(json.dumps([prompt.id, prompt.text, prompt.answer]).encode() + b"\n")
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
