"""One module a command that looks at a model: ``forkrl eval``, ``analyze``, ``drift`` and their like."""
