"""From a prompt to ids: BOS once, and no character replaced or dropped without a word."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forkrl.cluster.data import read_prompt, write_prompts
from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.model.prompt_tokens import PromptCheck, prompt_token_ids, unknown_characters
from forkrl.tasks import check_prompts, open_task
from forkrl.training.sft import build_character_tokenizer
from forkrl.types import Prompt
from tests.models import with_bos

CHARACTERS = build_character_tokenizer("0123456789 +:?")
BOS = with_bos(CHARACTERS)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: the unknown token is declared, is EOS as well, and never comes of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<|endoftext|>", eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="b")


def dropping() -> PreTrainedTokenizerFast:
    """BPE without an unknown token and without bytes drops what it does not know."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])), eos_token="b")


def undeclared() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "one": 1, "two": 2}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="two")


@pytest.mark.parametrize(
    ("text", "templated", "ids"),
    [
        ("12", False, (0, 4, 5)),
        ("12", True, (4, 5)),
        ("<pad>12", False, (0, 4, 5)),
        ("<pad>12", True, (0, 4, 5)),
        ("<pad><pad>12", False, (0, 0, 4, 5)),
        ("<pad>", False, (0,)),
    ],
)
def test_bos_comes_once(text: str, templated: bool, ids: tuple[int, ...]) -> None:
    assert prompt_token_ids(BOS, Prompt("q", text, "", templated=templated)) == ids


def test_a_tokenizer_that_adds_no_bos_keeps_the_text_as_it_is() -> None:
    assert prompt_token_ids(CHARACTERS, Prompt("q", "<pad><pad>1", "")) == (0, 0, 4)


def test_a_second_bos_is_noticed_once(capsys: pytest.CaptureFixture[str]) -> None:
    check = PromptCheck(BOS)
    check(Prompt("a", "12", ""), allow_unknown=False)
    check(Prompt("a", "<pad>12", "", templated=True), allow_unknown=False)
    assert capsys.readouterr().err == ""
    for _ in range(3):
        check(Prompt("a", "<pad>12", ""), allow_unknown=False)
    assert capsys.readouterr().err == (
        "forkrl: prompts already start with '<pad>', which the tokenizer adds as well; it is added once\n"
    )


@pytest.mark.parametrize(
    ("tokenizer", "text", "unknown"),
    [
        (CHARACTERS, "What is 3+5?\n", ["W", "h", "a", "t", "i", "s", "\n"]),
        (CHARACTERS, "1 <unk> <pad> 2", []),
        (byte_level(), "héllo <|endoftext|> 漢字\u200b\n", []),
        (unigram(), "abxyab z", ["xy", "z"]),
        (dropping(), "abxa\nyx", ["x", "y"]),
        (undeclared(), "one <pad> three two", ["three"]),
    ],
    ids=["characters", "spelt out", "bytes", "unigram", "dropping", "undeclared"],
)
def test_what_a_tokenizer_does_not_know_is_found(tokenizer: Any, text: str, unknown: list[str]) -> None:
    assert unknown_characters(tokenizer, text) == unknown


def test_unknown_characters_are_rejected_with_their_row_unless_allowed() -> None:
    prompts = [Prompt(str(row), f"{row} é?", "", f"a.jsonl line {row}") for row in range(1, 13)]
    with pytest.raises(UserError) as caught:
        check_prompts(prompts, PromptCheck(CHARACTERS), allow_unknown=False)
    said = str(caught.value).splitlines()
    assert said[0].startswith("prompts: 12 of 12 rows cannot be used")
    assert said[1].startswith("  a.jsonl line 1: the tokenizer does not know 'é' and would replace or drop them; ")
    assert "task.allow_unknown_tokens = true" in said[1]
    assert len(said) == 12 and said[-1] == "  and 2 more"
    check_prompts(prompts, PromptCheck(CHARACTERS), allow_unknown=True)


def test_rows_that_the_model_cannot_read_are_bad_rows(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["1+1?", "1+2?", "what?", "1+3?", "1+1+1+1+1+1?"]
    path.write_text("".join(f'{{"prompt": "{text}", "answer": "1"}}\n' for text in texts))
    settings: dict[str, Any] = {"name": "dataset", "data": str(path), "held_out_rows": 1}
    with pytest.raises(UserError, match="2 of 5 rows cannot be used") as caught:
        open_task(TaskConfig(**settings), CHARACTERS, max_prompt_tokens=8)
    assert "a.jsonl line 3: the tokenizer does not know 'w', 'h', 'a', 't'" in str(caught.value)
    assert "a.jsonl line 5: 12 tokens, over rollout.max_prompt_tokens = 8" in str(caught.value)
    task = open_task(TaskConfig(**settings, skip_bad_rows=True), CHARACTERS, max_prompt_tokens=8)
    assert len(task.train) + len(task.held_out) == 3
    assert "left out 2 of 5 rows" in capsys.readouterr().err
    task = open_task(TaskConfig(**settings, allow_unknown_tokens=True), CHARACTERS)
    assert len(task.train) + len(task.held_out) == 5


def test_a_task_of_problems_that_the_tokenizer_cannot_spell_is_rejected() -> None:
    with pytest.raises(UserError, match="the tokenizer does not know ':', '\\?'"):
        open_task(TaskConfig(name="countdown"), build_character_tokenizer("0123456789 "))


def test_parts_of_a_mix_and_rows_for_verl_keep_what_their_template_says(tmp_path: Any) -> None:
    for name, sign in (("plain", "+"), ("chat", ":")):
        lines = [f'{{"prompt": "{number}{sign}1?", "answer": "1"}}\n' for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = with_bos(CHARACTERS)
    tokenizer.chat_template = "<pad>{% for message in messages %}{{ message['content'] }}{% endfor %}"
    parts = [
        {"name": "dataset", "data": str(tmp_path / f"{name}.jsonl"), "held_out_rows": 1, "chat_template": chat}
        for name, chat in (("plain", False), ("chat", True))
    ]
    task = open_task(TaskConfig(name="mix", parts=parts), tokenizer)  # type: ignore[arg-type]
    prompts = [*task.train, *task.held_out]
    assert {prompt.templated for prompt in prompts} == {True, False}
    write_prompts(tmp_path / "train.parquet", prompts, "mix")
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    for prompt, row in zip(prompts, rows, strict=True):
        ids = prompt_token_ids(tokenizer, prompt)
        assert ids[0] == 0 and 0 not in ids[1:]
        assert prompt_token_ids(tokenizer, read_prompt(row | {"raw_prompt": row["prompt"]})) == ids
