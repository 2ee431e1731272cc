"""SmolLM2-135M-Instruct from a GGUF file or from the hub's files: model and tokenizer as published.

The GGUF file is read here, not by ``from_pretrained(gguf_file=...)`` of transformers: 5.10 makes a tokenizer of it that
differs from the published one in EOS token, pad token, pre-tokenizer and decoder, and 5.24 leaves the weights packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from forkrl.errors import UserError

BOS, END = "<|im_start|>", "<|im_end|>"
"""A turn of a conversation begins and ends with them; ``END`` also ends a response and pads."""
UNKNOWN = "<|endoftext|>"
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_SPECIAL = 3  # the kind of control tokens in tokenizer.ggml.token_type


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Dequantise the weights to bf16 and build the tokenizer. Needs ``gguf``."""
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    reader = GGUFReader(file)

    def value(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=value("llama.rope.dimension_count"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, there as an fp32 number
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    names, given = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers), {t.name: t for t in reader.tensors}
    weights = dict[str, Tensor]()
    for name in model.model.state_dict():
        stem = name.removesuffix(".weight")
        tensor = given[f"{names.get_name(f'model.{stem}')}.weight"]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        # llama.cpp rotates neighbouring dimensions of a head, transformers its two halves.
        if rotated := {"q_proj": heads, "k_proj": kv_heads}.get(stem.split(".")[-1]):
            weight = weight.view(rotated, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        weights[name] = weight
    model.model.load_state_dict(weights)
    return model, _tokenizer(value)


def read_hub_files(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in bf16 and the tokenizer from tokenizer.json, whatever class the folder names for it."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = AutoTokenizer.from_pretrained(folder).chat_template
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True)
    return model, _wrap(backend, template, model.config.max_position_embeddings)


def _tokenizer(value: Callable[[str], Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, except that every digit is a token of its own."""
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
