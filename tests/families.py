"""Tiny random models of many families, by the name of their configuration in transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from forkrl.model.policy import Policy
from forkrl.training.sft import build_character_tokenizer
from tests.models import ALPHABET, SIZES

_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_GRANITE_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
_MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
_DELTA_NET = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "num_hidden_layers": 4,
}  # fmt: skip
_H8: dict[str, Any] = {"head_dim": 8}

TRAINABLE: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": _H8 | {"sliding_window": 6}, "ministral": _H8, "mixtral": {"num_local_experts": 4},
    "qwen2": {}, "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 16}, "qwen3": _H8, "qwen3_moe": _MOE | _H8,
    "gemma": _H8, "gemma2": _H8 | {"final_logit_softcapping": None, "sliding_window": 6},
    "gemma3_text": _H8 | {"sliding_window": 6}, "phi": {}, "phi3": {"pad_token_id": 0},
    "phimoe": {"num_local_experts": 4, "pad_token_id": 0}, "olmo": {}, "olmo2": {}, "olmo3": {"sliding_window": 6},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "granite": {}, "granitemoe": _GRANITE_MOE,
    "smollm3": {"pad_token_id": 0}, "stablelm": {}, "starcoder2": {}, "helium": _H8, "glm": _H8 | {"pad_token_id": 0},
    "glm4": _H8 | {"pad_token_id": 0}, "ernie4_5": _H8, "exaone4": _H8 | {"sliding_window": 6}, "hunyuan_v1_dense": _H8,
    "seed_oss": _H8, "arcee": {}, "apertus": {}, "nemotron": {}, "bitnet": {},
    "gpt_oss": _H8 | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}, "deepseek_v3": _MLA,
    "gpt2": _GPT, "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {}, "gptj": _GPT | {"rotary_dim": 4}, "gpt_bigcode": _GPT, "codegen": _GPT | {"rotary_dim": 4},
    "bloom": {"n_layer": 2, "n_head": 4}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "falcon": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, "biogpt": {},
}  # fmt: skip
ANALYSABLE: dict[str, dict[str, Any]] = {
    "qwen3_next": _MOE | _DELTA_NET | {"shared_expert_intermediate_size": 16}, "qwen3_5_text": _DELTA_NET,
    "olmo_hybrid": _DELTA_NET | {"linear_num_key_heads": 4},
    "granitemoehybrid": _GRANITE_MOE | _MAMBA2 | {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "minimax": _H8 | {"num_local_experts": 4, "block_size": 8}, "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8}, "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "falcon_h1": {key: value for key, value in _MAMBA2.items() if key != "mamba_expand"} | {"mamba_d_ssm": 64},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2, "mamba_d_state": 8,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
}  # fmt: skip
REJECTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2 with soft caps": ("gemma2", _H8, "transforms its logits after the output embedding"),
    "granite with scaling": ("granite", {"logits_scaling": 8.0}, "transforms its logits after the output embedding"),
    "cohere": ("cohere", {}, "transforms its logits after the output embedding"),
    "doge": ("doge", {"num_experts": 4}, "change with the padding behind a sequence"),
    "llama4": (
        "llama4_text",
        _H8 | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
        "cannot be run as a decoder with an output embedding",
    ),
}


def family_policy(kind: str, changes: dict[str, Any]) -> Policy:
    """A model with random weights, large enough that its log-probs vary."""
    tokenizer = build_character_tokenizer(ALPHABET)
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = CONFIG_MAPPING[kind](**(SIZES | ids | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("proj" in name or "attn" in name or "mlp" in name):
                parameter.normal_(std=0.15)
        model.get_output_embeddings().weight.normal_(std=0.1)
    torch.nn.Module.eval(model)
    return Policy(model, tokenizer)
