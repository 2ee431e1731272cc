"""Supervised training from random weights on generated search traces: how the embedded base model is made.

Every batch is drawn afresh from the task's random searcher with a generator seeded by (seed, step), so a recipe names one
sequence of data, and a resumed run meets the same traces.
"""

from __future__ import annotations

import math
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from forkrl.config import SftConfig
from forkrl.model import Policy
from forkrl.tasks.countdown import SearchHabits, random_problem, write_trace
from forkrl.types import Task

IGNORED = -100
MICRO_BATCH_TOKENS = 1024


def build_character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of the alphabet, and <pad>, <eos>, <unk>."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_base_policy(config: SftConfig) -> Policy:
    """A Qwen3 model with seeded random weights and tied embeddings, and its tokenizer."""
    tokenizer = build_character_tokenizer(config.data.characters)
    torch.manual_seed(config.seed)
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **config.architecture.model_dump(),
    )
    return Policy(Qwen3ForCausalLM(architecture), tokenizer, config.precision)


def trace_batch(config: SftConfig, policy: Policy, task: Task, step: int) -> list[tuple[Tensor, Tensor]]:
    """The data of one gradient step, cut into ``(input_ids [B, T], labels [B, T])`` of similar length.

    Prompt and padding carry no label. Every character of every trace is the model's to predict.
    """
    rng, tokenizer = random.Random(f"{config.seed}/{step}"), policy.tokenizer
    rows: list[tuple[list[int], list[int]]] = []
    while sum(len(ids) for ids, _ in rows) < config.batch_tokens:
        prompt, numbers, target = random_problem(task, rng)
        prompt_ids = tokenizer.encode(prompt.text)
        trace_ids = [*tokenizer.encode(write_trace(numbers, target, rng, SearchHabits())), tokenizer.eos_token_id]
        rows.append((prompt_ids + trace_ids, [IGNORED] * len(prompt_ids) + trace_ids))
    rows.sort(key=lambda row: len(row[0]))
    micro_batches: list[list[tuple[list[int], list[int]]]] = [[]]
    for row in rows:
        if (len(micro_batches[-1]) + 1) * len(row[0]) > MICRO_BATCH_TOKENS:
            micro_batches.append([])
        micro_batches[-1].append(row)
    return [_pad(micro_batch, tokenizer.pad_token_id) for micro_batch in micro_batches]


def _pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    return (
        torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
    )


def learning_rate(config: SftConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
