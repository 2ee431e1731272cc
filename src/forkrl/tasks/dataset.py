"""Prompts from user data: JSONL, Parquet, a folder of them, or a Hugging Face data set.

Rows are streamed and only distinct questions kept: in DAPO-Math-17K on the hub every question occurs 100 times.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from forkrl.config import TaskConfig
from forkrl.errors import UserError, notice
from forkrl.rewards.code.test_cases import CODE_VERIFIER, any_number_of_digits, repack_tests
from forkrl.rewards.specs import verifier_spec
from forkrl.tasks.data_rows import NO_VERIFIER, Row, look_up, read_rows
from forkrl.tasks.json_lines import BadRows, kind_of, require_characters
from forkrl.tasks.rendering import ApplyChatTemplate, choose_examples, prompt_renderer
from forkrl.types import Example, Messages, Prompt, Task, VerifierSpec

CheckPrompt = Callable[[Prompt], object]


def load_dataset_task(
    config: TaskConfig, *, apply_chat_template: ApplyChatTemplate | None, check: CheckPrompt | None = None
) -> Task:
    """Read the configured prompts and hold some out.

    A question is text, or chat messages ending with the user's. ``config.template`` applies to that text, then with
    ``config.chat_template`` the tokenizer's chat template to all messages. A prompt's id hashes its question.
    Duplicates (the same question, or the same answer and a question that differs only in whitespace) are dropped and
    reported. Held-out prompts come from ``held_out_data``, or are the ``held_out_rows`` lowest ids, independent of row
    order; they are never trained on.

    ``check`` raises UserError for unreadable prompts, which makes their rows bad rows. Raises UserError if a source or
    (without ``skip_bad_rows``) a row cannot be used, or nothing is left.
    """
    if config.verifier == NO_VERIFIER:
        raise UserError(f"task.verifier = {NO_VERIFIER!r}: training needs something to judge responses by")
    questions, num_duplicates = _read_questions(config, config.data, "task.data", apply_chat_template, check)
    left_out = {"duplicates": num_duplicates, "held_out": 0}
    if config.held_out_data:
        held_out, _ = _read_questions(config, config.held_out_data, "task.held_out_data", apply_chat_template, check)
        train = _not_held_out(config, questions, held_out)
        if shared := len(questions) - len(train):
            left_out["held_out"] = shared
            notice(f"{shared:,} questions of {config.data} are held out and will not be trained on")
    else:
        if config.held_out_rows >= len(questions):
            raise UserError(
                f"task.held_out_rows = {config.held_out_rows} leaves nothing to train on: {config.data} has "
                f"{len(questions)} distinct questions; lower it, or name task.held_out_data"
            )
        held_out = {id: questions[id] for id in sorted(questions)[: config.held_out_rows]}
        train = {id: question for id, question in questions.items() if id not in held_out}
    examples = _choose_examples(config, train)
    source = config.held_out_data or config.data
    prompts = _with_examples(config, train, examples, config.data, apply_chat_template, check)
    aside = _with_examples(config, held_out, examples, source, apply_chat_template, check)
    fingerprint = fingerprint_of(prompts, aside)
    return Task(config.data, prompts, aside, _verifiers(config), fingerprint, examples, left_out)


def load_evaluation_task(
    config: TaskConfig, *, apply_chat_template: ApplyChatTemplate | None, check: CheckPrompt | None = None
) -> Task:
    """Read prompts for evaluation: all distinct questions of ``held_out_data``, or if that is empty, of ``data``.

    With the verifier "none", ``Task.verifiers`` is empty. Few-shot examples are questions of ``data`` that are not
    evaluated. Arguments and errors as for ``load_dataset_task``.
    """
    source, key = (config.held_out_data, "task.held_out_data") if config.held_out_data else (config.data, "task.data")
    questions, _ = _read_questions(config, source, key, apply_chat_template, check)
    candidates = questions
    if config.few_shot and config.held_out_data:
        others, _ = _read_questions(config, config.data, "task.data", apply_chat_template, check)
        candidates = _not_held_out(config, others, questions)
    examples = _choose_examples(config, candidates)
    if examples and not config.held_out_data:
        notice(f"{len(examples)} questions of {source} are few-shot examples (task.few_shot) and are not evaluated")
    prompts = _with_examples(config, questions, examples, source, apply_chat_template, check)
    return Task(source, [], prompts, _verifiers(config), fingerprint_of([], prompts), examples)


def _verifiers(config: TaskConfig) -> dict[str, VerifierSpec]:
    if config.verifier == NO_VERIFIER:
        return {}
    answer_format, prefill = config.answer_format or "", config.assistant_prefill
    return {"": verifier_spec(config.verifier, config.verifier_options, answer_format=answer_format, prefill=prefill)}


class _Question(NamedTuple):
    """``prompt`` is rendered without examples."""

    prompt: Prompt
    content: str | Messages
    key: str
    """Equal for questions that differ only in whitespace and have the same answer."""


_Questions = dict[str, _Question]
"""By id, in order of first appearance."""


def _not_held_out(config: TaskConfig, questions: _Questions, held_out: _Questions) -> _Questions:
    """The questions of ``task.data`` that are not in ``task.held_out_data``."""
    keys = {question.key for question in held_out.values()}
    train = {id: each for id, each in questions.items() if id not in held_out and each.key not in keys}
    if not train:
        raise UserError(f"{config.data}: every question is also in task.held_out_data; nothing is left to train on")
    return train


def _choose_examples(config: TaskConfig, questions: _Questions) -> dict[str, Example]:
    candidates = {id: Example(question.content, question.prompt.answer) for id, question in questions.items()}
    return choose_examples(config, candidates)


def _with_examples(
    config: TaskConfig,
    questions: _Questions,
    examples: Mapping[str, Example],
    source: str,
    apply_chat_template: ApplyChatTemplate | None,
    check: CheckPrompt | None,
) -> list[Prompt]:
    """The prompts of all questions but the examples, rendered with the examples."""
    asked = [question for id, question in questions.items() if id not in examples]
    if not examples:
        return [question.prompt for question in asked]
    render = prompt_renderer(config, apply_chat_template, list(examples.values()))
    prompts: list[Prompt] = []
    bad = BadRows()
    for question in asked:
        try:
            prompt = replace(question.prompt, text=render(question.content, question.prompt.place))
            if check is not None:
                check(prompt)
            prompts.append(prompt)
        except UserError as error:
            bad.add(error)
    _report_bad_rows(config, source, bad, len(asked))
    if not prompts:
        raise UserError(f"{source}: no question can be used with task.few_shot = {config.few_shot}; lower it")
    return prompts


def _report_bad_rows(config: TaskConfig, source: str, bad: BadRows, num_rows: int) -> None:
    if not config.skip_bad_rows:
        bad.require_none(source, num_rows, "set task.skip_bad_rows = true to leave such rows out")
    elif bad.count:
        notice(f"{source}: left out {bad.count:,} of {num_rows:,} rows (task.skip_bad_rows):\n{bad.listing()}")


def _read_questions(
    config: TaskConfig,
    source: str,
    key: str,
    apply_chat_template: ApplyChatTemplate | None,
    check: CheckPrompt | None,
) -> tuple[_Questions, int]:
    """The distinct questions of a source, and the number of duplicates dropped."""
    render = prompt_renderer(config, apply_chat_template)
    questions: _Questions = {}
    keys: set[str] = set()
    bad, num_duplicates = BadRows(), 0
    for row in read_rows(config, source, key, bad):
        try:
            content, answer = _question_content(config, row), _answer_text(config, row)
            # Whitespace may change the meaning (grids, programs), so duplicates must also have equal answers.
            texts = [content] if isinstance(content, str) else [text for each in content for text in each.values()]
            words = [" ".join(text.split()) for text in texts]
            key_of_question = hashlib.sha256(json.dumps([words, answer]).encode()).hexdigest()[:16]
            id = question_id(content)
            if id in questions:
                _require_same_answer(config, row, answer, questions[id].prompt)
            if id in questions or key_of_question in keys:
                num_duplicates += 1
                continue
            prompt = Prompt(
                id,
                render(content, row.place),
                answer,
                row.place,
                templated=config.chat_template,
                question=_question_text(content),
            )
            if check is not None:
                check(prompt)
        except UserError as error:
            bad.add(error)
            continue
        questions[id] = _Question(prompt, content, key_of_question)
        keys.add(key_of_question)
    num_rows = len(questions) + num_duplicates + bad.count
    _report_bad_rows(config, source, bad, num_rows)
    if num_duplicates:
        notice(
            f"{source}: dropped {num_duplicates:,} of {num_rows:,} rows as duplicates (the same question, or one that "
            f"differs only in whitespace, with the same answer)"
        )
    if not questions:
        raise UserError(f"{key} = {source!r} holds no rows" + (" that can be used" if num_rows else ""))
    return questions, num_duplicates


def rows_of_questions(config: TaskConfig, ids: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rows of ``task.data`` with these questions, unchanged and in order, each question once."""
    left = set(ids)
    for row in read_rows(config, config.data, "task.data", BadRows()):
        try:
            id = question_id(_question_content(config, row))
            _answer_text(config, row)
        except UserError:  # reported when the task was opened
            continue
        if id in left:
            left.remove(id)
            yield row.values


def _require_same_answer(config: TaskConfig, row: Row, answer: str, earlier: Prompt) -> None:
    if earlier.answer != answer:
        raise UserError(
            f"{row.place} asks what {earlier.place} asks, but its {config.answer_column} is {_short(answer)}, not "
            f"{_short(earlier.answer)}; remove one of the two"
        )


def _question_content(config: TaskConfig, row: Row) -> str | Messages:
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
    """A program's tests as JSON; the row has text or values."""
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


def _question_text(content: str | Messages) -> str:
    """The question alone; of a conversation all turns, without system messages."""
    if isinstance(content, str):
        return content
    return "\n".join(message["content"] for message in content if message["role"] != "system")


def question_id(content: str | Messages) -> str:
    """A hash of the question alone, independent of file, order and template."""
    canonical = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def fingerprint_of(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> str:
    """A hash of all prompts and of what their responses are scored against."""
    digest = hashlib.sha256()
    for name, prompts in (("train", train), ("held_out", held_out)):
        digest.update(f"{name} {len(prompts)}\n".encode())
        for prompt in prompts:
            part = [prompt.source] if prompt.source else []
            digest.update(json.dumps([*part, prompt.id, prompt.text, prompt.answer]).encode() + b"\n")
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
