"""What verl cannot do is refused by name, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from forkrl.cluster.settings import REFUSED
from forkrl.cluster.translate import refuse_unsuitable_prompts, refuse_untranslatable, verl_overrides
from forkrl.config import TrainConfig
from forkrl.errors import UserError
from tests.verl_recipes import CPU, MIX, ONE_GYM, PATHS, recipe

REFUSALS: list[tuple[str, Sequence[str], str]] = [
    ("seed", ["seed=2147483648"], "take one below 2147483648"),
    ("model.revision", ["model.revision=main"], "download that revision to a folder"),
    ("model.head", ["model.head=chunked"], "verl computes log-probs and entropies itself"),
    ("task.curriculum.promote_above", [*ONE_GYM, "task.curriculum.promote_above=0.7"], "set difficulty instead"),
    (
        "dynamic_sampling.generation_prompts",
        ["rollout.prompts_per_step=64", "dynamic_sampling.generation_prompts=96"],
        "set it to 0 or to a multiple",
    ),
    (
        "dynamic_sampling.generation_prompts",
        ["dynamic_sampling.generation_prompts=1024", "cluster.trainer=colocate_async"],
        "set it to 0",
    ),
    ("training.epochs", ["training.epochs=2"], "set it to 0, and training.steps to the length of the run"),
    ("training.mini_batch_prompts", ["cluster.gpus_per_node=7"], "512 responses of a gradient step"),
    (
        "training.micro_batch_tokens",
        [
            "cluster.gpus_per_node=8",
            "cluster.sequence_parallel=4",
            "model.precision=bf16",
            "training.micro_batch_tokens=32770",
        ],
        "take a multiple",
    ),
    (
        "task.environment",
        ["task.name=environment", "task.environment=guess_number"],
        'set runtime.trainer = "local"',
    ),
    ("rollout.engine", ["rollout.engine=vllm"], 'set it to "torch"'),
    ("training.backward", ["training.backward=forks_only"], 'set it to "dense"'),
    ("lora.rank", ["lora.rank=8"], "drop lora.*"),
    ("loss.objective", ["loss.objective=maxrl", "reward.overlong_cache=0"], "set it to dapo"),
    ("loss.entropy_target", ["loss.entropy_target=0.2"], "set it to 0, or use a constant loss.entropy_coef"),
    ("checkpoint.keep_best", ["checkpoint.keep_best=true"], "set it to false"),
    ("eval.patience", ["eval.patience=3"], "set it to 0"),
    ("reward.terms", ['reward.terms=[{name="a", verifier="m:f"}]'], "add the terms up in one verifier"),
    ("checkpoint.kind", ["checkpoint.kind=weights"], 'set it to "full"'),
    ("runtime.device", ["runtime.device=mps"], 'set it to "auto"'),
    ("runtime.device", ['runtime.device="cuda:0"'], 'set it to "auto"'),
    ("runtime.threads", ["runtime.threads=2"], "set OMP_NUM_THREADS"),
    ("runtime.workers", ["runtime.workers=2"], "set cluster.nodes and cluster.gpus_per_node"),
    ("cluster.nodes", ["cluster.nodes=2"], 'set the address, "auto" on the head node'),
    ("cluster.tensor_parallel", ["cluster.gpus_per_node=8", "cluster.tensor_parallel=3"], "take a divisor"),
    (
        "cluster.tensor_parallel",
        ["cluster.gpus_per_node=4", "cluster.nodes=3", "cluster.address=auto", "cluster.tensor_parallel=6"],
        "take a divisor or a multiple",
    ),
    (
        "cluster.sequence_parallel",
        ["cluster.gpus_per_node=8", "cluster.sequence_parallel=3", "model.precision=bf16"],
        "take a divisor",
    ),
    (
        "cluster.sequence_parallel",
        ["cluster.gpus_per_node=8", "cluster.sequence_parallel=4"],
        'model.precision = "bf16"',
    ),
    ("cluster.overrides", ['cluster.overrides=["trainer.nnodes=4"]'], "drop it"),
    ("cluster.nodes", [*CPU, "cluster.nodes=2", "cluster.address=auto"], "set it to 1"),
    ("cluster.tensor_parallel", [*CPU, "cluster.gpus_per_node=2", "cluster.tensor_parallel=2"], "set it to 1"),
    (
        "cluster.sequence_parallel",
        [*CPU, "cluster.gpus_per_node=2", "cluster.sequence_parallel=2", "model.precision=bf16"],
        "set it to 1",
    ),
    ("cluster.rollout_engine", [*CPU, "cluster.rollout_engine=sglang"], 'set it to "vllm"'),
    ("cluster.offload", [*CPU, "cluster.offload=true"], "set it to false"),
    ("model.precision", [*CPU, "model.precision=bf16"], 'set it to "fp32"'),
    ("loss.kl_coef", [*CPU, "loss.kl_coef=0.1"], "set it to 0.0"),
]


@pytest.mark.parametrize(("key", "overrides", "remedy"), REFUSALS)
def test_what_verl_cannot_do_is_refused_by_name(key: str, overrides: Sequence[str], remedy: str) -> None:
    config = recipe(*overrides)
    with pytest.raises(UserError, match=re.escape(remedy)) as refused:
        verl_overrides(config, PATHS, stop_token_ids=[])
    assert key in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_refusal_of_the_table_has_a_case() -> None:
    """Those of the prompts themselves, and of what goes with another setting, are tested below."""
    elsewhere = {"task.parts.weight", "rollout.prompts_per_step"}
    with_another = {
        row.recipe for row in REFUSED if row.recipe.startswith(("task.curriculum.", "forks_only.", "reward.terms."))
    }
    with_another |= {"lora.alpha", "lora.targets", "checkpoint.merged"}
    with_another |= {"loss.entropy_delta", "rollout.kv_cache_gib"}
    with_another |= {"task.environment_args", "task.max_turns", "task.max_turn_tokens"}
    cases = {key for key, _, _ in REFUSALS}
    assert {row.recipe for row in REFUSED} - elsewhere - with_another <= cases
    assert cases <= {row.recipe for row in REFUSED}


@pytest.mark.parametrize("key", ["demote_below=0.1", "window=8", "start=1", "max_level=3"])
def test_a_curriculum_is_refused_with_all_its_settings(key: str) -> None:
    with pytest.raises(UserError, match="promote_above"):
        refuse_untranslatable(recipe(*ONE_GYM, "task.curriculum.promote_above=0.7", f"task.curriculum.{key}"))


def test_a_curriculum_of_a_part_is_refused_and_the_part_named() -> None:
    part = 'task.parts=[{name="reasoning-gym", generator="chain_sum", curriculum={promote_above=0.7}}]'
    with pytest.raises(UserError, match=r"task\.parts \(chain_sum\): curriculum\.promote_above = 0\.7"):
        refuse_untranslatable(recipe(*MIX, part))


def test_forks_only_settings_are_refused_with_the_backward_that_reads_them() -> None:
    with pytest.raises(UserError, match=r"training\.backward"):
        refuse_untranslatable(recipe("training.backward=forks_only", "forks_only.prompt=true"))


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_what_verl_can_do_is_not_refused(device: str) -> None:
    refuse_untranslatable(recipe(f"runtime.device={device}", "cluster.gpus_per_node=4"))


def two_parts(first: float, second: float) -> TrainConfig:
    parts = ", ".join(
        f'{{name="reasoning-gym", generator="{name}", weight={weight}}}'
        for name, weight in (("chain_sum", first), ("countdown", second))
    )
    return recipe(*MIX, f"task.parts=[{parts}]", "rollout.prompts_per_step=32")


def test_a_mix_is_handed_on_where_its_weights_are_its_rows() -> None:
    refuse_unsuitable_prompts(two_parts(1.0, 1.0), {"chain_sum": 2048, "countdown": 2047})
    refuse_unsuitable_prompts(two_parts(3.0, 1.0), {"chain_sum": 300, "countdown": 100})


def test_a_mix_is_refused_where_even_shuffling_would_not_keep_its_weights() -> None:
    with pytest.raises(UserError, match=r"task\.parts: chain_sum has weight 2, 66\.7% .* 2048 of 4096 rows"):
        refuse_unsuitable_prompts(two_parts(2.0, 1.0), {"chain_sum": 2048, "countdown": 2048})


def test_fewer_prompts_than_a_step_takes_are_refused() -> None:
    refuse_unsuitable_prompts(recipe("rollout.prompts_per_step=32"), {"": 32})
    with pytest.raises(UserError, match=r"rollout\.prompts_per_step = 32, but the task has 31"):
        refuse_unsuitable_prompts(recipe("rollout.prompts_per_step=32"), {"": 31})


@pytest.mark.parametrize(
    "own",
    [
        "trainer.nnodes=4",
        "++trainer.nnodes=4",
        "+forkrl.ratio=0.5",
        "actor_rollout_ref.actor.optim={lr: 1}",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp16",
        "algorithm.rollout_correction.bypass_mode=true",
        "actor_rollout_ref.actor.strategy=megatron",
    ],
)
def test_an_override_of_what_the_recipe_sets_is_refused(own: str) -> None:
    with pytest.raises(UserError, match=r"cluster\.overrides: .* sets what ForkRL sets itself"):
        verl_overrides(recipe(f"cluster.overrides=[{own!r}]"), PATHS, stop_token_ids=[])


@pytest.mark.parametrize(
    "own",
    ["model_engine=megatron", "actor@actor_rollout_ref.actor=x", "~trainer.device", "--config-dir=/x", "trainer.a"],
)
def test_an_override_that_is_no_setting_is_refused(own: str) -> None:
    with pytest.raises(UserError, match=r"cluster\.overrides: .* is not of the form"):
        verl_overrides(recipe(f"cluster.overrides=[{own!r}]"), PATHS, stop_token_ids=[])


@pytest.mark.parametrize("name", ["a${b}", "${oc.env:HOME}", "\\${x}"])
def test_a_path_that_verl_would_expand_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"actor_rollout_ref\.model\.path"):
        verl_overrides(recipe(), PATHS._replace(model=f"/models/{name}"), stop_token_ids=[])
