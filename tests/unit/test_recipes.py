"""Every shipped recipe parses, and those of the paper say what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkrl.config import SftConfig, TrainConfig
from forkrl.recipe import load_recipe, recipe_differences

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = ("qwen3-8b", "qwen3-14b", "qwen3-32b")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipe_parses(path: Path) -> None:
    """Files named *-base.toml make a base model (``forkrl sft``); all others train one."""
    load_recipe(SftConfig if path.stem.endswith("-base") else TrainConfig, path)


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_hold_the_published_settings(name: str) -> None:
    """arXiv 2506.01939v2, section 5.2; the last line stands only in the official scripts."""
    recipe = load_recipe(TrainConfig, RECIPES / f"{name}.toml")
    assert recipe.task.template == (
        "User:\n{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:\n"
    )
    assert (recipe.rollout.prompts_per_step, recipe.training.mini_batch_prompts) == (512, 32)
    assert (recipe.optimizer.lr, recipe.optimizer.warmup_steps) == (1e-6, 0)
    assert (recipe.loss.clip_low, recipe.loss.clip_high) == (0.2, 0.28)
    assert (recipe.rollout.max_response_tokens, recipe.reward.overlong_cache) == (20480, 4096)
    assert (recipe.selection.rule, recipe.selection.ratio, recipe.loss.denominator) == ("top_entropy", 0.2, "selected")
    assert (recipe.loss.kl_coef, recipe.loss.entropy_coef, recipe.rollout.temperature) == (0.0, 0.0, 1.0)
    assert recipe.rollout.stop == ("<|endoftext|>",)
    official = (recipe.rollout.group_size, recipe.dynamic_sampling.generation_prompts, recipe.loss.dual_clip)
    assert official == (16, 1536, 10.0)


def test_paper_recipes_differ_only_in_their_model() -> None:
    first, *others = (load_recipe(TrainConfig, RECIPES / f"{name}.toml") for name in PAPER)
    for other in others:
        assert [line.split(":")[0] for line in recipe_differences(first, other)] == ["model.path"]
