"""Rule "all": every response token carries gradient. This is plain DAPO."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.selectors.candidates import Candidates


def select_everything(candidates: Candidates) -> Tensor:
    """Keep every token."""
    return torch.ones_like(candidates.entropy, dtype=torch.bool)
