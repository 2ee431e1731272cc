"""Weights: factors of each token's advantage. One file for each method; ``forkrl/methods.py`` lists them."""
