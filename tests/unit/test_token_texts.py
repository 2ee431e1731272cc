"""Texts of single tokens: whole characters as they are, parts of one as bytes."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from forkrl.model.token_texts import TokenTexts
from forkrl.report.fork_data import joined_characters


def byte_level(vocabulary: list[str]) -> TokenTexts:
    tokenizer = Tokenizer(BPE({token: place for place, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    return TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_parts_of_a_character_are_bytes_and_everything_else_is_text() -> None:
    texts = byte_level(["Ġæķ", "°", "a", "ï¿½", "æķ°Ċ"])  # 数 is E6 95 B0
    assert [texts[i] for i in range(5)] == [" <0xE6><0x95>", "<0xB0>", "a", "\ufffd", "数\n"]


def test_the_byte_fallback_of_sentencepiece_is_written_alike() -> None:
    tokenizer = Tokenizer(BPE({"<0xE6>": 0, "b": 1}, [], byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [texts[0], texts[1]] == ["<0xE6>", "b"]


@pytest.mark.parametrize(
    ("tokens", "joined"),
    [
        ([" <0xE6><0x95>", "<0xB0>"], [" 数<0xE6><0x95>", "<0xB0>"]),
        (["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"], ["🙂<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]),
        (["<0xC3>", "<0xA9><0xC3>", "<0xA9>"], ["é<0xC3>", "é<0xA9><0xC3>", "<0xA9>"]),
        (["<0xE6>", "b", "<0x95>"], ["<0xE6>", "b", "<0x95>"]),
        (["<0xE6><0x95>"], ["<0xE6><0x95>"]),
        (["\ufffd", "a"], ["\ufffd", "a"]),
    ],
)
def test_a_character_is_put_before_its_first_bytes(tokens: list[str], joined: list[str]) -> None:
    assert joined_characters(tokens) == joined
