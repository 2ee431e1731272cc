"""The checks of a task before training, and how a preview prints what they find."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from forkrl.commands.preview_checks import _problems, check_golds
from forkrl.commands.preview_sampling import _pass_rate
from forkrl.config import RewardConfig, TaskConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.report.preview_text import data_report, kept_report, pass_rates_report, prompts_report
from forkrl.tasks.checks import (
    bin_pass_rates,
    gold_of,
    gold_verifier,
    prompts_with,
    repeated_questions,
    summarise_lengths,
)
from forkrl.tasks.dataset import rows_of_questions
from forkrl.types import Prompt, RolloutGroup, Task, VerifierResult, VerifierSpec
from tests.unit.test_dataset import all_prompts, chat_template, load, rows, write

MATH = VerifierSpec("forkrl.rewards.math:verify_math")
REWARD = RewardConfig(workers=1)


def asked(*questions: str) -> list[Prompt]:
    return [Prompt(str(number), "", "", question=question) for number, question in enumerate(questions)]


def dataset(**settings: Any) -> TaskConfig:
    return TaskConfig(name="dataset", data="data.jsonl", **settings)


def gold_check(config: TaskConfig, *answers: str) -> dict[str, Any]:
    prompts = [
        Prompt(str(n), "Why?\n<think>\n", answer, place=f"line {n}") for n, answer in enumerate(answers, start=1)
    ]
    spec = VerifierSpec(MATH.path, answer_format=config.answer_format or "", prefill=config.assistant_prefill)
    return check_golds({"": config}, Task("data", prompts, [], {"": spec}), REWARD)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({}, ["++"]),
        ({"answer_format": "boxed"}, ["++"]),
        ({"answer_format": "boxed", "assistant_prefill": "So \\boxed{"}, ["++"]),
        ({"answer_format": "last_number"}, ["x^2 + y", "Monday", "++"]),
        ({"answer_format": "Answer: (.+)"}, ["++"]),
        (
            {
                "answer_format": "^A: ([^:]+)$", "few_shot": 1, "few_shot_response": "A: {answer}",
                "assistant_prefill": "A: ",
            },
            ["++"],
        ),
        ({"answer_format": "A: (.+)", "few_shot": 1, "few_shot_response": "A: {answer}"}, ["++"]),
    ],
)  # fmt: skip
def test_golds_are_written_as_the_verifier_reads_them(settings: dict[str, Any], wrong: list[str]) -> None:
    found = gold_check(dataset(**settings), "72", "1,003", "x^2 + y", "Monday", "++")
    assert [each["answer"] for each in found["failed"]] == wrong
    assert found["checked"] == 5 and not found["unchecked"]


def test_a_gold_that_makes_its_verifier_fail_is_explained() -> None:
    found = gold_check(dataset(), "5", "++")
    assert [(each["place"], each["failure"]) for each in found["failed"]] == [("line 2", "error")]
    assert "the gold answer '++' cannot be read as mathematics" in found["error"]


def test_golds_that_cannot_be_written_are_counted() -> None:
    found = check_golds(
        {"": dataset(verifier="code")}, Task("data", [Prompt("1", "", "tests")], [], {"": MATH}), REWARD
    )
    assert (found["checked"], found["unchecked"]) == (0, 1) and found[
        "why_unchecked"
    ] == "answers are tests, not programs"
    gym = TaskConfig(name="reasoning-gym", generator="boxnet")
    assert gold_of(gym, Prompt("1", "", json.dumps({"answer": None}))) is None
    gold = gold_of(gym, Prompt("1", "", json.dumps({"answer": "7"})))
    assert gold is not None and gold.responses == ("<answer>7</answer>",)


def test_golds_are_not_sent_to_a_server() -> None:
    url = "http://127.0.0.1:9/judge"  # nothing listens there
    task = Task(
        "data", asked("a", "b"), [], {"": VerifierSpec("forkrl.rewards.endpoint:verify_at_endpoint", {"url": url})}
    )
    found = check_golds({"": dataset(verifier=url)}, task, REWARD)
    assert (found["checked"], found["unchecked"], found["failed"]) == (0, 2, [])
    assert found["why_unchecked"] == "the verifier is a server, for which requests may be slow or costly"


OWN_VERIFIER = """
def after_hashes(answer, response):
    return float(response.startswith("####"))

def broken(answer, response):
    raise ValueError(response)
"""


def test_a_custom_verifier_may_read_another_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gold accepted: a warning. One accepted, an answer format, or a verifier that only raises: errors."""
    (tmp_path / "own_verifier.py").write_text(OWN_VERIFIER)
    monkeypatch.syspath_prepend(tmp_path)

    def unread(verifier: str, *answers: str, **settings: Any) -> list[str]:
        prompts = [Prompt(str(number), "", answer) for number, answer in enumerate(answers)]
        spec = VerifierSpec(f"own_verifier:{verifier}", answer_format=settings.get("answer_format", ""))
        golds = check_golds({"": dataset(**settings)}, Task("data", prompts, [], {"": spec}), REWARD)
        assert len(_problems({"over": 0}, golds)) == (bool(golds["failed"]) and not golds["unread"])
        found: list[str] = golds["unread"]
        return found

    assert unread("after_hashes", "5", "6") == [""]
    assert unread("after_hashes", "5", "#### 6") == []
    assert unread("after_hashes", "5", "6", answer_format="boxed") == []
    assert unread("broken", "5", "6") == []


def test_the_verifier_of_a_regular_expression_gets_the_answer_itself() -> None:
    config = dataset(answer_format="Answer: (.+)", assistant_prefill="Answer: ")
    spec = gold_verifier(config, VerifierSpec(MATH.path, answer_format="Answer: (.+)", prefill="Answer: "))
    assert spec == VerifierSpec("forkrl.rewards.math:verify_math_answer")
    own = VerifierSpec("mine:judge", {"a": 1})
    assert gold_verifier(dataset(), own) == own


def test_questions_are_compared_without_whitespace() -> None:
    first, second = asked("a  b", "c", "a b\n", "a b"), asked("c ", "d", "a\tb")
    assert [(one.id, other.id) for one, other in repeated_questions(first)] == [("0", "2"), ("0", "3")]
    assert [(one.id, other.id) for one, other in repeated_questions(first, second)] == [("1", "0"), ("0", "2")]
    assert repeated_questions(asked("a", "b")) == []


def test_a_question_is_found_within_another_if_it_is_long_enough() -> None:
    long = "one two three four five six seven eight"
    data = asked(
        f"Solve this. {long} nine", "a b", "so a b c", f"{long.replace('one', 'ONE')}", long.replace(" ", "\n")
    )
    assert [prompt.id for prompt in prompts_with([long, " a  b "], data)] == ["0", "1", "4"]
    assert prompts_with([f"{long} ten"], data) == [] and prompts_with([], data) == []


def test_lengths_and_pass_rates() -> None:
    assert summarise_lengths([3]) == {"min": 3, "median": 3, "95%": 3, "max": 3}
    assert summarise_lengths([*range(1, 101)]) == {"min": 1, "median": 51, "95%": 96, "max": 100}
    assert bin_pass_rates([0, 1, 2, 3, 4, 6, 7, 8, 8], 8) == {
        "0%": 1, "to 25%": 2, "to 50%": 2, "to 75%": 1, "below 100%": 1, "100%": 2,
    }  # fmt: skip
    assert bin_pass_rates([0, 1], 1) == {"0%": 1, "to 25%": 0, "to 50%": 0, "to 75%": 0, "below 100%": 0, "100%": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_rows_of_questions_are_given_back_unchanged(tmp_path: Path, suffix: str) -> None:
    data = [{"prompt": row["prompt"], "answer": {"gold": row["answer"], "more": [1]}} for row in rows(6)]
    path = write(tmp_path / f"data{suffix}", [*data, data[4], {"prompt": "Why?", "answer": {"gold": "", "more": []}}])
    settings: dict[str, Any] = {"answer_column": "answer.gold", "skip_bad_rows": True}
    task = load(path, **settings)
    ids = {prompt.answer: prompt.id for prompt in all_prompts(task)}
    config = TaskConfig(name="dataset", data=str(path), held_out_rows=1, **settings)
    assert list(rows_of_questions(config, {ids["5"], ids["2"], "none"})) == [data[1], data[4]]


def test_questions_and_what_is_left_out_are_told(tmp_path: Path) -> None:
    data, aside = rows(6), [{"prompt": "What is  2 + 1?", "answer": "3"}, {"prompt": "Why?", "answer": "1"}]
    path = write(tmp_path / "data.jsonl", [*data, data[0], data[1]])
    task = load(
        path, held_out_data=str(write(tmp_path / "test.jsonl", aside)), template="Q: {prompt}", held_out_rows=256
    )
    assert task.left_out == {"duplicates": 2, "held_out": 1}
    assert [prompt.question for prompt in task.train] == [data[n]["prompt"] for n in (0, 1, 3, 4, 5)]
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    chat = write(tmp_path / "chat.jsonl", [{"prompt": turns, "answer": "1"}, *data[:1]])
    asked = {prompt.question for prompt in all_prompts(load(chat, chat=chat_template, chat_template=True))}
    assert asked == {"user\nassistant\nuser", "What is 0 + 1?"}


HOSTILE = "\x1b[2J[bold]x\u202e"


def record(**changes: Any) -> dict[str, Any]:
    response = {
        "text": HOSTILE, "token_ids": [5, 6], "tokens": [HOSTILE, "\n"], "entropy": [2.0, 0.0], "finished": False,
        "score": 0.0, "failure": "", "answer": HOSTILE,
    }  # fmt: skip
    prompt = {
        "id": "1", "place": HOSTILE, "text": f"{HOSTILE}\nWhy?", "token_ids": [1], "tokens": [HOSTILE],
        "answer": HOSTILE, "responses": [response, response | {"score": 1.0, "finished": True}, response],
    }  # fmt: skip
    return {"prompts": [prompt], "sampling": {"engine": "vllm", "temperature": 1.0, "max_response_tokens": 2}} | changes


def test_model_text_is_escaped_and_not_markup() -> None:
    text = prompts_report(record(), token_ids=True)
    assert "\x1b" not in text.plain and "\u202e" not in text.plain and "[bold]x" in text.plain
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="truecolor", markup=False).print(text, soft_wrap=True)
    assert "\x1b[2J" not in stream.getvalue() and "48;2;" in stream.getvalue()  # colours of the entropies


def test_a_right_and_a_wrong_response_are_shown() -> None:
    plain = prompts_report(record(), token_ids=False).plain
    assert "response 2: score 1" in plain and "response 1: score 0" in plain and "response 3" not in plain
    assert "cut off at rollout.max_response_tokens, mean entropy 1.00 nats" in plain
    assert "pass rate: 1 of 3 responses" in plain and "token ids" not in plain
    assert "Responses are sampled as in training: with vLLM, temperature 1, at most 2 tokens." in plain


def test_data_without_faults_is_short() -> None:
    clean: dict[str, Any] = {
        "recipe": "a.toml", "task": "data", "training": 5, "held_out": 2, "examples": 0,
        "duplicates": {"dropped": 0, "kept": 0, "first": []}, "overlap": {"dropped": 0, "kept": 0, "first": []},
        "benchmarks": {"compared": {}, "missing": ["aime24"]},
        "prompt_tokens": {
            "lengths": {"min": 1, "median": 2, "95%": 3, "max": 4}, "limit": 9, "over": 0, "first_over": [],
        },
        "golds": {"checked": 7, "unchecked": 0, "why_unchecked": "", "unread": [], "error": "", "failed": []},
    }  # fmt: skip
    assert data_report(clean).plain.splitlines() == [
        "a.toml: data",
        "5 training and 2 held-out questions",
        "",
        "  prompt tokens min 1, median 2, 95% 3, max 4; all within rollout.max_prompt_tokens = 9",
        "  gold answers  7 of 7 get full reward from their verifier",
        "  duplicates    none",
        "  overlap       none",
        "  benchmarks    not compared",
        "                  no local copy of aime24: give --mirror DIR",
    ]
    warned = data_report(clean | {"golds": clean["golds"] | {"unread": ["a"]}}).plain
    assert "  warning: a: no common form of writing an answer is accepted by this verifier; " in warned


def test_equal_scores_give_no_gradient() -> None:
    def group(*scores: float) -> dict[str, Any]:
        return _pass_rate(RolloutGroup(Prompt("1", "", ""), (), tuple(VerifierResult(score) for score in scores)))

    prompts = [group(0.0, 0.5), group(0.5, 0.5), group(1.0, 1.0), group(0.0, 1.0)]
    rates = {"folder": "x", "samples": 2, "bins": bin_pass_rates([0, 0, 2, 1], 2), "failures": 0, "prompts": prompts}
    assert "mean 0.375; 2 prompts have responses of equal" in pass_rates_report({"pass_rates": rates}).plain
    single = rates | {"samples": 1, "prompts": [group(1.0)]}
    assert "gradient" not in pass_rates_report({"pass_rates": single}).plain


def test_the_command_to_train_can_be_copied(tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.toml"
    recipe.write_text('[task]\nname = "dataset"\ndata = "owner/name"\nsubset = "main"\n')
    given = ["task.data=mine.jsonl", "task.subset=", "task.split=test", "task.prompt_column=the question", "seed=4"]
    file = "previews/my recipe/kept.jsonl"
    kept: dict[str, Any] = {
        "interval": [0, 1], "questions": 2, "rows": 3, "file": file, "overrides": [f"task.data={file}", "task.split="],
    }  # fmt: skip
    printed = kept_report({"recipe": str(recipe), "overrides": given, "pass_rates": {"kept": kept}}).plain
    program, command, path, *overrides = shlex.split(printed.partition("train on them: ")[2])
    assert (program, command) == ("forkrl", "train")
    assert overrides == ["task.subset=", *given[3:], *kept["overrides"]]
    config = load_recipe(TrainConfig, path, overrides)
    assert (config.task.data, config.task.subset, config.task.split) == (file, None, "train")
    assert (config.task.prompt_column, config.seed) == ("the question", 4)
