"""Verifiers, and the pool of isolated processes that runs them."""

from forkrl.rewards.pool import VerifierPool
from forkrl.rewards.specs import open_verifier

__all__ = ["VerifierPool", "open_verifier"]
