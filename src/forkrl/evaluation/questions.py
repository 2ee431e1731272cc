"""Questions of an evaluation: a benchmark (hub or local mirror), a reasoning-gym generator, or a recipe's task.

A mirror holds ``owner/name`` as ``hf download --repo-type dataset owner/name`` leaves it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forkrl.config import SandboxConfig, TaskConfig
from forkrl.errors import UserError, first_line
from forkrl.evaluation.benchmarks import CODE, GYM, PROMPT, Benchmark, find_benchmark, runs_programs
from forkrl.rewards.code import code_verifier
from forkrl.rewards.code.sandbox import require_sandbox
from forkrl.store.run_folder import encodable_text
from forkrl.tasks import open_evaluation_task, open_task
from forkrl.tasks.gym import GYM_VERIFIER, gym_prompts
from forkrl.tasks.json_lines import json_object, kind_of, require_characters
from forkrl.types import Prompt, VerifierSpec

if TYPE_CHECKING:  # torch, not needed to read questions
    from transformers import PreTrainedTokenizerBase

PLAIN = "User:\n{question}\n\nAssistant:\n"
"""The paper's prompt for base models (arXiv 2506.01939v2, section 5.2)."""
GYM_QUESTIONS = 100
"""Default number from a reasoning-gym generator, which is unlimited."""
_NOT_ALL = "figures do not compare with those of the whole benchmark"
_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_Row = tuple[str, Mapping[str, Any]]
"""Location in errors ("aime24 row 3"), and columns."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions of a benchmark, or of a part of a task, with their verifiers.

    ``revision``: the hub's commit or "mirror"; None if unknown. ``expected_questions``: to compare with
    ``available_questions``; None if unknown. ``notice``: what is unusual about the questions, usually empty.
    """

    name: str
    title: str
    fingerprint: str
    available_questions: int
    prompts: Sequence[Prompt]
    verifiers: Mapping[str, VerifierSpec]
    hub: str = ""
    revision: str | None = None
    expected_questions: int | None = None
    notice: str = ""

    def first(self, count: int | None) -> Questions:
        """Only the first ``count`` questions; None: all."""
        return replace(self, prompts=self.prompts[:count])

    def rendered(self, render: Callable[[Prompt], Prompt]) -> Questions:
        """Every prompt replaced by its rendered form."""
        return replace(self, prompts=[render(prompt) for prompt in self.prompts])


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes whenever a question or an answer changes."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.text, prompt.answer]).encode() + b"\n")
    return digest.hexdigest()


def benchmark_questions(
    names: Sequence[str], mirror: Path | None, problems: int | None, sandbox: SandboxConfig
) -> list[Questions]:
    """Load the named benchmarks (``gym:NAME`` for generators), each once, with the first ``problems`` questions."""
    # Validate all names and the sandbox before loading anything.
    entries = [name if name.startswith(GYM) else find_benchmark(name) for name in dict.fromkeys(names)]
    if runs_programs(names):
        require_sandbox(sandbox)
    return [
        _gym_questions(entry, problems or GYM_QUESTIONS)
        if isinstance(entry, str)
        else load_questions(entry, mirror, sandbox).first(problems)
        for entry in entries
    ]


def _gym_questions(name: str, count: int) -> Questions:
    """Questions of a reasoning-gym generator, independent of the sampling seed."""
    title = name.removeprefix(GYM)
    prompts = gym_prompts(title, count=count)
    return Questions(
        name=name,
        title=title,
        fingerprint=fingerprint(prompts),
        available_questions=len(prompts),
        prompts=[replace(prompt, source=name) for prompt in prompts],
        verifiers={name: GYM_VERIFIER},
        revision=f"reasoning-gym {version('reasoning-gym')}",
    )


def task_questions(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    problems: int | None,
    *,
    whole: bool,
    max_prompt_tokens: int | None = None,
) -> list[Questions]:
    """Rendered held-out prompts of a task; each part of a mix is a benchmark of its own.

    Without a tokenizer a prompt is one user message, for the server's chat template. ``problems``: total over parts,
    from the start. ``whole``: all rows, no held-out split. Prompts over ``max_prompt_tokens`` are rejected.
    """
    if tokenizer is None:
        for part in (config, *config.parts):
            _require_one_message(part)
        config = config.model_copy(update={"chat_template": False})
    task = (open_evaluation_task if whole else open_task)(config, tokenizer, max_prompt_tokens=max_prompt_tokens)
    if not task.verifiers:
        raise UserError(f"{task.name}: its rows have no answers, so nothing can be judged")
    asked = task.held_out[:problems]
    return [
        Questions(
            name=encodable_text(source) or re.sub(r"[^\w.-]+", "-", Path(task.name).stem).strip("-.") or "task",
            title=encodable_text(source or task.name),
            fingerprint=task.fingerprint,
            available_questions=sum(prompt.source == source for prompt in task.held_out),
            prompts=[prompt for prompt in asked if prompt.source == source],
            verifiers={source: task.verifiers[source]},
        )
        for source in dict.fromkeys(prompt.source for prompt in asked)
    ]


def _require_one_message(config: TaskConfig) -> None:
    for key in ("system_prompt", "chat_template_kwargs", "assistant_prefill", "few_shot"):
        if config.chat_template and key in config.changed():
            raise UserError(
                f"task.{key} = {getattr(config, key)!r} has no place in the one user message that --server sends with "
                f"task.chat_template = true; set that to false, or use another engine"
            )


def prompt_renderer(prompt_format: str, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Prompt], Prompt]:
    """Renders "plain" with the paper's base-model prompt, "chat" with the tokenizer's template, if there is one."""
    if prompt_format == "plain":
        return lambda prompt: replace(prompt, text=PLAIN.replace("{question}", prompt.text))
    if tokenizer is None:
        return lambda prompt: prompt
    if not tokenizer.chat_template:
        raise UserError(
            "--prompt chat: the tokenizer has no chat template (base models often have none); use --prompt plain"
        )

    def chat(prompt: Prompt) -> Prompt:
        messages = [{"role": "user", "content": prompt.text}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return replace(prompt, text=text, templated=True)

    return chat


def load_questions(benchmark: Benchmark, mirror: Path | None, sandbox: SandboxConfig | None = None) -> Questions:
    """All questions of a benchmark from the ``mirror`` folder or the hub.

    Prompt ids are hashes of the questions, the same in every copy; repeated questions get ``-2``, … appended.
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    source = _source(benchmark, mirror)
    rows, revision = _read_rows(benchmark, mirror)
    for place, row in rows:
        if benchmark.wanted is not None and not benchmark.wanted(row):
            continue
        question, answer = benchmark.question_and_answer(row)
        text = _text(question, benchmark, benchmark.prompt_column, place)
        id = hashlib.sha256(text.encode()).hexdigest()[:16]
        seen[id] = seen.get(id, 0) + 1
        prompts.append(
            Prompt(
                id=id if seen[id] == 1 else f"{id}-{seen[id]}",
                text=benchmark.question.replace(PROMPT, text),
                answer=_text(answer, benchmark, benchmark.answer_column, place),
                place=place,
                source=benchmark.name,
                question=text,
            )
        )
    count, expected = len(prompts), benchmark.expected_questions
    if not prompts:
        raise UserError(f"{benchmark.name}: {source} holds no questions; {_remedy(benchmark)}")
    held = f"{count:,} of {expected:,} questions" if count < expected else f"{count:,} questions, not {expected:,}"
    return Questions(
        name=benchmark.name,
        title=benchmark.title,
        fingerprint=fingerprint(prompts),
        available_questions=count,
        prompts=prompts,
        verifiers={
            benchmark.name: code_verifier(sandbox or SandboxConfig())
            if benchmark.verifier == CODE
            else benchmark.verifier
        },
        hub=benchmark.hub,
        revision="mirror" if mirror is not None else revision,
        expected_questions=expected,
        notice="" if count == expected else f"{benchmark.name}: {source} holds {held}; {_NOT_ALL}",
    )


def local_questions(names: Iterable[str], mirror: Path | None) -> tuple[list[Questions], list[str]]:
    """The benchmarks that ``mirror`` or the hub's cache holds, and the names of the others. Uses no network."""
    found, missing = [], []
    for benchmark in map(find_benchmark, names):
        if mirror is not None and Path(_source(benchmark, mirror)).is_dir():
            found.append(load_questions(benchmark, mirror))
            continue
        with tempfile.TemporaryDirectory() as scratch:
            _link_cache(benchmark, Path(scratch))
            try:
                found.append(load_questions(benchmark, Path(scratch)))
            except UserError:  # not in the cache, or only a part of it
                missing.append(benchmark.name)
    return found, missing


def _link_cache(benchmark: Benchmark, folder: Path) -> None:
    """Make ``folder`` a mirror of what the hub's cache has of a data set, if anything."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError):
        cached = snapshot_download(
            benchmark.hub, repo_type="dataset", revision=benchmark.revision, local_files_only=True
        )
        link = folder / benchmark.hub
        link.parent.mkdir()
        link.symlink_to(cached)


def mirror_command(benchmark: Benchmark, folder: str = "DIR") -> str:
    """The command that mirrors a benchmark's data set below ``folder``."""
    revision = f" --revision {benchmark.revision}" if benchmark.revision else ""
    place = shlex.quote(f"{folder}/{benchmark.hub}")
    files = "".join(f" {file}" for file in benchmark.files)
    return f"hf download --repo-type dataset{revision} --local-dir {place} {benchmark.hub}{files}"


def _read_rows(benchmark: Benchmark, mirror: Path | None) -> tuple[Iterable[_Row], str | None]:
    """The rows, and the hub's commit."""
    if mirror is not None and not Path(_source(benchmark, mirror)).is_dir():
        raise UserError(
            f"{benchmark.name}: --mirror {mirror} holds no folder {benchmark.hub}; fill it with: "
            f"{mirror_command(benchmark, str(mirror))}"
        )
    if benchmark.files:
        return _read_files(benchmark, mirror), benchmark.revision
    with tempfile.TemporaryDirectory() as scratch:
        # The library's cache could return old content of this mirror, or that of another.
        rows = _load_split(benchmark, mirror, None if mirror is None else scratch)
        _require_columns(benchmark, rows.column_names, _source(benchmark, mirror))
        # Other columns may hold images, which would be decoded.
        wanted = rows.select_columns(list(benchmark.all_columns))
        read = [(f"{benchmark.name} row {number}", values) for number, values in enumerate(wanted, start=1)]
        return read, benchmark.revision or _commit(rows.info.download_checksums)


def _commit(addresses: Iterable[str] | None) -> str | None:
    """The commit in download addresses such as ``hf://datasets/owner/name@COMMIT/…``."""
    found = {match[1] for address in addresses or () if (match := _COMMIT.search(address))}
    return found.pop() if len(found) == 1 else None


def _load_split(benchmark: Benchmark, mirror: Path | None, cache: str | None) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # noise in logs
    try:
        return datasets.load_dataset(
            _source(benchmark, mirror),
            benchmark.subset,
            split=benchmark.split,
            revision=benchmark.revision if mirror is None else None,
            cache_dir=cache,
        )
    except Exception as error:  # network, unknown name or split, damaged files: dozens of types, one remedy
        raise _unreadable(benchmark, mirror, error) from error


def _read_files(benchmark: Benchmark, mirror: Path | None) -> Iterator[_Row]:
    from huggingface_hub import hf_hub_download

    from forkrl.report.progress import progress  # imports the plotting libraries

    for name in benchmark.files:
        try:
            if mirror is None:
                path = Path(hf_hub_download(benchmark.hub, name, repo_type="dataset", revision=benchmark.revision))
            else:
                path = Path(_source(benchmark, mirror), name)
            file = path.open("rb")
        except Exception as error:  # network, unknown name, a full disk: dozens of types, one remedy
            raise _unreadable(benchmark, mirror, error) from error
        with file:
            for number, line in enumerate(progress(file, f"reading {name}"), start=1):
                if line.strip():
                    place = f"{benchmark.name}: {name} line {number}"
                    row = json_object(line, place)
                    _require_columns(benchmark, list(row), place)
                    yield place, row


def _source(benchmark: Benchmark, mirror: Path | None) -> str:
    return benchmark.hub if mirror is None else str(mirror.expanduser() / benchmark.hub)


def _remedy(benchmark: Benchmark) -> str:
    return f"download it again: {mirror_command(benchmark)}"


def _unreadable(benchmark: Benchmark, mirror: Path | None, error: Exception) -> UserError:
    reason = first_line(error).partition(". ")[0][:200]
    if mirror is not None:
        source = _source(benchmark, mirror)
        return UserError(
            f"{benchmark.name}: {source} does not give split {benchmark.split!r} ({reason}); {_remedy(benchmark)}"
        )
    return UserError(
        f"{benchmark.name}: the hub did not give {benchmark.hub} ({reason}); where it can be reached, mirror it, and "
        f"add --mirror DIR here: {mirror_command(benchmark)}"
    )


def _require_columns(benchmark: Benchmark, names: Sequence[str], place: str) -> None:
    if missing := [column for column in benchmark.all_columns if column not in names]:
        listing = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise UserError(
            f"{place} has no column {missing[0]!r}; it has: {listing or 'none'}; {benchmark.name} reads "
            f"{', '.join(benchmark.all_columns)} of {benchmark.hub}; {_remedy(benchmark)}"
        )


def _text(value: Any, benchmark: Benchmark, column: str, place: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(int(value)) if float(value).is_integer() else str(value)
    if not isinstance(value, str):
        raise UserError(f"{place}: {column} is {kind_of(value)}, not text or a number; {_remedy(benchmark)}")
    if not value.strip():
        raise UserError(f"{place}: {column} is empty; {_remedy(benchmark)}")
    require_characters(value, column, place)
    return value
