"""What must be settled before any test imports anything."""

from __future__ import annotations

import os

import torch

# Triton decides when it is imported whether its kernels are compiled or interpreted. Without an accelerator only the
# interpreter can run them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
