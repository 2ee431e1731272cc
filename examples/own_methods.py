"""A mask, a weight and an objective of your own, and a run of two steps with them.

    forkrl train recipes/countdown.toml selection.rule=own_methods:above_mean weights.rule=own_methods:early \
        loss.objective=own_methods:asymmetric --out runs/own

Run that in this folder, or put the folder into PYTHONPATH.
"""

from pathlib import Path

from torch import Tensor

import forkrl


def above_mean(signals: forkrl.Signals) -> Tensor:
    """Keep the tokens with more entropy than the mean of their response."""
    mean_B1 = signals.entropy.sum(1, keepdim=True) / signals.lengths[:, None].clamp(min=1)
    return signals.entropy > mean_B1


def early(signals: forkrl.Signals, *, half_life: float = 64.0) -> Tensor:
    """Weight a token less the later it comes."""
    return 0.5 ** (signals.position / half_life)


def asymmetric(terms: forkrl.Terms, *, negative: float = 0.5) -> Tensor:
    """REINFORCE with importance weights, where bad responses count less."""
    scale_BT = 1.0 - (1.0 - negative) * (terms.advantages < 0)
    return -terms.log_ratio.exp() * terms.advantages * scale_BT


if __name__ == "__main__":
    config = forkrl.load_recipe(
        Path(__file__).parents[1] / "recipes/countdown.toml",
        "selection.rule=own_methods:above_mean",
        "weights.rule=own_methods:early",
        "weights.options={half_life = 32}",
        "loss.objective=own_methods:asymmetric",
        "training.steps=2",
        "rollout.prompts_per_step=12",
        "eval.problems=32",
    )
    results = forkrl.train(config, out="runs/own-methods")
    print(results.metrics[["loss/policy", "selection/kept_fraction"]])
