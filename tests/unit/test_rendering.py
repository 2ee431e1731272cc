"""Prompts exactly as the model reads them: system message, examples, variables of the chat template, prefill."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import forkrl.tasks.gym
from forkrl.config import TaskConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.evaluation.questions import task_questions
from forkrl.tasks import open_evaluation_task, open_task
from forkrl.tasks.gym_questions import questions
from forkrl.tasks.rendering import choose_examples
from forkrl.training.sft import build_character_tokenizer
from forkrl.types import Example, Task, VerifierSpec

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'user' or message.role == 'assistant' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}[{{ message.content }}]{% endfor %}"
)
IGNORES_SYSTEM = "{% for message in messages if message.role != 'system' %}[{{ message.content }}]{% endfor %}"
HEADER = (  # always there, as in Llama 3
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}<s>today {{ s }}</s>"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}+1", "answer": str(n + 1)} for n in range(count)]


def opened(tmp_path: Path, chat: str | None, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Task:
    tokenizer = build_character_tokenizer("0123456789+")
    tokenizer.chat_template = chat
    given: dict[str, Any] = {
        "chat_template": chat is not None,
        "held_out_rows": 1,
        "allow_unknown_tokens": True,
    } | settings
    config = TaskConfig(name="dataset", data=write(tmp_path / "sums.jsonl", rows or sums(2)), **given)
    return open_task(config, tokenizer)


def turns(*contents: str) -> str:
    """A conversation in ChatML, its roles first in each content."""
    return "".join(f"<|im_start|>{each.replace(':', chr(10), 1)}<|im_end|>\n" for each in contents)


ASSISTANT = "<|im_start|>assistant\n"
PROMPTS = [
    (SMOLLM2, {}, turns("system:You are helpful", "user:1+1") + ASSISTANT),
    (SMOLLM2, {"system_prompt": "Be brief."}, turns("system:Be brief.", "user:1+1") + ASSISTANT),
    (SMOLLM2, {"system_prompt": ""}, turns("user:1+1") + ASSISTANT),
    (SMOLLM2, {"assistant_prefill": "It is "}, turns("system:You are helpful", "user:1+1") + ASSISTANT + "It is "),
    (QWEN3, {}, turns("user:1+1") + ASSISTANT),
    (QWEN3, {"system_prompt": ""}, turns("user:1+1") + ASSISTANT),
    (QWEN3, {"system_prompt": "Think."}, turns("system:Think.", "user:1+1") + ASSISTANT),
    (QWEN3, {"chat_template_kwargs": {"enable_thinking": True}}, turns("user:1+1") + ASSISTANT),
    (QWEN3, {"chat_template_kwargs": {"enable_thinking": False}, "assistant_prefill": "So"},
     turns("user:1+1") + ASSISTANT + "<think>\n\n</think>\n\nSo"),
    (NO_SYSTEM, {}, "[1+1]"),
    (IGNORES_SYSTEM, {"system_prompt": ""}, "[1+1]"),
    (None, {"template": "Q: {prompt}\nA:", "assistant_prefill": " \\boxed{"}, "Q: 1+1\nA: \\boxed{"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "settings", "text"), PROMPTS)
def test_a_prompt_is_rendered_exactly(
    tmp_path: Path, template: str | None, settings: dict[str, Any], text: str
) -> None:
    task = opened(tmp_path, template, **settings)
    assert {prompt.text for prompt in (*task.train, *task.held_out)} == {text, text.replace("1+1", "0+1")}
    assert task.verifiers[""].prefill == settings.get("assistant_prefill", "")


MESSAGES = [
    {"prompt": [{"role": "system", "content": "Own."}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"}, {"role": "user", "content": f"{n}+1"}], "answer": str(n + 1)}
    for n in range(2)
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "system"),
    [({}, ["system:Own."]), ({"system_prompt": "New."}, ["system:New."]), ({"system_prompt": ""}, [])],
)
def test_the_system_prompt_replaces_that_of_a_row(tmp_path: Path, settings: dict[str, Any], system: list[str]) -> None:
    task = opened(tmp_path, SMOLLM2, MESSAGES, **settings)
    texts = {prompt.text for prompt in (*task.train, *task.held_out)}
    assert texts == {turns(*system, "user:a", "assistant:b", f"user:{n}+1") + ASSISTANT for n in range(2)}


def shown(task: Task, pattern: str) -> list[list[tuple[str, str]]]:
    """The examples in every prompt as (question, response), held-out prompts last."""
    return [re.findall(pattern, prompt.text) for prompt in (*task.train, *task.held_out)]


TURN = r"user\n(\d\+1)<\|im_end\|>\n<\|im_start\|>assistant\n(.+)<\|im_end\|>"


def test_examples_come_from_training_questions_and_leave_them(tmp_path: Path) -> None:
    zero = opened(tmp_path, SMOLLM2, sums(9), held_out_rows=3)
    task = opened(tmp_path, SMOLLM2, sums(9), held_out_rows=3, few_shot=2)
    [examples] = {tuple(each) for each in shown(task, TURN)}
    assert len(examples) == 2 and all(int(question[0]) + 1 == int(answer) for question, answer in examples)
    aside = {prompt.id for prompt in zero.held_out}
    assert {prompt.id for prompt in task.held_out} == aside
    left_out = {prompt.answer for prompt in zero.train} - {prompt.answer for prompt in task.train}
    assert left_out == {answer for _, answer in examples} and len(task.train) == 4
    first = turns("system:You are helpful", *(f"{role}:{text}" for pair in examples
                  for role, text in zip(("user", "assistant"), pair, strict=True)))  # fmt: skip
    assert task.train[0].text == first + turns(f"user:{int(task.train[0].answer) - 1}+1") + ASSISTANT
    reordered = opened(tmp_path, SMOLLM2, sums(9)[::-1], held_out_rows=3, few_shot=2)
    assert {tuple(each) for each in shown(reordered, TURN)} == {examples}
    others = {tuple(shown(opened(tmp_path, SMOLLM2, sums(9), few_shot=2, question_seed=n), TURN)[0]) for n in range(5)}
    assert len(others) > 1


RESPONSES = [
    ({}, "2"),
    ({"answer_format": "boxed"}, "\\boxed{2}"),
    ({"answer_format": "answer_tag"}, "<answer>2</answer>"),
    ({"answer_format": "answer_tag", "assistant_prefill": "<answer>"}, "<answer>2</answer>"),
    ({"answer_format": "last_number", "assistant_prefill": "It is "}, "It is 2"),
    ({"answer_format": "is (.*)", "few_shot_response": "{answer} is {answer}"}, "2 is 2"),
    ({"answer_format": "boxed", "assistant_prefill": "It is \\boxed{"}, "It is \\boxed{2}"),
    ({"answer_format": "boxed", "assistant_prefill": "Sure: "}, "Sure: \\boxed{2}"),
    ({"answer_format": "answer_tag", "assistant_prefill": "Sure: <answer>"}, "Sure: <answer>2</answer>"),
]


@pytest.mark.parametrize(("settings", "response"), RESPONSES)
def test_an_example_answers_in_the_format(tmp_path: Path, settings: dict[str, Any], response: str) -> None:
    rows = [{"prompt": text, "answer": "2"} for text in ("1+1", "2+0", "0+2")]
    [prompt] = opened(tmp_path, SMOLLM2, rows, few_shot=1, **settings).train
    [found] = re.findall(r"assistant\n(.*)<\|im_end\|>", prompt.text)
    assert found == response


@pytest.mark.parametrize(
    ("gold", "settings"),
    [
        ("2", {"answer_format": "Answer: (.+)", "few_shot_response": "Result: {answer}"}),
        ("2", {"answer_format": "boxed", "few_shot_response": "{answer}"}),
        ("2", {"answer_format": "last_number", "few_shot_response": "{answer}, so {answer}0"}),
        ("2 3", {"answer_format": r"so (\d)", "few_shot_response": "so {answer}."}),
        ("yes", {"answer_format": "last_number"}),
        ("1}", {"answer_format": "boxed"}),
        ("2", {"name": "reasoning-gym", "few_shot_response": "It is {answer}"}),
    ],
)
def test_an_example_that_its_format_does_not_read_is_one_sentence(gold: str, settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"name": "dataset", "data": "a.jsonl", "generator": "", "few_shot": 1} | settings
    if given["name"] == "reasoning-gym":
        given |= {"data": "", "generator": "chain_sum"}
    with pytest.raises(
        UserError, match="^task.few_shot_response = .* does not find the gold answer '.*' in the"
    ) as told:
        choose_examples(TaskConfig(**given), {id: Example("?", gold) for id in "ab"})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("gold", "settings"),
    [
        ("3 + 4 = 7\n#### 7", {"answer_format": "#### (.+)", "few_shot_response": "{answer}"}),
        ("3 + 4 = 7\n#### 7", {"answer_format": "last_number"}),
        ("$1,234", {"answer_format": "last_number"}),
        (" 7 ", {"answer_format": "boxed"}),
        ("7", {}),
    ],
)
def test_a_gold_answer_may_be_written_in_another_way_or_be_a_solution(gold: str, settings: dict[str, Any]) -> None:
    config = TaskConfig(name="dataset", data="a.jsonl", few_shot=1, **settings)
    assert len(choose_examples(config, {id: Example("?", gold) for id in "ab"})) == 1


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"template": "Q: {prompt}"}, r"Q: \d\+1\n\d\n\nQ: \d\+1"),
        ({"template": "Q: {prompt}\nA: "}, r"Q: \d\+1\nA: \d\n\nQ: \d\+1\nA: "),
        ({"assistant_prefill": " = "}, r"\d\+1 = \d\n\n\d\+1 = "),
    ],
)
def test_examples_without_a_chat_template(tmp_path: Path, settings: dict[str, Any], pattern: str) -> None:
    task = opened(tmp_path, None, sums(4), few_shot=1, **settings)
    assert all(re.fullmatch(pattern, prompt.text) for prompt in (*task.train, *task.held_out))


def test_an_evaluation_shows_training_questions_or_leaves_out_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"name": "dataset", "few_shot": 2, "data": write(tmp_path / "a.jsonl", sums(6))}
    apart = given | {"held_out_data": write(tmp_path / "b.jsonl", sums(9)[4:])}
    task = open_evaluation_task(TaskConfig(**apart), None)
    assert len(task.held_out) == 5
    trained = open_task(TaskConfig(**apart), None)
    assert [prompt.text for prompt in trained.held_out] == [prompt.text for prompt in task.held_out]
    assert all(set(re.findall(r"(\d)\+1\n", prompt.text)) <= set("0123") for prompt in task.held_out)
    task = open_evaluation_task(TaskConfig(**given), None)
    assert len(task.held_out) == 4
    assert "2 questions of" in capsys.readouterr().err
    examples = re.findall(r"(\d\+1)\n", task.held_out[0].text)
    assert not any(prompt.text.endswith(tuple(examples)) for prompt in task.held_out)


def test_prompts_too_long_with_their_examples_are_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": text, "answer": "2"} for text in ("1+1", "2+0", "0+2", "000000000001+1")]
    tokenizer = build_character_tokenizer("0123456789+\n")
    config = TaskConfig(name="dataset", data=write(tmp_path / "a.jsonl", rows), held_out_rows=1, few_shot=1)
    for seed in range(9):  # until the long one is not the example
        config = config.model_copy(update={"question_seed": seed})
        task = open_task(config, tokenizer, max_prompt_tokens=99)
        if max(len(prompt.text) for prompt in task.train) > 15 > max(len(prompt.text) for prompt in task.held_out):
            break
    with pytest.raises(UserError, match="a.jsonl line 4: .* tokens, over rollout.max_prompt_tokens = 15"):
        open_task(config, tokenizer, max_prompt_tokens=15)
    skipping = config.model_copy(update={"skip_bad_rows": True})
    assert len(open_task(skipping, tokenizer, max_prompt_tokens=15).train) == 1
    assert "left out 1 of " in capsys.readouterr().err


def gym(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Task:
    monkeypatch.setattr(forkrl.tasks.gym, "_questions", lambda request: questions(**request))
    given: dict[str, Any] = {
        "name": "reasoning-gym",
        "generator": "chain_sum",
        "held_out_rows": 3,
        "train_prompts": 4,
    } | settings
    return open_task(TaskConfig(**given), None)


@pytest.mark.parametrize(
    ("answer_format", "ending", "response"),
    [
        (None, "alone between <answer> and </answer>.", r"<answer>-?\d+</answer>"),
        ("boxed", r"alone within \boxed{}.", r"\\boxed\{-?\d+\}"),
        ("last_number", "as the last number.", r"-?\d+"),
    ],
)
def test_gym_asks_and_shows_in_the_format(
    monkeypatch: pytest.MonkeyPatch, answer_format: str | None, ending: str, response: str
) -> None:
    zero = gym(monkeypatch, answer_format=answer_format)
    task = gym(monkeypatch, answer_format=answer_format, few_shot=2)
    assert [prompt.id for prompt in task.held_out] == [prompt.id for prompt in zero.held_out]
    assert all(prompt.text.endswith(ending) for prompt in (*task.train, *zero.train))
    assert len(task.train) == 4
    assert all(len(re.findall(rf"\n{response}\n\n", prompt.text)) == 2 for prompt in (*task.train, *task.held_out))
    asked = {prompt.text.rpartition("\n\n")[2].partition("\n")[0] for prompt in task.train}
    assert not any(text in prompt.text.rpartition("\n\n")[0] for text in asked for prompt in task.train)
    assert task.verifiers[""] == VerifierSpec("forkrl.rewards.gym:verify_gym", answer_format=answer_format or "")


def test_gym_asks_nothing_for_a_regular_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    task = gym(monkeypatch, answer_format="= (.*)")
    assert not any("step by step" in prompt.text for prompt in task.train)
    task = gym(monkeypatch, answer_format="= (.*)", instruction="Go.")
    assert all(prompt.text.endswith("\nGo.") for prompt in task.train)


REFUSED = [
    (NO_SYSTEM, {"system_prompt": "x"}, "task.system_prompt = 'x': the tokenizer's chat template rejects a system "
     "message (System role not supported); remove it, or write it into task.template"),
    (NO_SYSTEM, {"system_prompt": ""}, "task.system_prompt = '': the tokenizer's chat template rejects a system"),
    (IGNORES_SYSTEM, {"system_prompt": "x"}, "task.system_prompt = 'x' is left out by the tokenizer's chat template"),
    (HEADER, {"system_prompt": ""}, "always writes a system turn, which cannot be left out; remove the setting, or"),
    (QWEN3, {"chat_template_kwargs": {"enable_thnking": False}}, "task.chat_template_kwargs.enable_thnking has no "
     "effect: the tokenizer's chat template does not read it; correct the name or remove it"),
    (SMOLLM2, {"few_shot": 1}, "task.few_shot = 1 takes all of the 1 training questions"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "settings", "message"), REFUSED)
def test_what_a_template_cannot_do_is_one_sentence(
    tmp_path: Path, template: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        opened(tmp_path, template, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


DATA = ["task.name=dataset", "task.data=x.jsonl"]
CHAT = [*DATA, "task.chat_template=true"]
MISTAKES = [
    ([*DATA, "task.system_prompt=x"], "task.system_prompt has no effect without task.chat_template = true"),
    ([*DATA, "task.system_prompt=''"], "task.system_prompt has no effect without task.chat_template = true"),
    ([*DATA, "task.chat_template_kwargs.a=1"], "task.chat_template_kwargs has no effect without"),
    ([*CHAT, "task.chat_template_kwargs.tokenize=true"], "task.chat_template_kwargs.tokenize is not a variable of"),
    ([*CHAT, "task.chat_template_kwargs={d=2026-01-01}"], "task.chat_template_kwargs.d = datetime.date(2026, 1, 1) is"),
    ([*DATA, "task.few_shot_response={answer}"], "task.few_shot_response has no effect without task.few_shot"),
    ([*DATA, "task.question_seed=1"], "task.question_seed has no effect on a data set without task.few_shot"),
    ([*DATA, "task.few_shot=1", "task.few_shot_response=x"], "task.few_shot_response has no {answer}"),
    ([*DATA, "task.few_shot=1", "task.answer_format=(.*)"], "with a regular expression as task.answer_format needs"),
    ([*DATA, "task.few_shot=1", "task.verifier=code"], "but those of task.verifier = \"code\" are tests; set it to 0"),
    ([*DATA, "task.few_shot=1", "task.verifier=none"], "but those of task.verifier = \"none\" are not read"),
    ([*DATA, "task.answer_format=boxed", "task.verifier=none"], "task.answer_format is for a verifier, but"),
    (["task.answer_format=boxed"], 'task.answer_format is for task.name = "dataset" or "reasoning-gym", but task.name '
     '= "countdown"'),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_settings_that_do_not_go_together_are_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(TrainConfig, None, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_system_prompt_can_be_told_from_none_given() -> None:
    assert load_recipe(TrainConfig, None, [*CHAT, 'task.system_prompt=""']).task.system_prompt == ""
    assert load_recipe(TrainConfig, None, [*CHAT, "task.system_prompt="]).task.system_prompt is None


def test_a_server_gets_one_message_and_refuses_more(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sums(3))
    config = TaskConfig(name="dataset", data=data, chat_template=True, system_prompt="x")
    with pytest.raises(UserError, match=r"task.system_prompt = 'x' has no place in the one user message"):
        task_questions(config, None, None, whole=True)
    plain = TaskConfig(name="dataset", data=data, assistant_prefill="So")
    [asked] = task_questions(plain, None, None, whole=True)
    assert [prompt.text for prompt in asked.prompts] == ["0+1So", "1+1So", "2+1So"]


def test_an_example_of_one_part_is_not_held_out_by_another(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sums(9))
    parts: Any = [
        {"name": "dataset", "data": data, "source": "a", "held_out_rows": 1, "few_shot": 4},
        {"name": "dataset", "data": data, "source": "b", "held_out_rows": 8},
    ]
    with pytest.raises(UserError, match="task.parts: a shows [34] questions as few-shot examples that another part"):
        open_task(TaskConfig(name="mix", parts=parts), None)
