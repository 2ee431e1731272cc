"""Verifiers, and the pool of isolated processes that runs them."""

from forkrl.rewards.pool import VerifierPool

__all__ = ["VerifierPool"]
