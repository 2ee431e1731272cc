"""Train the embedded model from Python and read the results as data frames. docs/python.md explains the plug-ins."""

from pathlib import Path

import forkrl

config = forkrl.load_recipe(
    Path(__file__).parents[1] / "recipes/countdown.toml",
    "training.steps=2",
    "rollout.prompts_per_step=12",
    "eval.problems=32",
)
results = forkrl.train(
    config, out="runs/python", on_step=lambda run, metrics: print(f"step {run.step}: {metrics['reward/accuracy']:.3f}")
)
print(results.metrics[["reward/accuracy", "entropy/mean", "selection/kept_fraction"]])
print(results.rollouts("eval-000002")[["prompt", "response", "score"]].head())
