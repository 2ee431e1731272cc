"""Masks: which response tokens carry gradient. One file for each method; ``forkrl/methods.py`` lists them."""
