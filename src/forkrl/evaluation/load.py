"""Reading the questions of a benchmark: from the hub, or from a local mirror of the same layout.

A mirror holds ``owner/name`` as ``hf download --repo-type dataset owner/name`` leaves it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.errors import UserError
from forkrl.evaluation.benchmarks import PROMPT, Benchmark
from forkrl.report.progress import progress
from forkrl.tasks.json_lines import json_object, kind_of, require_characters
from forkrl.types import Prompt

_COMMIT = re.compile(r"@([0-9a-f]{40})/")


class Questions(NamedTuple):
    """The questions of a benchmark, each the text of one user message with its answer.

    ``revision`` is the hub's commit that they come from, or "mirror"; empty where the hub did not say. ``notice`` says
    what is odd about them; empty where nothing is.
    """

    prompts: list[Prompt]
    revision: str
    notice: str


class _Row(NamedTuple):
    place: str
    """Where it stands, as an error names it: "aime24 row 3"."""
    values: dict[str, Any]


def load_questions(benchmark: Benchmark, mirror: Path | None) -> Questions:
    """All questions of a benchmark, in its order.

    A prompt's id is a hash of its question, so that the same question has the same id whatever copy it came from; a
    question that stands there twice is asked twice, its id with ``-2`` after it.

    Args:
        benchmark: which.
        mirror: the folder that holds ``owner/name``; None: the hub.
    """
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    rows, revision = _read_rows(benchmark, mirror)
    for row in rows:
        if benchmark.wanted is not None and not benchmark.wanted(row.values):
            continue
        question, answer = benchmark.question_and_answer(row.values)
        text = _text(question, benchmark, benchmark.prompt_column, row.place)
        id = hashlib.sha256(text.encode()).hexdigest()[:16]
        seen[id] = seen.get(id, 0) + 1
        prompts.append(
            Prompt(
                id=id if seen[id] == 1 else f"{id}-{seen[id]}",
                text=benchmark.question.replace(PROMPT, text),
                answer=_text(answer, benchmark, benchmark.answer_column, row.place),
                place=row.place,
                source=benchmark.name,
            )
        )
    if not prompts:
        raise UserError(f"{benchmark.name}: {_source(benchmark, mirror)} holds no questions; {_remedy(benchmark)}")
    return Questions(prompts, revision, _count_notice(benchmark, mirror, len(prompts)))


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes whenever a question or an answer does."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.text, prompt.answer]).encode() + b"\n")
    return digest.hexdigest()


def mirror_command(benchmark: Benchmark, folder: str = "DIR") -> str:
    """The command that mirrors a benchmark's data set below ``folder``."""
    revision = f" --revision {benchmark.revision}" if benchmark.revision else ""
    files = "".join(f" {file}" for file in benchmark.files)
    place = shlex.quote(f"{folder}/{benchmark.hub}")
    return f"hf download --repo-type dataset{revision} --local-dir {place} {benchmark.hub}{files}"


def _count_notice(benchmark: Benchmark, mirror: Path | None, count: int) -> str:
    if count == benchmark.expected_questions:
        return ""
    return (
        f"{benchmark.name}: {_source(benchmark, mirror)} holds {count} questions, not the "
        f"{benchmark.expected_questions} expected; figures may not compare with others'"
    )


def _read_rows(benchmark: Benchmark, mirror: Path | None) -> tuple[Iterable[_Row], str]:
    """The rows, and the revision that they come from."""
    if mirror is not None and not _mirrored(benchmark, mirror).is_dir():
        raise UserError(
            f"{benchmark.name}: --mirror {mirror} holds no folder {benchmark.hub}; fill it with: "
            f"{mirror_command(benchmark, str(mirror))}"
        )
    if benchmark.files:
        files = (_local_file(benchmark, mirror, name) for name in benchmark.files)
        rows = itertools.chain.from_iterable(_read_file(benchmark, file) for file in files)
        return rows, "mirror" if mirror is not None else benchmark.revision or ""
    return _read_split(benchmark, mirror)


def _read_split(benchmark: Benchmark, mirror: Path | None) -> tuple[list[_Row], str]:
    with tempfile.TemporaryDirectory() as scratch:
        # The library's own cache would give a mirror's earlier content, or that of another mirror.
        rows = _load_split(benchmark, mirror, None if mirror is None else scratch)
        _require_columns(benchmark, rows.column_names, _source(benchmark, mirror))
        # Others may hold pictures, which would be decoded.
        wanted = rows.select_columns(list(benchmark.all_columns))
        read = [_Row(f"{benchmark.name} row {number}", values) for number, values in enumerate(wanted, start=1)]
        return read, "mirror" if mirror is not None else benchmark.revision or _commit(rows.info.download_checksums)


def _commit(addresses: Iterable[str] | None) -> str:
    """The commit in the addresses that a data set was downloaded from, such as ``hf://datasets/owner/name@COMMIT/…``;
    empty where they do not say."""
    found = {match[1] for address in addresses or () if (match := _COMMIT.search(address))}
    return found.pop() if len(found) == 1 else ""


def _load_split(benchmark: Benchmark, mirror: Path | None, cache: str | None) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # in a log they are noise around the lines that matter
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


def _local_file(benchmark: Benchmark, mirror: Path | None, name: str) -> Path:
    """A file of the repository, downloaded where there is no mirror."""
    if mirror is not None:
        return _mirrored(benchmark, mirror) / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(benchmark.hub, name, repo_type="dataset", revision=benchmark.revision))
    except Exception as error:  # network, unknown name, a full disk: dozens of types, one remedy
        raise _unreadable(benchmark, mirror, error) from error


def _read_file(benchmark: Benchmark, path: Path) -> Iterator[_Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(progress(file, f"reading {path.name}"), start=1):
                if not line.strip():
                    continue
                place = f"{benchmark.name}: {path.name} line {number}"
                row = json_object(line, place)
                _require_columns(benchmark, list(row), place)
                yield _Row(place, row)
    except OSError as error:
        raise UserError(f"{benchmark.name}: {path}: cannot be read ({error.strerror}); {_remedy(benchmark)}") from error


def _mirrored(benchmark: Benchmark, mirror: Path) -> Path:
    return mirror.expanduser() / benchmark.hub


def _source(benchmark: Benchmark, mirror: Path | None) -> str:
    return benchmark.hub if mirror is None else str(_mirrored(benchmark, mirror))


def _remedy(benchmark: Benchmark) -> str:
    return f"get it anew: {mirror_command(benchmark)}"


def _unreadable(benchmark: Benchmark, mirror: Path | None, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:200]
    if mirror is not None:
        return UserError(
            f"{benchmark.name}: {_source(benchmark, mirror)} does not give split {benchmark.split!r} ({reason}); "
            f"{_remedy(benchmark)}"
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
