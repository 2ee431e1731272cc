"""Rule "threshold": one entropy bound for the whole run (the paper's 80th percentile: 0.672 nats, method section 2)."""

from __future__ import annotations

from torch import Tensor

from forkrl.selectors.candidates import Candidates


def select_threshold(candidates: Candidates) -> Tensor:
    """Keep tokens with entropy of at least the threshold: as many as there are, perhaps none."""
    assert candidates.threshold is not None, "checked by select_tokens"
    return candidates.entropy >= candidates.threshold
