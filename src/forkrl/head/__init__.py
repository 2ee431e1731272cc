"""Target log-probs and entropies from hidden states. Axes: ``N`` rows (positions), ``D`` hidden, ``V`` vocabulary."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from forkrl.head.chunked import chunked_token_stats
from forkrl.head.live_rows import Head
from forkrl.head.reference import reference_token_stats
from forkrl.types import TokenStats, require_tensors

__all__ = ["BACKENDS", "token_stats"]


Backend = Callable[[Tensor, Tensor, Head], TokenStats]
"""Computes statistics from hidden states ``[N, D]`` and targets ``[N]``, already validated."""


def _triton_token_stats(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> TokenStats:
    """Import Triton lazily: it is large, needs an accelerator, and may be missing."""
    if not _has_triton():
        raise ModuleNotFoundError('backend = "triton" needs the triton package: pip install triton')
    from forkrl.head.triton import triton_token_stats

    return triton_token_stats(hidden_ND, targets_N, head)


BACKENDS: dict[str, Backend] = {
    "reference": reference_token_stats,
    "chunked": chunked_token_stats,
    "triton": _triton_token_stats,
}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    backend: str = "auto",
    entropy_grad: bool = False,
) -> TokenStats:
    """Log-prob of each target and entropy of each position of a language-model head.

    With ``z = (hidden @ weight.T + bias) / temperature`` and ``p = softmax(z)``: ``logprobs = log p[target]`` and
    ``entropy = -sum(p log p)`` in nats (arXiv 2506.01939v2, eq. 1). The matrix product has the dtype of the inputs (or
    of autocast), as in the model's own head; the rest is fp32, or fp64 for fp64 inputs.

    ``logprobs`` is differentiable in ``hidden``, ``weight`` and ``bias``. "chunked" and "triton" hold one small tile of
    ``[N, V]`` and differentiate only rows with a non-zero incoming gradient. "triton" does not round the logits, so it
    is more accurate than the model's own head; its first use in a process is checked against "chunked" on four rows. A
    NaN row gives NaN statistics, a logit of minus infinity NaN entropy.

    Args:
        hidden: ``[N, D]``, last hidden states; fp16, bf16, fp32 or fp64.
        weight: ``[V, D]``, same dtype.
        targets: ``[N]`` int64 in ``[0, V)``, the token each row predicts.
        temperature: of the sampling policy; divides the logits.
        bias: ``[V]`` or None, same dtype.
        backend: "chunked", "triton" (CUDA, or its interpreter; no fp64), "reference" (naive, holds ``[N, V]``) or
            "auto": "triton" for 16-bit tensors on a CUDA device if installed, else "chunked".
        entropy_grad: let gradients flow through ``entropy`` too.

    Returns:
        ``logprobs`` and ``entropy``, ``[N]`` each, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or dtypes disagree, a target is outside the vocabulary, the temperature is not positive and
            finite, or the backend is unknown or does not support these tensors.
        ModuleNotFoundError: backend "triton" where Triton is not installed.
        UserError: "triton" does not compile here, or deviates from "chunked".
    """
    require_tensors(hidden=hidden, weight=weight, targets=targets, **({} if bias is None else {"bias": bias}))
    hidden, weight, bias = _as_autocast_would(hidden, weight, bias)
    _check_tensors(hidden, weight, targets, bias)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature = {temperature} must be positive and finite")
    name = _choose_backend(hidden) if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is unknown; choose one of {['auto', *BACKENDS]}")
    # The dtype of every product is fixed above; autocast must not change it.
    with torch.autocast(hidden.device.type, enabled=False):
        return BACKENDS[name](hidden, targets, Head(weight, bias, temperature, entropy_grad))


def _choose_backend(hidden: Tensor) -> str:
    """Triton where it is faster: in fp32 exact products dominate, which the library does best."""
    if not hidden.is_cuda or hidden.dtype not in (torch.float16, torch.bfloat16) or not _has_triton():
        return "chunked"
    # Older cards have no bf16.
    return "triton" if torch.cuda.get_device_capability(hidden.device) >= (8, 0) else "chunked"


@functools.cache
def why_no_triton(device: torch.device) -> str:
    """Why the Triton backend cannot run on a device; empty if it can."""
    if not _has_triton():
        return "the triton package is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on a CUDA device, not on {device.type}"
    return ""


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _as_autocast_would(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as ``F.linear`` would, so that the head agrees with the model's own."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows; a distribution needs a vocabulary")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [N] with N = {hidden.shape[0]} rows of hidden")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; they must be torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] with V = {weight.shape[0]} rows of weight")
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1 or hidden.dtype not in _FLOATS:
        raise ValueError(f"hidden, weight and bias must share one floating dtype; got {sorted(map(str, dtypes))}")
    if targets.numel():
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets span {low} to {high}; the vocabulary is 0 to {weight.shape[0] - 1}")
