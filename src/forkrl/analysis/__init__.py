"""Numbers about tokens, as data frames: where a model forks, and what its forks are worth."""
