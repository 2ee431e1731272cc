"""Objectives: the loss of a token from its ratio and advantage. One file for each; ``forkrl/methods.py`` lists them."""
