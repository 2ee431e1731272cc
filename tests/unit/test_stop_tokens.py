"""What ends a response, and what a verifier reads of it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import GenerationConfig

from forkrl.config import ModelConfig, RewardConfig
from forkrl.model.policy import open_policy
from forkrl.model.stop_tokens import load_generation_config, response_text, stop_token_ids
from forkrl.parallel.workers import Workers
from forkrl.rewards import open_verifier
from forkrl.rewards.reply import strip_turn_end
from forkrl.rollout import EmbeddedEngine
from forkrl.training.sft import build_character_tokenizer
from forkrl.types import Prompt, SamplingParams, VerifierSpec
from tests.models import ALPHABET, random_policy


def test_the_stop_set_is_that_of_tokenizer_model_and_recipe() -> None:
    tokenizer = build_character_tokenizer(ALPHABET)
    [seven, space] = tokenizer.encode("7 ")
    generation = GenerationConfig(eos_token_id=[seven, tokenizer.eos_token_id])
    assert stop_token_ids(tokenizer, generation, [" "]) == (tokenizer.eos_token_id, seven, space)
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=seven)) == (tokenizer.eos_token_id, seven)
    assert stop_token_ids(tokenizer, None) == (tokenizer.eos_token_id,)


def test_the_local_engine_stops_where_the_models_generation_config_says_so(tmp_path: Path) -> None:
    policy = random_policy()
    [seven] = policy.tokenizer.encode("7")
    policy.model.generation_config.eos_token_id = [1, seven]
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    assert load_generation_config(str(tmp_path)).eos_token_id == [1, seven]
    opened = open_policy(ModelConfig(path=str(tmp_path)), "cpu")
    engine = EmbeddedEngine(Workers(opened), max_prompt_tokens=8)
    [group] = engine.generate(
        [Prompt("a", "12", "")],
        group_size=32,
        sampling=SamplingParams(40),
        generator=torch.Generator().manual_seed(0),
    )
    ended = [rollout for rollout in group.rollouts if rollout.response_ids[-1] == seven]
    assert ended and all(rollout.finished and "7" not in rollout.text for rollout in ended)
    assert all(seven not in rollout.response_ids[:-1] for rollout in group.rollouts)


def test_special_tokens_are_no_text_but_tags_in_pairs_and_unknown_ones_are() -> None:
    tokenizer: Any = build_character_tokenizer(ALPHABET)
    names = ["<think>", "</think>", "<|im_end|>", "<s>", "</s>"]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.bos_token = "<s>"
    tokenizer.eos_token = "</s>"
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    one, seven = tokenizer.encode("17")
    unknown = tokenizer.unk_token_id

    def text(*tokens: int, finished: bool = False) -> str:
        return response_text(tokenizer, tokens, finished=finished)

    assert text(one, seven, ids["</s>"], finished=True) == "17"
    assert text(one, seven, ids["<|im_end|>"], ids["<|im_end|>"]) == "17"
    assert text(ids["<s>"], one, seven) == "17"
    assert text(one, ids["<|im_end|>"], seven) == "1\n7"  # not 17
    assert text(ids["<think>"], one, ids["</think>"], seven) == "<think>1</think>7"
    assert text(one, unknown) == "1<unk>"
    assert text(ids["<|im_end|>"]) == text() == ""


@pytest.mark.parametrize(
    "marker",
    [
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "</s>",
        "<end_of_turn>",
        "<｜end▁of▁sentence｜>",
        "<|im_end|>\n</s> ",
    ],
)
def test_markers_at_the_end_of_a_text_are_no_part_of_the_answer(marker: str) -> None:
    assert strip_turn_end(f"The answer is 17{marker}") == "The answer is 17"
    assert strip_turn_end(f"The answer is 17\n{marker}") == "The answer is 17"


@pytest.mark.parametrize(
    "text",
    [
        "<think>1</think>", "<answer>17</answer>", "a </s> in the middle", "<s>struck</s>", "x <|im_end|> y", "a < b|>",
        "17\n", "",
    ],
)  # fmt: skip
def test_other_text_stays_as_it_is(text: str) -> None:
    assert strip_turn_end(text) == text


def test_a_verifier_is_given_no_marker() -> None:
    spec = VerifierSpec("forkrl.rewards.math:verify_math")
    with open_verifier({"": spec}, RewardConfig(workers=1, timeout_s=300)) as pool:
        responses = ["The answer is 17<|im_end|>", "The answer is 17</s>\n", "The answer is 18<|eot_id|>"]
        results = pool.verify([(Prompt("a", "", "17"), response) for response in responses])
    assert [result.score for result in results] == [1.0, 1.0, 0.0]


def test_a_rollouts_text_has_no_special_tokens(tmp_path: Path) -> None:
    policy = random_policy()
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=8)
    [group] = engine.generate(
        [Prompt("a", "12", "")],
        group_size=64,
        sampling=dataclasses.replace(SamplingParams(8), temperature=3.0),
        generator=torch.Generator().manual_seed(0),
    )
    assert any(policy.tokenizer.pad_token_id in rollout.response_ids for rollout in group.rollouts)
    assert not any("<pad>" in rollout.text or "<eos>" in rollout.text for rollout in group.rollouts)


@pytest.mark.parametrize("text", [" " * 10**6, "</s>" * 10**5, "<|im_end|>\n" * 10**5, "<|" + "a" * 10**6])
def test_a_long_end_takes_linear_time(text: str) -> None:
    began = time.process_time()
    strip_turn_end(f"17{text}x{text}")
    strip_turn_end(text)
    assert time.process_time() - began < 10
