"""The files of an evaluation: lines whole or not at all, results that replace failures, questions that must stay."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from forkrl.errors import UserError
from forkrl.evaluation.folder import BenchmarkFiles, LineFile, read_rows, read_texts
from forkrl.evaluation.samplers import Sampled, SampleRequest
from forkrl.types import Prompt, VerifierResult

PROMPTS = [Prompt("q1", "1 + 1 =", "2"), Prompt("q2", "2 + 2 =", "4")]


def sampled(request: SampleRequest, text: str) -> Sampled:
    return Sampled(request, text, tokens=len(text), finished=True, entropy=None)


def opened(folder: Path, prompts: list[Prompt] | None = None, samples: int = 2) -> BenchmarkFiles:
    return BenchmarkFiles(folder, "sums", prompts or PROMPTS, samples)


def keys(requests: list[SampleRequest]) -> list[tuple[str, int]]:
    return [(request.prompt.id, request.sample) for request in requests]


def test_reasoning_is_stored_and_not_judged(tmp_path: Path) -> None:
    with opened(tmp_path, samples=1) as files:
        files.add_response(sampled(files.grid[0], "4")._replace(reasoning="two and two"))
    with opened(tmp_path, samples=1) as files:
        assert [text for _, text in files.unjudged()] == ["4"]
        files.add_result(files.grid[0], VerifierResult(1.0))
        assert files.scored()[0].score == 1
    row = json.loads((tmp_path / "responses/sums.jsonl").read_text())
    assert (row["text"], row["reasoning"]) == ("4", "two and two")
    assert read_texts(tmp_path, "sums", {("q1", 0)}) == {("q1", 0): "<think>two and two</think>4"}


def test_what_is_missing_unjudged_and_scored(tmp_path: Path) -> None:
    with opened(tmp_path) as files:
        assert keys(files.missing()) == [("q1", 0), ("q1", 1), ("q2", 0), ("q2", 1)]
        for index in (2, 0, 1):
            files.add_response(sampled(files.grid[index], f"text {index}"))
        files.add_result(files.grid[0], VerifierResult(1.0, answer="2"))
        files.add_result(files.grid[1], VerifierResult(0.0, failure="timeout"))
    with opened(tmp_path) as files:
        assert keys(files.missing()) == [("q2", 1)]
        unjudged = files.unjudged()
        assert [(*keys([request]), text) for request, text in unjudged] == [
            (("q1", 1), "text 1"), (("q2", 0), "text 2"),
        ]  # fmt: skip
        for request, _ in unjudged:
            files.add_result(request, VerifierResult(0.0, answer=""))
        assert [(each.question, each.sample, each.score, each.failure, each.answer) for each in files.scored()] == [
            ("q1", 0, 1.0, "", "2"), ("q1", 1, 0.0, "", ""), ("q2", 0, 0.0, "", ""),
        ]  # fmt: skip
    with opened(tmp_path) as files:
        assert files.unjudged() == []


@pytest.mark.parametrize("torn", [b"{", b'{"question": "q2", "sample": 1', b"\0\0\0", b"x" * 3_000_000])
def test_half_a_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    whole = b'{"a": 1}\n{"a": 2}\n'
    path.write_bytes(whole + torn)
    lines = LineFile(path)
    assert path.read_bytes() == whole
    lines.append({"a": 3})
    lines.close()
    LineFile(path).close()
    assert [row["a"] for row in read_rows(path, {})] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("responses", "{}", "line 2: question is missing"),
        ("responses", '{"question": ["q1"], "sample": 0}', "line 2: question is "),
        ("responses", "{torn", "line 2 is not JSON"),
        ("scores", '{"question": "q1", "sample": 0, "failure": "", "answer": null}', "line 2: score is "),
        (
            "scores",
            '{"question": "q1", "sample": 0, "score": 7, "failure": "", "answer": null}',
            r"line 2: score 7 is not in \[0, 1\]",
        ),
    ],
)
def test_a_damaged_line_is_named_with_what_to_do(tmp_path: Path, name: str, line: str, says: str) -> None:
    with opened(tmp_path) as files:
        files.add_response(sampled(files.grid[0], "text"))
        files.add_result(files.grid[0], VerifierResult(1.0, answer="2"))
    path = tmp_path / name / "sums.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=rf"{name}/sums.jsonl {says}.*remove that line"):
        opened(tmp_path)


def test_a_file_of_half_a_line_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_bytes(b'{"a"')
    LineFile(tmp_path / "lines.jsonl").close()
    assert (tmp_path / "lines.jsonl").read_bytes() == b""


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = LineFile(tmp_path / "lines.jsonl")
    lines.append({"a": 1})
    write, calls = os.write, []

    def fill_up(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:5])

    monkeypatch.setattr(os, "write", fill_up)
    with pytest.raises(UserError, match="disk is full"):
        lines.append({"a": 2})
    monkeypatch.undo()
    assert len(calls) == 2
    lines.append({"a": 3})
    assert [row["a"] for row in read_rows(lines.path, {})] == [1, 3]


def test_text_that_is_no_text_is_kept(tmp_path: Path) -> None:
    text = "half \ud800, nul \0, line break \n, separator \u2028"
    with opened(tmp_path) as files:
        files.add_response(sampled(files.grid[0], text))
    with opened(tmp_path) as files:
        assert [kept for _, kept in files.unjudged()] == [text]


@pytest.mark.parametrize(
    "prompts",
    [
        [PROMPTS[0], Prompt("q2", "2 + 2 =", "5")],
        [PROMPTS[0], Prompt("q2", "User: 2 + 2 =", "4")],
        [PROMPTS[0]],
        [PROMPTS[1], PROMPTS[0]],
    ],
)
def test_other_questions_are_refused(tmp_path: Path, prompts: list[Prompt]) -> None:
    with opened(tmp_path):
        pass
    with pytest.raises(UserError, match="sums.jsonl: the questions, or their prompts or answers, have changed"):
        opened(tmp_path, prompts)


def test_long_answers_are_cut_but_their_change_is_seen(tmp_path: Path) -> None:
    tests = "t" * 3000
    with opened(tmp_path, [Prompt("q", "?", tests + "1")]):
        row = json.loads((tmp_path / "questions/sums.jsonl").read_text())
    assert row["answer"] == tests[:2000]
    with pytest.raises(UserError, match="have changed"):
        opened(tmp_path, [Prompt("q", "?", tests + "2")])
