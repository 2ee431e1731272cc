"""A recipe as verl's command line: every setting has a place, and what verl cannot do is refused by name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forkrl.cluster.correspondence import ELSEWHERE, FIXED, REFUSED, TRANSLATED, Counterpart
from forkrl.cluster.hydra_text import override
from forkrl.cluster.refusals import refuse_unsuitable_prompts
from forkrl.cluster.settings_page import settings_page
from forkrl.cluster.translate import (
    VerlPaths,
    refuse_untranslatable,
    verl_command,
    verl_environment,
    verl_overrides,
    verl_settings,
)
from forkrl.config import Section, TrainConfig
from forkrl.errors import UserError
from forkrl.recipe import item_section, load_recipe

PATHS = VerlPaths(
    model="/run/model",
    train=Path("/run/train.parquet"),
    held_out=Path("/run/held_out.parquet"),
    verifiers=Path("/run/verifiers.json"),
    checkpoints=Path("/run/verl"),
    run_folder=Path("/run"),
)
ONE_GYM = ('task.name="reasoning-gym"', "task.generator=chain_sum", "task.template={prompt}")
MIX = ('task.name="mix"',)
CPU = ("runtime.device=cpu",)

CHANGES: dict[str, tuple[Sequence[str], str]] = {
    "seed": ((), "seed=7"),
    "model.precision": ((), "model.precision=bf16"),
    "model.gradient_checkpointing": ((), "model.gradient_checkpointing=true"),
    "task.chat_template": ((*ONE_GYM,), "task.chat_template=true"),
    "rollout.prompts_per_step": ((), "rollout.prompts_per_step=64"),
    "rollout.group_size": ((), "rollout.group_size=4"),
    "rollout.temperature": ((), "rollout.temperature=0.7"),
    "rollout.top_p": ((), "rollout.top_p=0.9"),
    "rollout.top_k": ((), "rollout.top_k=20"),
    "rollout.max_prompt_tokens": ((), "rollout.max_prompt_tokens=99"),
    "rollout.max_response_tokens": ((), "rollout.max_response_tokens=5000"),
    "rollout.max_sequences": ((), "rollout.max_sequences=33"),
    "dynamic_sampling.enabled": ((), "dynamic_sampling.enabled=false"),
    "dynamic_sampling.generation_prompts": ((), "dynamic_sampling.generation_prompts=1536"),
    "dynamic_sampling.max_generation_batches": ((), "dynamic_sampling.max_generation_batches=3"),
    "selection.rule": ((), "selection.rule=all"),
    "selection.ratio": ((), "selection.ratio=0.3"),
    "selection.scope": ((), "selection.scope=sequence"),
    "selection.entropy": ((), "selection.entropy=rollout"),
    "loss.clip_low": ((), "loss.clip_low=0.1"),
    "loss.clip_high": ((), "loss.clip_high=0.4"),
    "loss.dual_clip": ((), "loss.dual_clip=10.0"),
    "loss.denominator": ((), "loss.denominator=response"),
    "loss.kl_coef": ((), "loss.kl_coef=0.01"),
    "loss.entropy_coef": ((), "loss.entropy_coef=0.01"),
    "optimizer.lr": ((), "optimizer.lr=3e-6"),
    "optimizer.warmup_steps": ((), "optimizer.warmup_steps=10"),
    "optimizer.weight_decay": ((), "optimizer.weight_decay=0.0"),
    "optimizer.betas": ((), "optimizer.betas=[0.9, 0.95]"),
    "optimizer.eps": ((), "optimizer.eps=1e-15"),
    "optimizer.max_grad_norm": ((), "optimizer.max_grad_norm=0.5"),
    "training.steps": (("eval.every=0",), "training.steps=7"),
    "training.mini_batch_prompts": ((), "training.mini_batch_prompts=64"),
    "training.micro_batch_tokens": ((), "training.micro_batch_tokens=50000"),
    "eval.every": ((), "eval.every=3"),
    "eval.samples": ((), "eval.samples=16"),
    "eval.temperature": ((), "eval.temperature=0.0"),
    "checkpoint.every": ((), "checkpoint.every=3"),
    "checkpoint.keep": ((), "checkpoint.keep=5"),
    "log.rollouts_every": ((), "log.rollouts_every=3"),
    "log.rollouts_sampled": ((), "log.rollouts_sampled=3"),
    "runtime.device": ((), "runtime.device=cpu"),
    "cluster.address": ((), "cluster.address=auto"),
    "cluster.nodes": (("cluster.address=auto",), "cluster.nodes=8"),
    "cluster.gpus_per_node": ((), "cluster.gpus_per_node=8"),
    "cluster.trainer": ((), "cluster.trainer=colocate_async"),
    "cluster.rollout_engine": ((), "cluster.rollout_engine=sglang"),
    "cluster.tensor_parallel": (("cluster.gpus_per_node=8",), "cluster.tensor_parallel=4"),
    "cluster.sequence_parallel": (("cluster.gpus_per_node=8", "model.precision=bf16"), "cluster.sequence_parallel=4"),
    "cluster.gpu_memory": ((), "cluster.gpu_memory=0.8"),
    "cluster.offload": ((), "cluster.offload=true"),
    "cluster.reward_workers": ((), "cluster.reward_workers=4"),
}
"""A change of each setting that is handed on, with what must be set beside it. ``selection.threshold`` comes with its
rule, and has a test of its own."""

REFUSALS: list[tuple[str, Sequence[str], str]] = [
    ("seed", ["seed=2147483648"], "take one below 2147483648"),
    ("model.revision", ["model.revision=main"], "download that revision to a folder"),
    ("task.curriculum.raise_above", [*ONE_GYM, "task.curriculum.raise_above=0.7"], "set difficulty instead"),
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
    ("training.backward", ["training.backward=forks_only"], 'set it to "dense"'),
    ("runtime.device", ["runtime.device=mps"], 'set it to "auto"'),
    ("runtime.device", ['runtime.device="cuda:0"'], 'set it to "auto"'),
    ("runtime.threads", ["runtime.threads=2"], "set OMP_NUM_THREADS"),
    ("runtime.replicas", ["runtime.replicas=2"], "set cluster.nodes and cluster.gpus_per_node"),
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
    ("cluster.overrides", ['cluster.overrides=["trainer.nnodes=4"]'], "leave it out"),
    ("cluster.nodes", [*CPU, "cluster.nodes=2", "cluster.address=auto"], "set it to 1"),
    ("cluster.tensor_parallel", [*CPU, "cluster.gpus_per_node=2", "cluster.tensor_parallel=2"], "set it to 1"),
    (
        "cluster.sequence_parallel",
        [*CPU, "cluster.gpus_per_node=2", "cluster.sequence_parallel=2", "model.precision=bf16"],
        "set it to 1",
    ),
    ("cluster.rollout_engine", [*CPU, "cluster.rollout_engine=sglang"], "set it to 'vllm'"),
    ("cluster.offload", [*CPU, "cluster.offload=true"], "set it to False"),
    ("cluster.address", [*CPU, "cluster.address=auto"], "set it to ''"),
    ("model.precision", [*CPU, "model.precision=bf16"], "set it to 'fp32'"),
    ("loss.kl_coef", [*CPU, "loss.kl_coef=0.1"], "set it to 0.0"),
]


def recipe(*overrides: str) -> TrainConfig:
    return load_recipe(TrainConfig, None, ["runtime.engine=verl", *overrides])


def settings_of(config: TrainConfig) -> dict[str, object]:
    refuse_untranslatable(config)
    return dict(verl_settings(config, PATHS, stop_token_ids=[5]))


def leaves(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """Every setting that holds a value, and of a list of tables those that it has beyond the section it extends."""
    for name, field in schema.model_fields.items():
        key, kind = prefix + name, field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from leaves(kind, f"{key}.")
            continue
        yield key
        if (listed := item_section(kind)) is not None and listed is not schema and not issubclass(schema, listed):
            own = set(listed.model_fields) - set(schema.model_fields)
            yield from (f"{key}.{inner}" for inner in listed.model_fields if inner in own)


def test_every_setting_of_a_recipe_has_a_place() -> None:
    placed = {row.recipe for table in (TRANSLATED, ELSEWHERE, REFUSED) for row in table}
    wanted = set(leaves(TrainConfig))
    assert wanted - placed == set(), "name them in src/forkrl/cluster/correspondence.py"
    assert placed - wanted == set(), "no settings of a recipe"


def test_no_setting_is_both_handed_on_and_acted_on_elsewhere() -> None:
    handed_on, elsewhere = [row.recipe for row in TRANSLATED], [row.recipe for row in ELSEWHERE]
    assert len(set(handed_on + elsewhere)) == len(handed_on) + len(elsewhere)


def test_whatever_verl_is_given_is_in_the_table() -> None:
    named = {key for row in TRANSLATED for key in row.verl} | {row.verl for row in FIXED}
    given: set[str] = set()
    for config in (recipe(), recipe(*CPU), recipe("model.precision=bf16")):
        given |= set(settings_of(config))
    assert given == named


@pytest.mark.parametrize(
    "row", [row for row in TRANSLATED if row.recipe != "selection.threshold"], ids=lambda row: row.recipe
)
def test_changing_a_setting_changes_its_counterparts_and_nothing_else(row: Counterpart) -> None:
    beside, change = CHANGES[row.recipe]
    before, after = settings_of(recipe(*beside)), settings_of(recipe(*beside, change))
    missing = object()
    changed = {key for key in {**before, **after} if before.get(key, missing) != after.get(key, missing)}
    assert changed == set(row.verl)


def test_a_threshold_goes_with_its_rule() -> None:
    given = settings_of(recipe("selection.rule=threshold", "selection.threshold=0.672"))
    assert (given["+forkrl.rule"], given["+forkrl.threshold"]) == ("threshold", 0.672)


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
    with_another = {row.recipe for row in REFUSED if row.recipe.startswith(("task.curriculum.", "forks_only."))}
    cases = {key for key, _, _ in REFUSALS}
    assert {row.recipe for row in REFUSED} - elsewhere - with_another <= cases
    assert cases <= {row.recipe for row in REFUSED}


@pytest.mark.parametrize("key", ["lower_below=0.1", "window=8", "start=1", "most=3"])
def test_a_curriculum_is_refused_with_all_its_settings(key: str) -> None:
    with pytest.raises(UserError, match="raise_above"):
        refuse_untranslatable(recipe(*ONE_GYM, "task.curriculum.raise_above=0.7", f"task.curriculum.{key}"))


def test_a_curriculum_of_a_part_is_refused_and_the_part_named() -> None:
    part = 'task.parts=[{name="reasoning-gym", generator="chain_sum", curriculum={raise_above=0.7}}]'
    with pytest.raises(UserError, match=r"task\.parts \(chain_sum\): curriculum\.raise_above = 0\.7"):
        refuse_untranslatable(recipe(*MIX, part))


def test_forks_only_settings_are_refused_with_the_backward_that_reads_them() -> None:
    with pytest.raises(UserError, match=r"training\.backward"):
        refuse_untranslatable(recipe("training.backward=forks_only", "forks_only.prompt=true"))


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_what_verl_can_do_is_not_refused(device: str) -> None:
    refuse_untranslatable(recipe(f"runtime.device={device}", "cluster.gpus_per_node=4"))


SELECTIONS = [
    (scope, entropy)
    for scope in ("rollout_batch", "mini_batch", "sequence", "micro_batch")
    for entropy in ("rollout", "current")
    if (scope, entropy) != ("rollout_batch", "current")  # the schema refuses it
]


@pytest.mark.parametrize(("scope", "entropy"), SELECTIONS)
@pytest.mark.parametrize("rule", ["all", "random", "top_entropy", "bottom_entropy"])
def test_every_selection_that_a_recipe_can_ask_for_is_handed_on(scope: str, entropy: str, rule: str) -> None:
    given = settings_of(recipe(f"selection.scope={scope}", f"selection.entropy={entropy}", f"selection.rule={rule}"))
    assert (given["+forkrl.scope"], given["+forkrl.entropy"], given["+forkrl.rule"]) == (scope, entropy, rule)


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


def test_the_users_own_settings_come_last_and_as_they_stand() -> None:
    own = ["actor_rollout_ref.rollout.enforce_eager=true", "+actor_rollout_ref.rollout.custom={a: [1, 'b c']}"]
    given = verl_overrides(recipe(f"cluster.overrides={own}"), PATHS, stop_token_ids=[])
    assert given[-2:] == own


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


def test_values_that_are_programming_errors_raise() -> None:
    with pytest.raises(ValueError, match="not a number"):
        override("a.b", float("nan"))
    with pytest.raises(ValueError, match="no identifier"):
        override("a.b", {"c d": 1})


def test_the_command_runs_this_python_and_the_environment_loads_the_plugin() -> None:
    command = verl_command(recipe(), PATHS, stop_token_ids=[])
    assert command[:3] == [sys.executable, "-m", "verl.trainer.main_ppo"]
    assert verl_environment(recipe()) == {"VERL_USE_EXTERNAL_MODULES": "forkrl.cluster.plugin"}
    assert verl_environment(recipe(*CPU)) == {
        "VERL_USE_EXTERNAL_MODULES": "forkrl.cluster.plugin",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
    }


def test_the_page_is_what_the_program_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "cluster-settings.md"
    assert page.read_text() == settings_page(), "run: python -m forkrl.cluster.settings_page > docs/cluster-settings.md"
