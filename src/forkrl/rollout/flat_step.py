"""A fast decoding step for Llama-like models: about twenty operations per layer instead of sixty.

Per-operation overhead limits decoding of small models, so projections with the same input are stacked. The stacked
weights are a second copy in compute precision, which avoids autocast at every token and includes adapters. Other models
(:func:`reproducible` is false) and all prefills use the model's own code.

Shapes: ``S`` sequences, ``D`` hidden, ``H`` query heads, ``K`` key-value heads, ``C`` channels per head.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import DynamicCache, PreTrainedConfig

from forkrl.model.adapter import has_adapters, is_linear, linear_weight
from forkrl.model.attention import NAME, attend_one_token
from forkrl.model.policy import Policy
from forkrl.model.products import decoding_product

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class Layer(NamedTuple):
    """The weights of one decoder layer; those with the same input are stacked."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """``[H + K, C]``: scales of the query heads, then of the key heads."""
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    activation: nn.Module


def reproducible(policy: Policy) -> bool:
    """Whether :class:`FlatStep` computes the same function as this model.

    Not with adapters in bf16: merged weights would be rounded, and most of a small change lost, which the model's own
    layers add to their output instead.
    """
    config, decoder = policy.model.config, cast(Any, policy.decoder)
    return (
        config.model_type in MODEL_TYPES
        and config._attn_implementation == NAME
        and not _has_sliding_layers(config)
        and all(_is_plain(layer) for layer in decoder.layers)
        and not (policy.precision == "bf16" and has_adapters(policy.model))
    )


def _has_sliding_layers(config: PreTrainedConfig) -> bool:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return getattr(config, "sliding_window", None) is not None
    return any(kind != "full_attention" for kind in layer_types)


def _is_plain(layer: Any) -> bool:
    """Whether all projections are linear layers, with biases only on queries, keys and values."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    rest = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return all(is_linear(module) for module in projections + rest) and all(module.bias is None for module in rest)


class FlatStep:
    """Runs the decoder layers on one new token per sequence. Requires :func:`reproducible`; copies the weights once."""

    def __init__(self, policy: Policy) -> None:
        decoder: Any = policy.decoder
        attention = decoder.layers[0].self_attn
        dtype = torch.bfloat16 if policy.precision == "bf16" else policy.head_weight.dtype
        self.policy = policy
        self.eps = torch.tensor(policy.model.config.rms_norm_eps, device=policy.device)
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.num_kv: int = policy.model.config.num_key_value_heads
        self.cache_dtype = torch.float32 if policy.device.type == "cpu" else dtype  # bf16 attention is slow on CPUs
        self.layers = [_stack(layer, dtype, self.head_dim) for layer in decoder.layers]

    def hidden_states(self, tokens_S: Tensor, position_S: Tensor, seen_ST: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden states ``[S, D]``; appends the new tokens to the cache.

        ``seen_ST`` (bool, False for padding) covers the cache and the new token.
        """
        decoder: Any = self.policy.decoder
        bias = torch.where(seen_ST, 0.0, -torch.inf)[:, None, None].to(self.cache_dtype)
        hidden_SD = embedding(tokens_S, decoder.embed_tokens.weight)
        cos_S1C, sin_S1C = decoder.rotary_emb(hidden_SD, position_S[:, None])
        # rotate_half(x) swaps the halves of x and negates the first; here the sine has that sign.
        half = self.head_dim // 2
        sin_S1C = torch.cat([-sin_S1C[..., :half], sin_S1C[..., half:]], -1)
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            mixed_SD = self._attend(layer, self._norm(hidden_SD, layer.input_norm), (cos_S1C, sin_S1C), bias, stored)
            hidden_SD = _add_product(hidden_SD, mixed_SD, layer.out)
            normed_SD = self._norm(hidden_SD, layer.mlp_norm)
            gate, up = decoding_product(normed_SD.to(layer.gate_up.dtype), layer.gate_up).chunk(2, -1)
            hidden_SD = _add_product(hidden_SD, layer.activation(gate) * up, layer.down)
        return self._norm(hidden_SD, decoder.norm.weight)

    def _attend(
        self, layer: Layer, normed_SD: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor, stored: Any
    ) -> Tensor:
        """Attention of the new tokens to the cache and themselves, before the output projection."""
        num_sequences, half, (cos_S1C, sin_S1C) = len(normed_SD), self.head_dim // 2, rotation
        heads = decoding_product(normed_SD.to(layer.qkv.dtype), layer.qkv, layer.qkv_bias)
        heads = heads.view(num_sequences, -1, self.head_dim)
        rotated, value = heads[:, : -self.num_kv], heads[:, -self.num_kv :]
        if layer.qk_norm is not None:
            rotated = self._norm(rotated.float(), layer.qk_norm)
        swapped = torch.cat([rotated[..., half:], rotated[..., :half]], -1)
        rotated = torch.addcmul(rotated * cos_S1C, swapped, sin_S1C).to(self.cache_dtype)
        query, key = rotated[:, : -self.num_kv], rotated[:, -self.num_kv :]
        keys, values = stored.update(key[:, :, None], value[:, :, None].to(self.cache_dtype))
        grouped = query.reshape(num_sequences, self.num_kv, -1, self.head_dim)
        return attend_one_token(grouped, keys, values, bias, self.scaling).reshape(num_sequences, -1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last axis; PyTorch's ``rms_norm`` takes ten operations on a CPU."""
        size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        inverse_rms = torch.addcmul(self.eps, size, size, value=1 / hidden.shape[-1]).rsqrt_()
        return hidden * inverse_rms * weight


def _stack(layer: Any, dtype: torch.dtype, head_dim: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    qk_norm = None
    if hasattr(attention, "q_norm"):
        num_heads, num_kv = (module.weight.shape[0] // head_dim for module in (q, k))
        scales = [attention.q_norm.weight.expand(num_heads, -1), attention.k_norm.weight.expand(num_kv, -1)]
        qk_norm = torch.cat(scales)
    return Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=torch.cat([linear_weight(module).to(dtype) for module in (q, k, v)]),
        qkv_bias=None if q.bias is None else torch.cat([q.bias, k.bias, v.bias]).to(dtype),
        qk_norm=qk_norm,
        out=linear_weight(attention.o_proj).to(dtype),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([linear_weight(module).to(dtype) for module in (mlp.gate_proj, mlp.up_proj)]),
        down=linear_weight(mlp.down_proj).to(dtype),
        activation=mlp.act_fn,
    )


def _add_product(residual_SD: Tensor, input_SD: Tensor, weight: Tensor) -> Tensor:
    """``residual + input @ weight.T``, fused if both have the same dtype."""
    if weight.dtype == residual_SD.dtype:
        return torch.addmm(residual_SD, input_SD.to(weight.dtype), weight.t())
    return residual_SD + decoding_product(input_SD.to(weight.dtype), weight)
