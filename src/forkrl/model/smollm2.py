"""SmolLM2-135M-Instruct from a GGUF file or from the hub's files: model and tokenizer as published.

transformers reads the weights of a GGUF file correctly. Its tokenizer differs from the published one in the EOS token,
the pad token, the pre-tokenizer and the decoder, so the tokenizer is built here from the vocabulary in the file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from forkrl.errors import UserError

BOS, END = "<|im_start|>", "<|im_end|>"
"""A turn of a conversation begins and ends with them; ``END`` also ends a response and pads."""
UNKNOWN = "<|endoftext|>"
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_SPECIAL = 3  # the kind of control tokens in tokenizer.ggml.token_type


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Dequantise the weights to bf16 and build the tokenizer. Needs ``gguf`` and ``accelerate``."""
    tokenizer = tokenizer_of_gguf(file)
    with redirect_stderr(io.StringIO()):  # a bar for every tensor, which a log would show as hundreds of lines
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.absolute().parent, gguf_file=file.name, dtype=torch.bfloat16
        )
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")  # the file has 1e-5 as an fp32 number
    return model, tokenizer


def read_hub_files(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in bf16 and the tokenizer from tokenizer.json, whatever class the folder names for it."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = AutoTokenizer.from_pretrained(folder).chat_template
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True)
    return model, _wrap(backend, template, model.config.max_position_embeddings)


def tokenizer_of_gguf(file: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, except that every digit is a token of its own."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def value(name: str) -> Any:
        return fields[name].contents()

    tokens: Sequence[str] = value("tokenizer.ggml.tokens")
    merges = [(left, right) for left, right in (merge.split(" ") for merge in value("tokenizer.ggml.merges"))]
    backend = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, value("tokenizer.ggml.token_type"), strict=True)
    special = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _SPECIAL]
    backend.add_special_tokens(special)
    return _wrap(backend, value("tokenizer.chat_template"), value("llama.context_length"))


def _wrap(backend: Tokenizer, template: str, positions: int) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=END, pad_token=END, unk_token=UNKNOWN,
        model_max_length=positions, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write safetensors, configs and tokenizer; the configs name the tokenizer's special tokens."""
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    transformers_logging.disable_progress_bar()  # for writing weights
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def require_published_tokenizer(folder: Path) -> None:
    """Open the saved tokenizer as users do, and reject one that does not behave as the published one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text, tokens = "333  44", ["3", "3", "3", "ĠĠ", "4", "4"]
    ids = tokenizer.encode(text)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    faults = {
        f"its EOS token is {tokenizer.eos_token!r}": tokenizer.eos_token != END,
        f"it has the pad token {tokenizer.pad_token!r}": tokenizer.pad_token != END,
        f"it splits {text!r} into {tokenizer.tokenize(text)}": tokenizer.tokenize(text) != tokens,
        f"it decodes {text!r} as {tokenizer.decode(ids)!r}": tokenizer.decode(ids) != text,
        "its chat template lacks the model's system prompt": SYSTEM_PROMPT not in chat,
        "its chat template does not end turns": tokenizer.eos_token_id not in tokenizer.encode(chat),
    }
    if found := [fault for fault, present in faults.items() if present]:
        raise UserError(
            f"the converted tokenizer differs from the published one: {found[0]}; take a transformers in the tested "
            "range (forkrl doctor shows it)"
        )
