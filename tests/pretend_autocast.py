"""Autocast on the pretend accelerator, as it is on CUDA: of what a language model and its losses are made of.

The tables are those of PyTorch's ``aten/src/ATen/autocast_mode.h``. What it promotes to the widest type there is left
to the operations, which do so by themselves.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

NAME = "pretend"
KEY = "AutocastPrivateUse1"
TO_LOWER_PRECISION = (
    "linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "prelu", "conv1d",
    "scaled_dot_product_attention", "linalg_vecdot",
)  # fmt: skip
TO_FP32 = (
    "exp", "expm1", "log", "log10", "log1p", "log2", "logsumexp", "pow.Scalar", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "reciprocal", "rsqrt", "softplus", "layer_norm", "native_layer_norm", "nll_loss", "mse_loss",
    "l1_loss", "smooth_l1_loss", "kl_div", "cosine_similarity", "binary_cross_entropy_with_logits", "dist",
)  # fmt: skip
RESULT_IN_FP32 = (
    "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "prod", "prod.dim_int", "cumsum", "cumprod",
    "linalg_vector_norm",
)  # fmt: skip


def install_autocast(fallbacks: torch.library.Library, kernels: torch.library.Library) -> None:
    """Register the rules for the accelerator of this process; what has none runs in what it is given."""
    fallbacks.fallback(torch.library.fallthrough_kernel, KEY)
    for names, rule in ((TO_LOWER_PRECISION, _in_lower_precision), (TO_FP32, _in_fp32), (RESULT_IN_FP32, _to_fp32)):
        for name in names:
            kernels.impl(name, functools.partial(rule, operation(name)), KEY)


def operation(name: str) -> Any:
    """An operation of PyTorch's: its name, and after a dot which of its forms."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _without_autocast(func: Any, args: Any, kwargs: Any) -> Any:
    key = torch._C._dispatch_key_parse(KEY)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return func(*args, **kwargs)


def _eligible(value: Any) -> bool:
    """A number of the CPU is not cast, nor anything in fp64."""
    floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return floating and value.device.type == NAME


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if _eligible(value) else value

    return tree_map(cast, values)


def _in_lower_precision(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _without_autocast(func, *_cast((args, kwargs), torch.get_autocast_dtype(NAME)))


def _in_fp32(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _without_autocast(func, *_cast((args, kwargs), torch.float32))


def _to_fp32(func: Any, *args: Any, **kwargs: Any) -> Any:
    if _eligible(args[0]) and kwargs.get("dtype") is None:
        kwargs["dtype"] = torch.float32
    return _without_autocast(func, args, kwargs)
