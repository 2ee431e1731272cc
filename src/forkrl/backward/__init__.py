"""How the policy's tokens are run with gradients: today every position, densely."""

from forkrl.backward.dense import compute_token_stats

__all__ = ["compute_token_stats"]
