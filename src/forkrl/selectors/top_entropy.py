"""Rule "top_entropy": the forking tokens, where the policy is least decided (arXiv 2506.01939v2, eq. 6)."""

from __future__ import annotations

from torch import Tensor

from forkrl.selectors.candidates import Candidates, keep_highest


def select_top_entropy(candidates: Candidates) -> Tensor:
    """Keep the fraction of highest entropy; of equal entropies the earliest."""
    return keep_highest(candidates.entropy, candidates.num_kept)
