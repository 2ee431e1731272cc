"""Prompts from your own data: JSONL, Parquet, a folder of them, or a data set of the Hugging Face hub.

Rows are read one by one and only distinct questions are kept, so a file with every question a hundred times over (as
DAPO-Math-17K is on the hub) costs its time to read and no more memory than its distinct questions.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.locations import require_hub_id
from forkrl.messages import notice
from forkrl.rewards.code.test_cases import CODE_VERIFIER, any_number_of_digits, repack_tests
from forkrl.secret_values import is_address
from forkrl.tasks.bad_rows import BadRows
from forkrl.tasks.json_lines import json_object, kind_of, require_characters
from forkrl.types import Prompt, Task, VerifierSpec

ApplyChatTemplate = Callable[[list[dict[str, str]]], str]
CheckPrompt = Callable[[Prompt], object]

_SUFFIXES = (".jsonl", ".parquet")
_SPLIT = re.compile(r"[\w.\-+%\[\]:]+")
_BATCH_ROWS = 1024
NO_VERIFIER = "none"
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

    Raises:
        UserError: what is wrong; of bad rows the first ten with their reasons, and the count.
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

    Raises:
        UserError: what is wrong; of bad rows the first ten with their reasons, and the count.
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


class _Row(NamedTuple):
    place: str
    """Where the row stands, as an error names it: "train.jsonl line 7"."""
    values: dict[str, Any]


class _RawRow(NamedTuple):
    """A row with its place; ``values`` is still a line of JSON where it comes from a JSONL file."""

    place: str
    values: bytes | dict[str, Any]

    def parsed(self) -> _Row:
        return _Row(self.place, json_object(self.values, self.place) if isinstance(self.values, bytes) else self.values)


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
        for raw in _read_rows(self._config, source, key):
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

    def _question(self, row: _Row, known: Mapping[str, _Question], keys: set[str]) -> _Question | None:
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


def _question_content(config: TaskConfig, row: _Row) -> str | list[dict[str, str]]:
    value = _look_up(row, config.prompt_column, "task.prompt_column")
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


def _answer_text(config: TaskConfig, row: _Row) -> str:
    if config.verifier == NO_VERIFIER:
        return ""
    value = _look_up(row, config.answer_column, "task.answer_column")
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


def _look_up(row: _Row, column: str, key: str) -> Any:
    """The value of a column; dots reach inside dicts, and with a number inside lists."""
    if column in row.values:
        return row.values[column]
    value: Any = row.values
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _no_such_column(row.place, column, key, _column_names(row.values))
    return value


def _no_such_column(place: str, column: str, key: str, names: list[str]) -> UserError:
    near = difflib.get_close_matches(column, names, n=1)
    remedy = f"; set {key}" + (
        " (or task.verifier=none, where there are no answers)" if key == "task.answer_column" else ""
    )
    suggestion = f"; did you mean {near[0]!r}?" if near else remedy
    listing = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return UserError(f"{place} has no column {column!r} ({key}); it has: {listing or 'none'}{suggestion}")


def _column_names(values: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in values.items():
        names.append(f"{prefix}{name}")
        if isinstance(value, dict):
            names += _column_names(value, f"{prefix}{name}.")
    return names


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


def _read_rows(config: TaskConfig, source: str, key: str) -> Iterator[_RawRow]:
    path = Path(source).expanduser()
    if path.exists():
        for name, value in (
            ("subset", config.subset or None),
            ("split", config.split if config.split != "train" else None),
        ):
            if value is not None:
                raise UserError(f"task.{name} = {value!r} is for hub data sets, but {key} = {source!r} is a local path")
        for file in _files_of(path, key):
            yield from _read_jsonl(file) if file.suffix == ".jsonl" else _read_parquet(config, file)
    else:
        name, _, split = source.partition(":")
        named = not Path(name).exists() and (not split or _SPLIT.fullmatch(split))
        require_hub_id(name if named else source, key, "file or folder")
        yield from _read_hub(config, name, split or config.split, key)


def _files_of(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{key} = {str(path)!r}: the folder holds no .jsonl or .parquet file")
        return files
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{key} = {str(path)!r} is neither a .jsonl nor a .parquet file; convert it to one of them")
    return [path]


def _read_jsonl(path: Path) -> Iterator[_RawRow]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _RawRow(f"{path.name} line {number}", line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_parquet(config: TaskConfig, path: Path) -> Iterator[_RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = _top_columns(config, file.schema_arrow.names, path.name)
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield _RawRow(f"{path.name} row {number}", values)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from None


def _read_hub(config: TaskConfig, name: str, split: str, key: str) -> Iterator[_RawRow]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config.subset or None, split=split)
    except Exception as error:  # network, permission, unknown name, subset or split: dozens of types, one remedy
        raise UserError(
            f"{key} = {name!r} is no local path, and the hub did not give its split {split!r} ({_first_line(error)}); "
            f"check the name, or download it and give the path of a .jsonl or .parquet file or a folder of them"
        ) from None
    rows = rows.select_columns(_top_columns(config, rows.column_names, name))
    number = 0
    for batch in rows.iter(_BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield _RawRow(f"{name} ({split}) row {number}", dict(zip(batch, values, strict=True)))


def _top_columns(config: TaskConfig, names: list[str], place: str) -> list[str]:
    """The columns that must be read so that the recipe's two, which may lie inside them, can be looked up."""
    needed: dict[str, None] = {}
    for key, column in (("task.prompt_column", config.prompt_column), ("task.answer_column", config.answer_column)):
        if key == "task.answer_column" and config.verifier == NO_VERIFIER:
            continue
        top = column if column in names else column.partition(".")[0]
        if top not in names:
            raise _no_such_column(place, column, key, names)
        needed[top] = None
    return list(needed)


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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
