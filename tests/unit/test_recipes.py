"""Every shipped recipe parses, and those of the paper say what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkrl.config import SftConfig, TrainConfig
from forkrl.config.recipe import load_recipe, recipe_differences

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = ("qwen3-8b", "qwen3-14b", "qwen3-32b")
ON_VERL = tuple(f"verl/{name}" for name in PAPER)
LONG_RUN = "verl/qwen3-32b-29k"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.stem)
def test_recipe_parses(path: Path) -> None:
    """Files named *-base.toml make a base model (``forkrl sft``); all others train one."""
    load_recipe(SftConfig if path.stem.endswith("-base") else TrainConfig, path)


@pytest.mark.parametrize("name", [*PAPER, *ON_VERL, LONG_RUN])
def test_paper_recipes_hold_the_published_settings(name: str) -> None:
    """arXiv 2506.01939v2, section 5.2; the last line stands only in the official scripts."""
    recipe = load_recipe(TrainConfig, RECIPES / f"{name}.toml")
    assert recipe.task.template == (
        "User:\n{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:\n"
    )
    assert (recipe.rollout.prompts_per_step, recipe.training.mini_batch_prompts) == (512, 32)
    assert (recipe.optimizer.lr, recipe.optimizer.warmup_steps) == (1e-6, 0)
    assert (recipe.loss.clip_low, recipe.loss.clip_high) == (0.2, 0.28)
    longest = 29696 if name == LONG_RUN else 20480
    assert (recipe.rollout.max_response_tokens, recipe.reward.overlong_cache) == (longest, 4096)
    assert (recipe.selection.rule, recipe.selection.ratio, recipe.loss.denominator) == ("top_entropy", 0.2, "selected")
    assert (recipe.loss.kl_coef, recipe.loss.entropy_coef, recipe.rollout.temperature) == (0.0, 0.0, 1.0)
    assert recipe.rollout.stop == ("<|endoftext|>",)
    official = (recipe.rollout.group_size, recipe.dynamic_sampling.generation_prompts, recipe.loss.dual_clip)
    assert official == (16, 1536, 10.0)


def changed_keys(old: str, new: str) -> list[str]:
    first, second = (load_recipe(TrainConfig, RECIPES / f"{name}.toml") for name in (old, new))
    return [line.split(":")[0] for line in recipe_differences(first, second)]


def test_paper_recipes_differ_only_in_their_model() -> None:
    for name in PAPER[1:]:
        assert changed_keys(PAPER[0], name) == ["model.path"]


def test_paper_recipes_on_verl_differ_only_in_their_model_and_their_machines() -> None:
    for name in ON_VERL[1:]:
        assert changed_keys(ON_VERL[0], name) == ["model.path", "cluster.nodes", "cluster.reward_workers"]


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_on_verl_differs_from_that_of_one_machine_in_how_it_is_run(name: str) -> None:
    how = ["rollout.max_sequences", "training.micro_batch_tokens", "eval.every", "checkpoint.every", "runtime.trainer"]
    changed = changed_keys(name, f"verl/{name}")
    assert [key for key in changed if not key.startswith("cluster.")] == how


def test_the_long_run_differs_from_the_run_that_it_continues_in_length_alone() -> None:
    assert changed_keys("verl/qwen3-32b", LONG_RUN) == [
        "model.path",
        "rollout.max_response_tokens",
        "training.steps",
        "training.micro_batch_tokens",
        "cluster.overrides",
    ]


@pytest.mark.parametrize("name", [*ON_VERL, LONG_RUN])
def test_paper_recipes_on_verl_cut_micro_batches_as_the_scripts_do(name: str) -> None:
    """One sequence of full length on each of the 8 GPUs that share a sequence."""
    recipe = load_recipe(TrainConfig, RECIPES / f"{name}.toml")
    longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_response_tokens
    assert (recipe.cluster.gpus_per_node, recipe.cluster.tensor_parallel, recipe.cluster.sequence_parallel) == (8, 4, 8)
    assert recipe.training.micro_batch_tokens == 8 * longest
    assert recipe.cluster.overrides == (f"actor_rollout_ref.rollout.max_num_batched_tokens={longest}",)
