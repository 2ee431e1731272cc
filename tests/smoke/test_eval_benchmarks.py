r"""``forkrl eval --bench``: a folder that survives a kill, and figures that an interruption does not change."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from forkrl.commands.report import write_report
from forkrl.config import SandboxConfig
from forkrl.errors import UserError
from forkrl.evaluation.folder import read_results
from forkrl.rewards.code.sandbox import require_sandbox
from tests.benchmark_mirror import AIME25, make_mirror, write_rows
from tests.openai_server import MODEL, Exchange, OpenAIServer, completion
from tests.smoke.world import Outcome, World, make_model

# The paper's prompt has letters that the tiny tokenizer does not know.
UNKNOWN = "task.allow_unknown_tokens=true"
SHORT = ("--samples", "4", "--max-tokens", "10", "rollout.max_sequences=5", "runtime.device=cpu", UNKNOWN)
BOTH = ("--bench", "aime25", "math500", "--mirror", "mirror")
NAMES = ("aime25", "math500")
CLOCK = ("seconds", "tokens_per_s")


def sandbox_works() -> bool:
    try:
        require_sandbox(SandboxConfig())
    except UserError:
        return False
    return True


SANDBOX_WORKS = sandbox_works()


@pytest.fixture(scope="module")
def here(world: World) -> World:
    """The world with a mirror, and a model that has room for the paper's prompt."""
    make_mirror(world.folder / "mirror")
    make_model(world.folder / "wide", max_position_embeddings=256)
    return world


@pytest.fixture(scope="module")
def whole(here: World) -> Path:
    """An evaluation that was never interrupted."""
    outcome = here.run("eval", "wide", *BOTH, *SHORT, "--out", "whole")
    assert outcome.code == 0, outcome.stderr
    (here.folder / "stdout").write_text(outcome.stdout)
    return here.folder / "whole"


def run(world: World, *argv: str, **how: Any) -> Outcome:
    """Without the page, which costs more than the tiny model."""
    return world.run(*argv, without_report=True, **how)


def benchmarks(folder: Path) -> list[dict[str, Any]]:
    """The figures of every benchmark; None where one is unknown."""
    rows = read_results(folder).tables["benchmarks"].to_dict("records")
    return [{str(name): None if value != value else value for name, value in row.items()} for row in rows]


def lines(folder: Path, part: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / part / f"{name}.jsonl").read_text().splitlines()]


def failures(figures: dict[str, Any]) -> int:
    return sum(int(value) for name, value in figures.items() if name.startswith("failed_"))


def timeless(folder: Path) -> dict[str, list[dict[Any, Any]]]:
    """The rows of every table by benchmark, without the clock; None where a figure is unknown."""
    return {
        name: sorted(
            (
                {key: None if value != value else value for key, value in row.items() if key not in CLOCK}
                for row in table.to_dict("records")
            ),
            key=lambda row: str(row.get("benchmark")),
        )
        for name, table in read_results(folder).tables.items()
    }


def responses(folder: Path, name: str) -> list[str]:
    return (folder / "responses" / f"{name}.jsonl").read_text().splitlines()


def scores(folder: Path, name: str) -> set[str]:
    """Without their order."""
    return set((folder / "scores" / f"{name}.jsonl").read_text().splitlines())


def assert_same(folder: Path, whole: Path) -> None:
    assert timeless(folder) == timeless(whole)
    for name in NAMES:
        assert responses(folder, name) == responses(whole, name)
        assert scores(folder, name) == scores(whole, name)


def test_the_folder_holds_what_the_documentation_says(here: World, whole: Path) -> None:
    found = read_results(whole)
    assert {key: found.settings[key] for key in ("schema", "model", "engine", "samples", "prompt_format")} == {
        "schema": "forkrl-eval/3", "model": "wide", "engine": "torch", "samples": 4, "prompt_format": "plain",
    }  # fmt: skip
    assert found.facts["verifiers"]["aime25"] == {"aime25": ["forkrl.rewards.math:verify_math", {}]}
    assert {path.stem for path in (whole / "tables").iterdir()} == set(found.tables)
    assert set(found.tables) == {"benchmarks", "passes", "budget", "lengths", "unanswered", "mean"}
    rows = benchmarks(whole)
    assert [(each["benchmark"], each["questions"], each["expected_questions"]) for each in rows] == [
        ("aime25", 4, 30), ("math500", 3, 500),
    ]  # fmt: skip
    first = rows[0]
    assert (first["hub"], first["revision"]) == ("math-ai/aime25", "mirror")
    assert 0 <= first["unparsed"] <= 1 and first["accuracy_low"] <= first["accuracy"] <= first["accuracy_high"]
    assert "holds 4 of 30 questions" in first["notice"]
    assert set(lines(whole, "responses", "aime25")[0]) == {
        "question", "sample", "text", "reasoning", "tokens", "finished", "entropy",
    }  # fmt: skip
    assert set(lines(whole, "scores", "aime25")[0]) == {"question", "sample", "score", "failure", "answer"}
    asked = lines(whole, "questions", "aime25")[0]
    wording = "Please reason step by step, and put your final answer within \\boxed{}."
    assert asked["prompt"] == f"User:\n0 + 1 =\n{wording}\n\nAssistant:\n"
    assert asked["answer"] == "1"
    stdout = (here.folder / "stdout").read_text()
    assert "report: whole/report.html" in stdout and (whole / "report.html").is_file()
    assert re.search(r"AIME'25 +4 +0\.?\d* \[", stdout) and "25.42 → 26.25" in stdout


KILLS = [("response", 8), ("response", 17), ("result", 20)]


@pytest.mark.parametrize(("point", "count"), KILLS)
def test_a_kill_loses_nothing_that_was_finished(here: World, whole: Path, point: str, count: int) -> None:
    out = f"killed-{point}-{count}"
    command = ("eval", "wide", *BOTH, *SHORT, "--out", out)
    fatal = {"point": point, "count": count, "signal": signal.SIGKILL}
    assert run(here, *command, faults=[fatal]).code == -signal.SIGKILL
    folder = here.folder / out
    before = {path: path.read_bytes() for path in sorted(folder.glob("*s/*.jsonl"))}
    assert run(here, *command).code == 0
    assert all(path.read_bytes().startswith(content) for path, content in before.items())
    assert_same(folder, whole)


def test_ctrl_c_keeps_everything(here: World, whole: Path) -> None:
    command = ("eval", "wide", *BOTH, *SHORT, "--out", "stopped")
    outcome = run(here, *command, faults=[{"point": "response", "count": 9, "signal": signal.SIGINT}])
    assert outcome.code == 130
    assert "what was finished is kept in stopped; the same command resumes" in outcome.stderr
    assert len(responses(here.folder / "stopped", "aime25")) == 8
    again = run(here, *command)
    assert again.code == 0
    assert "forkrl: 8 of 16 responses to AIME'25 are in stopped already" in again.stderr.splitlines()
    assert_same(here.folder / "stopped", whole)


def test_a_torn_line_is_dropped(here: World, whole: Path) -> None:
    torn = shutil.copytree(whole, here.folder / "torn")
    for part in ("responses", "scores"):
        path = torn / part / "math500.jsonl"
        path.write_bytes(path.read_bytes()[:-7])
    assert run(here, "eval", "wide", *BOTH, *SHORT, "--out", "torn").code == 0
    assert_same(torn, whole)


def test_a_damaged_line_is_named(here: World, whole: Path) -> None:
    path = shutil.copytree(whole, here.folder / "damaged") / "responses/aime25.jsonl"
    path.write_bytes(b"{torn\n" + path.read_bytes())
    outcome = here.run("eval", "wide", *BOTH, *SHORT, "--out", "damaged")
    assert outcome.code == 2
    assert "damaged/responses/aime25.jsonl line 1 is not JSON" in outcome.stderr.splitlines()[-1]


def test_a_finished_evaluation_samples_nothing_and_judges_nothing(here: World, whole: Path) -> None:
    copy = shutil.copytree(whole, here.folder / "again")
    faults = [
        {"point": point, "count": 7 if point == "token" else 1, "signal": signal.SIGKILL}
        for point in ("token", "response", "result")
    ]
    assert run(here, "eval", "wide", *BOTH, *SHORT, "--out", "again", faults=faults).code == 0
    assert benchmarks(copy) == benchmarks(whole)
    assert timeless(copy) == timeless(whole)


def test_a_damaged_table_is_rewritten_by_the_same_command(here: World, whole: Path) -> None:
    copy = shutil.copytree(whole, here.folder / "rewritten")
    (copy / "tables" / "passes.csv").write_text("")
    outcome = run(here, "eval", "wide", *BOTH, *SHORT, "--out", "rewritten")
    assert outcome.code == 0 and "passes.csv: cannot be read" in outcome.stderr, outcome
    assert timeless(copy) == timeless(whole)


def test_the_page_can_be_written_again(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert write_report(whole).read_text() == page


def test_a_further_benchmark_joins_the_folder(here: World, whole: Path) -> None:
    command = ("eval", "wide", "--mirror", "mirror", *SHORT, "--out", "joined")
    for name in reversed(NAMES):
        assert run(here, *command, "--bench", name).code == 0
    joined, expected = timeless(here.folder / "joined"), timeless(whole)
    assert joined.pop("mean") == [pytest.approx(row) for row in expected.pop("mean")]  # summed in another order
    assert joined == expected
    order = [row["benchmark"] for row in benchmarks(here.folder / "joined")]
    assert run(here, *command, "--bench", order[0]).code == 0
    assert [row["benchmark"] for row in benchmarks(here.folder / "joined")] == order


def test_the_first_problems(here: World) -> None:
    outcome = here.run(
        "eval", "wide", "--mirror", "mirror", *SHORT, "--bench", "aime25", "--problems", "2", "--out", "two"
    )
    assert outcome.code == 0, outcome.stderr
    assert [each["answer"] for each in lines(here.folder / "two", "questions", "aime25")] == ["1", "2"]
    assert "2 of 4" in outcome.stdout


def test_two_evaluations_are_compared(here: World, whole: Path) -> None:
    shutil.copytree(whole, here.folder / "same")
    outcome = here.run("compare", "whole", "same", "--out", "compared")
    assert outcome.code == 0, outcome.stderr
    assert "AIME'25" in outcome.stdout and "p = 1." in outcome.stdout


def test_a_chat_template_is_put_around_the_question(here: World) -> None:
    model = shutil.copytree(here.folder / "wide", here.folder / "chatty")
    (model / "chat_template.jinja").write_text(
        "{{ messages[0]['content'] }} /{% if add_generation_prompt %}*{% endif %}"
    )
    outcome = run(
        here, "eval", "chatty", "--bench", "aime25", "--mirror", "mirror", "--prompt", "chat", *SHORT, "--out", "chat",
        "--problems", "1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    (asked,) = lines(here.folder / "chat", "questions", "aime25")
    assert asked["prompt"].startswith("0 + 1 =\nPlease reason") and asked["prompt"].endswith("\\boxed{}. /*")
    assert read_results(here.folder / "chat").settings["prompt_format"] == "chat"


FLAKY = '''"""Cannot judge while a file lies beside it."""

from pathlib import Path


def judge(answer, response):
    if Path("broken").exists() and response[:1] in "02468":
        raise ValueError("no idea")
    return float(response[:1] in tuple(answer))
'''


def test_what_could_not_be_judged_is_judged_again(own_world: World) -> None:
    (own_world.folder / "flaky.py").write_text(FLAKY)
    command = (
        "eval",
        "model",
        "--recipe",
        "recipe.toml",
        "task.verifier=flaky:judge",
        "--samples",
        "4",
        "--out",
        "out",
    )
    (own_world.folder / "broken").touch()
    outcome = run(own_world, *command)
    assert outcome.code == 0, outcome.stderr
    folder = own_world.folder / "out"
    (figures,) = benchmarks(folder)
    failed = [each for each in lines(folder, "scores", "prompts") if each["failure"]]
    assert failures(figures) == figures["failed_error"] == len(failed) and 0 < len(failed) < 96
    assert f"({len(failed)} by error); the same command judges them again" in outcome.stdout
    (own_world.folder / "broken").unlink()
    never = {"point": "token", "count": 7, "signal": signal.SIGKILL}
    assert run(own_world, *command, faults=[never]).code == 0
    (again,) = benchmarks(folder)
    assert failures(again) == 0 and figures["first_failure"] and not again["first_failure"]
    assert len(lines(folder, "scores", "prompts")) == 96 + len(failed)
    assert again["seconds"] == figures["seconds"]


def answer_one(exchange: Exchange, fields: dict[str, Any]) -> None:
    """A server that thinks everything is 1."""
    exchange.answer(completion(fields, "It is \\boxed{1}.", tokens=7))


@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_a_server_samples(here: World, prompt: str) -> None:
    together = threading.Lock()

    def answer_alone(exchange: Exchange, fields: dict[str, Any]) -> None:
        alone.append(together.acquire(blocking=False))
        time.sleep(0.01)
        together.release()  # before the answer, after which the next one may come
        answer_one(exchange, fields)

    alone: list[bool] = []
    with OpenAIServer(answer_alone) as server:
        outcome = run(
            here, "eval", MODEL, "--bench", "aime25", "--mirror", "mirror", "--server", server.root, "--prompt", prompt,
            "--samples", "2", "--max-tokens", "9", "--concurrency", "1", "--out", f"served-{prompt}",
        )  # fmt: skip
        assert outcome.code == 0, outcome.stderr
        asked = server.asked
    question = f"{AIME25[0]['problem']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    texts = [fields["prompt"] if prompt == "plain" else fields["messages"][0]["content"] for fields in asked]
    assert (f"User:\n{question}\n\nAssistant:\n" if prompt == "plain" else question) in texts
    assert len(asked) == 8 and {fields["max_tokens"] for fields in asked} == {9}
    assert all(alone), "one request at a time"
    (figures,) = benchmarks(here.folder / f"served-{prompt}")
    assert (figures["accuracy"], figures["length"], figures["entropy"]) == (0.25, 7, None)


def test_a_server_that_dies_loses_nothing(here: World) -> None:
    """The first answers are good, then it wants a key; another one resumes."""
    given: list[object] = []

    def tire(exchange: Exchange, fields: dict[str, Any]) -> None:
        given.append(fields)
        if len(given) <= 3:
            answer_one(exchange, fields)
        else:
            exchange.answer({"error": {"message": "who are you?"}}, status=401)

    def go(server: OpenAIServer) -> Outcome:
        return run(
            here, "eval", MODEL, "--bench", "aime25", "--mirror", "mirror", "--server", server.root, "--samples", "2",
            "--max-tokens", "9", "--concurrency", "1", "--out", "dying",
        )  # fmt: skip

    with OpenAIServer(tire) as server:
        outcome = go(server)
    assert outcome.code == 2
    kept = responses(here.folder / "dying", "aime25")
    assert len(kept) == 3
    with OpenAIServer(answer_one) as server:
        assert go(server).code == 0
        assert len(server.asked) == 8 - len(kept)
    assert responses(here.folder / "dying", "aime25")[: len(kept)] == kept


def write_program(exchange: Exchange, fields: dict[str, Any]) -> None:
    """A server whose even seeds are programmers: of whole programs, and of the class that is asked for."""
    prompt = fields["prompt"]
    program = "print(2 * int(input()))"
    if "starter code" in prompt:
        program = "class Solution:\n    def twice(self, n: int) -> int:\n        return 2 * n"
    text = f"```python\n{program if fields['seed'] % 2 else 'import os; os._exit(0)'}\n```"
    exchange.answer(completion(fields, text))


@pytest.mark.skipif(not SANDBOX_WORKS, reason="there is no sandbox here")
def test_programs_are_run(here: World) -> None:
    with OpenAIServer(write_program) as server:
        outcome = run(
            here, "eval", MODEL, "--bench", "livecodebench", "--mirror", "mirror", "--server", server.root,
            "--samples", "4", "--out", "programs", "sandbox.seconds=5",
        )  # fmt: skip
        assert outcome.code == 0, outcome.stderr
        right = [fields["seed"] % 2 for fields in server.asked]
    (figures,) = benchmarks(here.folder / "programs")
    assert (figures["questions"], failures(figures)) == (2, 0)
    assert 0 < figures["accuracy"] < 1
    assert figures["accuracy"] == sum(right) / len(right)


def complete_function(exchange: Exchange, fields: dict[str, Any]) -> None:
    """A server that writes, by the seed: the function, its body, a wrong body, and no code."""
    replies = (
        "```python\ndef twice(n):\n    return n + n\n```", "    return 2 * n\n", "    return n\n", "I don't know.",
    )  # fmt: skip
    exchange.answer(completion(fields, replies[fields["seed"] % 4]))


@pytest.mark.skipif(not SANDBOX_WORKS, reason="there is no sandbox here")
def test_functions_are_completed(here: World) -> None:
    with OpenAIServer(complete_function) as server:
        outcome = run(
            here, "eval", MODEL, "--bench", "humaneval", "--mirror", "mirror", "--server", server.root, "--samples",
            "16", "--out", "functions",
        )  # fmt: skip
        assert outcome.code == 0, outcome.stderr
        seeds = [fields["seed"] % 4 for fields in server.asked]
    assert "humaneval: mirror/openai/openai_humaneval holds 1 of 164 questions; " in outcome.stderr
    (figures,) = benchmarks(here.folder / "functions")
    assert (figures["questions"], figures["expected_questions"], failures(figures)) == (1, 164, 0)
    assert figures["accuracy"] == sum(seed < 2 for seed in seeds) / 16
    answers = [each["answer"] for each in lines(here.folder / "functions", "scores", "humaneval")]
    assert answers.count("") == seeds.count(3)
    assert len(set(seeds)) == 4


def test_questions_of_reasoning_gym(here: World) -> None:
    pytest.importorskip("reasoning_gym")
    outcome = run(here, "eval", "wide", "--bench", "gym:chain_sum", "--problems", "3", *SHORT)
    assert outcome.code == 0, outcome.stderr
    (figures,) = benchmarks(here.folder / "evals/wide")
    assert (figures["benchmark"], figures["questions"], failures(figures)) == ("gym:chain_sum", 3, 0)
    assert figures["revision"].startswith("reasoning-gym ")
    asked = lines(here.folder / "evals/wide", "questions", "gym:chain_sum")
    assert len(asked) == 3 and all("<answer>" in each["prompt"] for each in asked)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--bench", "aime2025", "--mirror", "mirror"), "--bench aime2025: no such benchmark; did you mean aime25?"),
        (("--bench", "aime25"), "add --mirror DIR here: hf download --repo-type dataset --revision 563bb84"),
        (("--bench", "aime25", "--mirror", "nowhere"), "--mirror nowhere holds no folder math-ai/aime25; fill it with"),
        (("--bench", "aime25", "--mirror", "unanswered"), "aime25 row 1: answer is missing, not text or a number"),
        (
            ("--bench", "aime25", "--mirror", "renamed"),
            "has no column 'problem'; it has: question, answer; aime25 reads",
        ),
        (
            ("--bench", "aime25", "--mirror", "mirror", "task.template=x"),
            "task.template=x: has no effect along with --bench",
        ),
        (("--bench", "aime25", "--mirror", "mirror", "--samples", "0"), "--samples 0: must be at least 1"),
        (("--bench", "aime25", "--mirror", "mirror", "--concurrency", "4"), "--concurrency 4: is for --server"),
        (("--bench", "aime25", "--mirror", "mirror", "--prompt", "chat"), "--prompt chat: the tokenizer has no chat"),
        ((*BOTH, *SHORT, "--out", "whole", "seed=4"), "whole: was created with different settings (seed = 0, now 4)"),
        ((*BOTH, *SHORT, "--out", "changed"), "changed/questions/aime25.jsonl: the questions, or their prompts or"),
        ((*BOTH, "sandbox.seconds=3"), "sandbox.seconds=3: has no effect on an evaluation; drop it"),
        ((*BOTH, "rollout.max_prompt_tokens=20"), "aime25 row 1: 97 tokens, over rollout.max_prompt_tokens = 20"),
    ],
)
def test_what_cannot_be_is_refused(here: World, whole: Path, argv: tuple[str, ...], says: str) -> None:
    write_rows(here.folder / "unanswered/math-ai/aime25/test.jsonl", [{"problem": "1 =", "answer": None}])
    write_rows(here.folder / "renamed/math-ai/aime25/test.jsonl", [{"question": "1 =", "answer": "1"}])
    if not (here.folder / "changed").exists():
        asked = shutil.copytree(whole, here.folder / "changed") / "questions/aime25.jsonl"
        asked.write_text(asked.read_text().replace('"answer": "1"', '"answer": "7"'))
    outcome = run(here, "eval", "wide", *argv)
    assert outcome.code == 2, outcome
    assert says in outcome.stderr
    assert not outcome.stdout


def test_the_list(here: World) -> None:
    outcome = here.run("eval", "--list")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "olympiad             674  Hothan/OlympiadBench" in outcome.stdout
    assert "gym:NAME" in outcome.stdout
