"""Benchmarks and what their figures are worth."""

from __future__ import annotations

from forkrl.evaluation.statistics import (
    Estimate,
    mean_pass_at_k,
    mean_with_interval,
    mean_with_normal_interval,
    paired_difference,
    pass_at_k,
)

__all__ = [
    "Estimate",
    "mean_pass_at_k",
    "mean_with_interval",
    "mean_with_normal_interval",
    "paired_difference",
    "pass_at_k",
]
