"""``forkrl plan``: memory, operations and hours of a run from the model's shape and the recipe. Imports no torch."""
