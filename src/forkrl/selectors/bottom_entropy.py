"""Rule "bottom_entropy": the control that trains where the policy is most decided (arXiv 2506.01939v2, fig. 7)."""

from __future__ import annotations

from torch import Tensor

from forkrl.selectors.candidates import Candidates, keep_highest


def select_bottom_entropy(candidates: Candidates) -> Tensor:
    """Keep the fraction of lowest entropy; of equal entropies the earliest."""
    return keep_highest(-candidates.entropy, candidates.num_kept)
