r"""Every benchmark's questions and answers, read from made-up files in the hub's layouts, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from forkrl.errors import UserError
from forkrl.evaluation.benchmarks import BENCHMARKS, BOXED, find_benchmark
from forkrl.evaluation.questions import Questions, load_questions, local_questions, mirror_command
from forkrl.rewards.code.test_cases import ProgramTest, unpack_tests
from tests import benchmark_mirror
from tests.benchmark_mirror import make_mirror, write_rows


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mirror(tmp_path_factory.mktemp("mirror"))


def loaded(name: str, mirror: Path) -> Questions:
    return load_questions(find_benchmark(name), mirror)


def boxed(question: str) -> str:
    return f"{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


EXPECTED: Mapping[str, list[tuple[str, str]]] = {
    "aime24": [("What is 0 + 0?", "000"), ("What is 1 + 1?", "002"), ("What is 2 + 2?", "004")],
    "aime25": [(f"{n} + 1 =", str(n + 1)) for n in range(4)],
    "amc23": [(f"{n} times 1 =", str(n)) for n in range(3)],
    "math500": [(f"{n} - {n} =", "\\frac{0}{7}") for n in range(3)],
    "minerva": [("How many $\\mathrm{km}$ are 5000 m?", "5")] * 2,
    "olympiad": [("Let $x^2-3x+2=0$.\nFind all $x$.", "1, 2"), ("Find $y$.", "$3 y$")],
    "gsm8k": [("Ann has 3 apples, Bob 1,000. Together?", "1003")],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_questions_and_answers(name: str, mirror: Path) -> None:
    questions = loaded(name, mirror)
    assert [(prompt.text, prompt.answer) for prompt in questions.prompts] == [
        (boxed(question), answer) for question, answer in EXPECTED[name]
    ]
    assert {prompt.source for prompt in questions.prompts} == {name}
    assert questions.revision == "mirror"


def test_the_wording_is_the_papers() -> None:
    assert BOXED == "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."


def test_a_duplicate_question_is_asked_twice(mirror: Path) -> None:
    first, second = (prompt.id for prompt in loaded("minerva", mirror).prompts)
    assert second == f"{first}-2"


def test_every_benchmark_has_an_entry_of_its_own() -> None:
    assert list(BENCHMARKS) == [*EXPECTED, "livecodebench", "humaneval"]
    assert {name: entry.expected_questions for name, entry in BENCHMARKS.items()} == {
        "aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva": 272, "olympiad": 674, "gsm8k": 1319,
        "livecodebench": 279, "humaneval": 164,
    }  # fmt: skip


def test_another_number_of_questions_is_noticed(mirror: Path) -> None:
    notice = loaded("aime25", mirror).notice
    assert notice.startswith("aime25: ") and notice.endswith(
        "holds 4 of 30 questions; figures do not compare with those of the whole benchmark"
    )


def test_too_many_questions_are_noticed(tmp_path: Path) -> None:
    rows = [{"problem": f"{n} =", "answer": str(n)} for n in range(31)]
    write_rows(tmp_path / "math-ai/aime25/test.jsonl", rows)
    assert "holds 31 questions, not 30; " in loaded("aime25", tmp_path).notice


def test_the_number_expected_is_no_notice(tmp_path: Path) -> None:
    rows = [{"problem": f"{n} =", "answer": str(n), "id": str(n)} for n in range(30)]
    write_rows(tmp_path / "math-ai/aime25/test.jsonl", rows)
    assert loaded("aime25", tmp_path).notice == ""


def test_fingerprints_tell_answers_and_questions_apart(tmp_path: Path) -> None:
    def of(problem: str, answer: str) -> str:
        folder = tmp_path / f"{problem}{answer}"
        write_rows(folder / "math-ai/aime25/test.jsonl", [{"problem": problem, "answer": answer}])
        return loaded("aime25", folder).fingerprint

    assert len({of("a", "1"), of("a", "2"), of("b", "1")}) == 3
    assert of("a", "1") == of("a", "1")


def test_a_mirror_that_has_changed_gives_what_it_holds_now(tmp_path: Path) -> None:
    make_mirror(tmp_path)
    assert [prompt.answer for prompt in loaded("gsm8k", tmp_path).prompts] == ["1003"]
    rows = [{"question": "Ann has 3 apples, Bob 1,001. Together?", "answer": "3+1001\n#### 1,004"}]
    write_rows(tmp_path / "openai/gsm8k/main/test-00000-of-00001.parquet", rows)
    assert [prompt.answer for prompt in loaded("gsm8k", tmp_path).prompts] == ["1004"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"problem": "1 =", "answer": None}, "aime25 row 2: answer is missing, not text or a number"),
        ({"problem": "1 =", "answer": "  "}, "aime25 row 2: answer is empty"),
        ({"problem": None, "answer": "1"}, "aime25 row 2: problem is missing, not text"),
    ],
)
def test_a_row_that_lacks_something(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    write_rows(tmp_path / "math-ai/aime25/test.jsonl", [{"problem": "0 =", "answer": "0"}, row])
    with pytest.raises(UserError) as caught:
        loaded("aime25", tmp_path)
    assert says in str(caught.value)
    assert mirror_command(find_benchmark("aime25")) in str(caught.value)


def test_a_solution_without_its_number(tmp_path: Path) -> None:
    make_mirror(tmp_path)
    rows = [{"question": "1 =", "answer": "it is one"}]
    write_rows(tmp_path / "openai/gsm8k/main/test-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match="gsm8k row 1: answer is empty"):
        loaded("gsm8k", tmp_path)


@pytest.mark.parametrize("name", ["aime25", "livecodebench"])
def test_other_columns_are_named(tmp_path: Path, name: str) -> None:
    entry = find_benchmark(name)
    write_rows(tmp_path / entry.hub / "test.jsonl", [{"Problem": "1 =", "solution": "1"}])
    with pytest.raises(UserError) as caught:
        loaded(name, tmp_path)
    line = str(caught.value)
    assert (
        f"has no column {entry.prompt_column!r}; it has: Problem, solution; {name} reads {entry.prompt_column}," in line
    )


def test_a_mirror_without_the_data_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        loaded("math500", tmp_path)
    assert str(caught.value).endswith(
        f"hf download --repo-type dataset --revision 6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be "
        f"--local-dir {tmp_path}/HuggingFaceH4/MATH-500 HuggingFaceH4/MATH-500"
    )


def test_a_damaged_mirror(tmp_path: Path) -> None:
    (tmp_path / "math-ai/aime25").mkdir(parents=True)
    (tmp_path / "math-ai/aime25/test.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="aime25: .* does not give split 'test'"):
        loaded("aime25", tmp_path)


@pytest.mark.parametrize("name", ["aime24", "livecodebench"])
def test_a_hub_that_cannot_be_reached_says_how_to_mirror(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    entry = find_benchmark(name)
    with pytest.raises(UserError) as caught:
        load_questions(entry, None)
    line = str(caught.value)
    assert line.startswith(f"{name}: the hub did not give {entry.hub} (Couldn't reach it on the Hub); ")
    assert line.endswith(f"add --mirror DIR here: {mirror_command(entry)}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("given", "guess"), [("aime2024", "did you mean aime24? "), ("MATH500", "did you mean math500? "), ("x", "")]
)
def test_an_unknown_name(given: str, guess: str) -> None:
    with pytest.raises(UserError) as caught:
        find_benchmark(given)
    assert str(caught.value) == f"--bench {given}: no such benchmark; {guess}forkrl eval --list shows all of them"


def test_revisions_are_commits() -> None:
    revisions = [entry.revision for entry in BENCHMARKS.values() if entry.revision is not None]
    assert len(revisions) == 7 and all(len(each) == 40 and int(each, 16) for each in revisions)


def test_programs_of_the_papers_window_are_asked_in_the_benchmarks_wording(mirror: Path) -> None:
    program, method = loaded("livecodebench", mirror).prompts
    task = (
        "You are an expert Python programmer. You will be given a question (problem specification) and will generate "
        "a correct Python program that matches the specification and passes all tests.\n\n"
        "### Question:\nPrint twice the number.\n\n### Format: "
    )
    end = "\n```\n\n### Answer: (use the provided format with backticks)\n"
    assert program.text.startswith(f"{task}Read the inputs from stdin solve the problem and write the answer to stdout")
    assert program.text.endswith(f"```python\n# YOUR CODE HERE{end}")
    assert method.text == (
        f"{task}You will use the following starter code to write the solution to the problem and enclose your code "
        f"within delimiters.\n```python\n{benchmark_mirror.LIVECODEBENCH[2]['starter_code']}{end}"
    )
    assert unpack_tests(program.answer).programs == (ProgramTest("2\n", "4\n"), ProgramTest("5\n", "10\n"))
    assert unpack_tests(method.answer).function == "twice"


def test_functions_are_asked_in_the_wording_of_evalplus(mirror: Path) -> None:
    (prompt,) = loaded("humaneval", mirror).prompts
    assert prompt.text == (
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
        f"```\n{benchmark_mirror.HUMANEVAL[0]['prompt'].strip()}\n```\n"
    )
    asserts = unpack_tests(prompt.answer).asserts
    assert asserts and (asserts.functions, asserts.check) == (("twice",), "twice")
    assert asserts.prompt == benchmark_mirror.HUMANEVAL[0]["prompt"]


def test_functions_without_usable_tests_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": "def f(x):\n", "test": "check(f)", "entry_point": "f"}]
    write_rows(tmp_path / "openai/openai_humaneval/test.jsonl", rows)
    with pytest.raises(UserError, match="humaneval: the tests of 'f' cannot be used: the tests hold no assert"):
        loaded("humaneval", tmp_path)


def test_the_hub_is_asked_for_the_pinned_commit_and_the_answer_says_which_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the hub gives the mirror's files, with addresses as the library notes them."""
    import datasets

    mirror, load, asked = make_mirror(tmp_path), datasets.load_dataset, []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def from_mirror(name: str, subset: str | None, *, revision: str | None, **how: Any) -> Any:
        asked.append(revision)
        rows = load(str(mirror / name), subset, split=how["split"], cache_dir=str(tmp_path / "cache"))
        rows.info.download_checksums = {f"hf://datasets/{name}@{revision or commit}/main/test.parquet": {}}
        return rows

    monkeypatch.setattr(datasets, "load_dataset", from_mirror)
    pinned, newest = (load_questions(find_benchmark(name), None) for name in ("aime24", "gsm8k"))
    assert asked == [find_benchmark("aime24").revision, None]
    assert (pinned.revision, newest.revision) == (asked[0], commit)
    assert [prompt.answer for prompt in newest.prompts] == ["1003"]


def test_local_copies_are_read_from_the_mirror_and_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    make_mirror(tmp_path / "mirror")
    for name, revision in (("aime25", BENCHMARKS["aime25"].revision), ("minerva", "0" * 40), ("amc23", "1" * 40)):
        copy = tmp_path / "hub" / f"datasets--{BENCHMARKS[name].hub.replace('/', '--')}"
        (copy / "snapshots").mkdir(parents=True)
        (tmp_path / "mirror" / BENCHMARKS[name].hub).rename(copy / "snapshots" / str(revision))
        (copy / "refs").mkdir()
        (copy / "refs" / "main").write_text(str(revision))
    names = ["aime24", "aime25", "amc23", "minerva"]
    cached, missing = local_questions(names, None)
    # The cache has another revision of amc23.
    assert ([each.name for each in cached], missing) == (["aime25", "minerva"], ["aime24", "amc23"])
    assert [prompt.question for prompt in cached[0].prompts] == [f"{n} + 1 =" for n in range(4)]
    found, missing = local_questions(names, tmp_path / "mirror")
    assert ([each.name for each in found], missing) == (["aime24", "aime25", "minerva"], ["amc23"])
