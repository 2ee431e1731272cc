"""The matrix product of a decoding step: as ``linear``, but fast for a single sequence in bf16 on a CPU."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_LOCK = threading.Lock()


def decoding_product(input_SD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear``. oneDNN repacks bf16 weights at every call, which takes longer than a product with one row.

    PyTorch's own product of a matrix and a vector also sums in fp32.
    """
    if len(input_SD) > 1 or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return linear(input_SD, weight, bias)
    onednn: Any = torch.backends.mkldnn
    with _LOCK:  # the switch is of the whole process
        enabled = onednn.enabled
        try:
            onednn.enabled = False
            return linear(input_SD, weight, bias)
        finally:
            onednn.enabled = enabled
