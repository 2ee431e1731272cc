"""Benchmarks and what their figures are worth; intervals are in ``forkrl.stats.intervals``."""
