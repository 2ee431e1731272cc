"""Data frames behind the paper's figures (arXiv 2506.01939v2, sections 3 and 4)."""

from forkrl.analysis.drift import entropy_change_by_percentile, overlap_ratio, overlap_table, percentile_table
from forkrl.analysis.measure import TokenDetails, measure_tokens, token_details
from forkrl.analysis.patterns import (
    LOW_ENTROPY,
    correct_against_incorrect,
    density_against_correctness,
    entropy_histogram,
    entropy_summary,
    fork_contexts,
    fork_positions,
    response_table,
    token_types,
)
from forkrl.analysis.temperatures import temperature_table
from forkrl.analysis.token_table import TOKEN_SCHEMA, read_tokens

__all__ = [
    "LOW_ENTROPY",
    "TOKEN_SCHEMA",
    "TokenDetails",
    "correct_against_incorrect",
    "density_against_correctness",
    "entropy_change_by_percentile",
    "entropy_histogram",
    "entropy_summary",
    "fork_contexts",
    "fork_positions",
    "measure_tokens",
    "overlap_ratio",
    "overlap_table",
    "percentile_table",
    "read_tokens",
    "response_table",
    "temperature_table",
    "token_details",
    "token_types",
]
