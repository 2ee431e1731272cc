"""Benchmarks, sampling and statistics of evaluations; intervals are in ``forkrl.stats.intervals``."""
