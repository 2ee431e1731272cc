"""Real rows of HumanEval, GSM8K and AIME'25, from packages: reference solutions are right, altered ones are wrong."""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from forkrl.evaluation.benchmarks import BENCHMARKS
from forkrl.evaluation.questions import Questions, load_questions
from forkrl.rewards import VerifierPool
from forkrl.types import VerifierResult
from tests.once import once
from tests.sandbox_here import needs_bubblewrap
from tools.mirror_packages import SOURCES, main, make_mirrors, refuse_other_files, write_rows

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mod,
}  # fmt: skip
SURVIVORS = {40: 2, 129: 2, 147: 1}
"""By problem: how many of its first mutants pass the benchmark's tests."""


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> str:
        try:
            make_mirrors(folder)
        except ConnectionError as error:
            return str(error)
        return ""

    folder, missing = once(tmp_path_factory, "package-rows", make)
    if missing:
        pytest.skip(missing)
    return folder


AIME = SOURCES[2]
HUB_README = "---\nlicense: mit\n---\n30 rows"


@pytest.mark.parametrize(
    "others",
    [
        {"test.jsonl": "{}\n"},
        {"README.md": HUB_README, "test.jsonl": "{}\n"},
        {"README.md": f"30 rows from {AIME.member} in {AIME.wheel}.\n", "main": "a"},
    ],
)
def test_a_mirror_from_the_hub_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: dict[str, str]
) -> None:
    folder = tmp_path / AIME.hub
    folder.mkdir(parents=True)
    for name, text in others.items():
        (folder / name).write_text(text)
    monkeypatch.setattr("tools.mirror_packages.download", lambda folder: pytest.fail("downloads"))
    monkeypatch.setattr("sys.argv", ["mirror_packages", str(tmp_path)])
    with pytest.raises(SystemExit) as told:
        main()
    assert told.value.code == (
        f"mirror_packages: {folder} has files that this tool did not write; remove it, or choose another FOLDER"
    )
    assert {path.name: path.read_text() for path in folder.iterdir()} == others


def test_a_mirror_of_the_packages_is_written_again(tmp_path: Path) -> None:
    case = {"source": "AIME2025", "question": "?", "answer": "7", "id": "a"}
    with zipfile.ZipFile(tmp_path / AIME.wheel, "w") as wheel:
        wheel.writestr(AIME.member, json.dumps({"cases": [case, case | {"source": "other"}]}))
    for _ in range(2):
        refuse_other_files(AIME, tmp_path / "made")
        assert write_rows(AIME, tmp_path, tmp_path / "made") == 1
        assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["README.md", "test.jsonl"]


def questions_and_rows(name: str, mirror: Path) -> tuple[Questions, list[dict[str, Any]]]:
    lines = (mirror / BENCHMARKS[name].hub / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return load_questions(BENCHMARKS[name], mirror), [json.loads(line) for line in lines]


def judged(questions: Questions, responses: Sequence[str]) -> list[VerifierResult]:
    with VerifierPool(questions.verifiers, workers=2) as pool:
        return pool.verify(list(zip(questions.prompts, responses, strict=True)))


def mutant(program: str, function: str, number: int) -> str:
    """A copy of the program with one operator, condition, constant or result of the function altered."""
    tree = ast.parse(program)
    (body,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    body.body = [each for each in body.body if not _is_text(each)]
    nodes = [node for statement in body.body for node in ast.walk(statement)]
    places = [(node, place) for kind in (_operator, _constant, _result) for node in nodes if (place := kind(node))]
    node, changes = places[number]
    for name, value in changes.items():
        setattr(node, name, value)
    return ast.unparse(ast.fix_missing_locations(tree))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _operator(node: ast.AST) -> dict[str, Any]:
    if isinstance(node, ast.Compare):
        return {"ops": [SWAPPED[type(node.ops[0])](), *node.ops[1:]]}
    if isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPPED:
        return {"op": SWAPPED[type(node.op)]()}
    return {}


def _constant(node: ast.AST) -> dict[str, Any]:
    match node:
        case ast.Constant(value=bool(value)):
            return {"value": not value}
        case ast.Constant(value=int(value) | float(value)):
            return {"value": value * 2 or 1}
        case ast.Constant(value=str(value)):
            return {"value": value + "x"}
    return {}


def _result(node: ast.AST) -> dict[str, Any]:
    return {"value": ast.List([node.value])} if isinstance(node, ast.Return) and node.value else {}


def response(row: dict[str, Any], form: int) -> str:
    """The canonical solution as the whole program, without the helpers, as a body, or as a continuation."""
    prompt, body = row["prompt"], row["canonical_solution"]
    function = prompt[prompt.rindex(f"def {row['entry_point']}(") :]
    return (fenced(prompt + body), fenced(function + body), fenced(body), body)[form]


def fenced(code: str) -> str:
    return f"Here is the code:\n```python\n{code}\n```\nIt passes the tests."


def wrong(results: Sequence[VerifierResult], score: float) -> dict[int, VerifierResult]:
    """By question, the results that are not this score."""
    return {number: each for number, each in enumerate(results) if (each.score, each.failure) != (score, "")}


@needs_bubblewrap
def test_every_canonical_solution_passes_and_every_altered_one_fails(mirror: Path) -> None:
    questions, rows = questions_and_rows("humaneval", mirror)
    assert (len(rows), questions.notice) == (164, "")
    canonical = [response(row, number % 4) for number, row in enumerate(rows)]
    assert not wrong(judged(questions, canonical), 1)
    altered = [
        fenced(mutant(row["prompt"] + row["canonical_solution"], row["entry_point"], SURVIVORS.get(number, 0)))
        for number, row in enumerate(rows)
    ]
    assert not wrong(judged(questions, altered), 0)


def test_every_reference_solution_is_right_and_another_questions_is_wrong(mirror: Path) -> None:
    questions, rows = questions_and_rows("gsm8k", mirror)
    assert len(rows) == 100 and "holds 100 of 1,319 questions" in questions.notice
    assert not wrong(judged(questions, [row["answer"] for row in rows]), 1)
    golds = [prompt.answer for prompt in questions.prompts]
    others = [next(i for i in [*range(n, 100), *range(n)] if golds[i] != gold) for n, gold in enumerate(golds)]
    assert not wrong(judged(questions, [rows[i]["answer"] for i in others]), 0)


def test_every_answer_of_aime_is_right_in_a_box(mirror: Path) -> None:
    questions, rows = questions_and_rows("aime25", mirror)
    assert len(rows) == 25 and "holds 25 of 30 questions" in questions.notice
    assert not wrong(judged(questions, [f"So it is \\boxed{{{row['answer']}}}." for row in rows]), 1)
    assert not wrong(judged(questions, [f"So it is \\boxed{{{row['answer']}1}}." for row in rows]), 0)
