"""The prompt of a message that a person writes is the prompt of the same question in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from forkrl.config import TaskConfig
from forkrl.tasks import open_task
from forkrl.tasks.conversation import Conversation
from forkrl.training.sft import build_character_tokenizer
from tests.unit.test_rendering import ASSISTANT, QWEN3, SMOLLM2, turns


def tokenizer_with(chat: str | None) -> PreTrainedTokenizerFast:
    tokenizer = build_character_tokenizer("0123456789+")
    tokenizer.chat_template = chat
    return tokenizer


TASKS: list[tuple[str | None, dict[str, Any]]] = [
    (None, {"name": "countdown"}),
    (None, {"template": "Q: {prompt}\nA:", "assistant_prefill": " So"}),
    (None, {"few_shot": 2, "template": "{prompt}="}),
    (QWEN3, {"chat_template": True, "system_prompt": "Think.", "template": "Solve {prompt}."}),
    (QWEN3, {"chat_template": True, "chat_template_kwargs": {"enable_thinking": False}, "assistant_prefill": "So"}),
    (SMOLLM2, {"chat_template": True, "few_shot": 2, "system_prompt": ""}),
    (None, {"name": "reasoning-gym", "generator": "chain_sum", "train_prompts": 3}),
    (SMOLLM2, {"name": "reasoning-gym", "generator": "chain_sum", "train_prompts": 3, "chat_template": True}),
]


@pytest.mark.parametrize(("template", "settings"), TASKS)
def test_a_first_message_is_a_prompt_of_training(
    tmp_path: Path, template: str | None, settings: dict[str, Any]
) -> None:
    if settings.get("name") == "reasoning-gym":
        pytest.importorskip("reasoning_gym")
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(6)))
    if settings.get("name") is None:
        settings = {"name": "dataset", "data": str(data), "held_out_rows": 1} | settings
    config, tokenizer = TaskConfig(allow_unknown_tokens=True, **settings), tokenizer_with(template)
    train = open_task(config, tokenizer).train[:3]
    conversation = Conversation(config, tokenizer)
    for prompt in train:
        made = conversation.prompt(prompt.question)
        assert (made.text, made.templated) == (prompt.text, prompt.templated)


def test_with_a_chat_template_it_remembers_the_turns() -> None:
    config = TaskConfig(
        name="dataset", data="x", verifier="none", chat_template=True, template="{prompt}!", assistant_prefill="So "
    )
    conversation = Conversation(config, tokenizer_with(QWEN3))
    conversation.add("1+1", "2")
    assert conversation.prompt("2+2").text == turns("user:1+1!", "assistant:So 2", "user:2+2!") + ASSISTANT + "So "
    conversation.reset()
    assert conversation.prompt("2+2").text == turns("user:2+2!") + ASSISTANT + "So "


def test_without_one_each_message_stands_alone() -> None:
    conversation = Conversation(TaskConfig(name="dataset", data="x", verifier="none"), tokenizer_with(None))
    conversation.add("1+1", "2")
    assert conversation.prompt("2+2").text == "2+2"
