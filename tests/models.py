"""Small random models of several architectures, and a tokenizer with one token a character."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forkrl.model.policy import Policy
from forkrl.training.sft import build_character_tokenizer

ALPHABET = "0123456789 "
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def random_policy(family: str = "qwen3", *, seed: int = 0, sharpness: float = 20.0, **changes: Any) -> Policy:
    """A model with random weights; ``sharpness`` spreads its logits, so that entropies differ."""
    tokenizer = build_character_tokenizer(ALPHABET)
    torch.manual_seed(seed)
    sizes = SIZES | {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None} | changes
    model: PreTrainedModel
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes | {"head_dim": 8}))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes | {"tie_word_embeddings": True}))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        torch.nn.Module.apply(model, _randomize_bias)
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes | {"sliding_window": None, "head_dim": 16}))
    elif family == "mistral with a sliding window":
        model = MistralForCausalLM(MistralConfig(**sizes | {"sliding_window": 6, "head_dim": 8}))
    elif family == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes | {"head_dim": 8, "sliding_window": 6, "layer_types": kinds})
        )
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1)
        )
    elif family == "gemma2 with soft-capped logits":
        model = Gemma2ForCausalLM(Gemma2Config(**sizes | {"head_dim": 8, "final_logit_softcapping": 1.0}))
    else:
        raise ValueError(family)
    policy = Policy(model, tokenizer)
    torch.nn.Module.eval(model)
    with torch.no_grad():
        policy.head_weight.mul_(sharpness)
    return policy


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, adding <pad> as BOS in front of a text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<pad> $A", pair="<pad> $A <pad> $B", special_tokens=[("<pad>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _randomize_bias(module: torch.nn.Module) -> None:
    """Biases start at 0, where leaving one out would go unseen."""
    if isinstance(module, torch.nn.Linear) and module.bias is not None:
        torch.nn.init.normal_(module.bias)
