"""One module per command: ``forkrl eval``, ``analyze``, ``drift``, …."""
