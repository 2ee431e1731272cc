"""How the policy's tokens are run with gradients: every position, or the selected ones alone."""

from forkrl.backward.dense import compute_token_stats
from forkrl.backward.forks_only import (
    compute_selected_stats,
    entropies_ahead,
    read_ahead,
    require_forks_only,
)

__all__ = [
    "compute_selected_stats",
    "compute_token_stats",
    "entropies_ahead",
    "read_ahead",
    "require_forks_only",
]
