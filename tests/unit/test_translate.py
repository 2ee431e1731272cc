"""A recipe as verl's command line: every setting has a place, and what verl cannot do is refused by name."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forkrl.cluster.correspondence import ELSEWHERE, FIXED, REFUSED, TRANSLATED, Counterpart
from forkrl.cluster.hydra_text import override
from forkrl.cluster.settings_page import settings_page
from forkrl.cluster.translate import (
    refuse_untranslatable,
    verl_command,
    verl_environment,
    verl_overrides,
    verl_settings,
)
from forkrl.config import TrainConfig
from forkrl.config.recipe import item_section
from forkrl.config.sections import Section
from tests.verl_recipes import CPU, ONE_GYM, PATHS, recipe

ABSENT = object()

CHANGES: dict[str, tuple[Sequence[str], str, list[object]]] = {
    "seed": ((), "seed=7", [7, 7, 7, 7, 7]),
    "model.precision": (
        (),
        "model.precision=bf16",
        [
            "bfloat16",
            {"param_dtype": "bf16", "reduce_dtype": "fp32"},
            {"param_dtype": "bf16", "reduce_dtype": "fp32"},
            True,
            ABSENT,
        ],
    ),
    "model.gradient_checkpointing": ((), "model.gradient_checkpointing=true", [True]),
    "task.chat_template": (ONE_GYM, "task.chat_template=true", [False]),
    "rollout.prompts_per_step": ((), "rollout.prompts_per_step=64", [64]),
    "rollout.group_size": ((), "rollout.group_size=4", [4]),
    "rollout.temperature": ((), "rollout.temperature=0.7", [0.7]),
    "rollout.top_p": ((), "rollout.top_p=0.9", [0.9]),
    "rollout.top_k": ((), "rollout.top_k=20", [20]),
    "rollout.max_prompt_tokens": ((), "rollout.max_prompt_tokens=99", [99, 20579]),
    "rollout.max_response_tokens": ((), "rollout.max_response_tokens=5000", [5000, 7048]),
    "rollout.max_sequences": ((), "rollout.max_sequences=33", [33]),
    "dynamic_sampling.enabled": ((), "dynamic_sampling.enabled=false", [False]),
    "dynamic_sampling.generation_prompts": ((), "dynamic_sampling.generation_prompts=1536", [3]),
    "dynamic_sampling.max_generation_batches": ((), "dynamic_sampling.max_generation_batches=3", [3]),
    "selection.rule": ((), "selection.rule=all", ["all"]),
    "selection.ratio": ((), "selection.ratio=0.3", [0.3]),
    "selection.scope": ((), "selection.scope=sequence", ["sequence"]),
    "selection.entropy": ((), "selection.entropy=rollout", ["rollout"]),
    "loss.clip_low": ((), "loss.clip_low=0.1", [0.1]),
    "loss.clip_high": ((), "loss.clip_high=0.4", [0.4]),
    "loss.dual_clip": ((), "loss.dual_clip=10.0", [10.0]),
    "loss.denominator": ((), "loss.denominator=response", ["response"]),
    "loss.kl_coef": ((), "loss.kl_coef=0.01", [True, 0.01]),
    "loss.entropy_coef": ((), "loss.entropy_coef=0.01", [0.01]),
    "optimizer.lr": ((), "optimizer.lr=3e-6", [3e-06]),
    "optimizer.warmup_steps": ((), "optimizer.warmup_steps=10", [10]),
    "optimizer.weight_decay": ((), "optimizer.weight_decay=0.0", [0.0]),
    "optimizer.betas": ((), "optimizer.betas=[0.9, 0.95]", [(0.9, 0.95)]),
    "optimizer.eps": ((), "optimizer.eps=1e-15", [{"eps": 1e-15}]),
    "optimizer.max_grad_norm": ((), "optimizer.max_grad_norm=0.5", [0.5]),
    "training.steps": (("eval.every=0",), "training.steps=7", [7, 7, 7]),
    "training.mini_batch_prompts": ((), "training.mini_batch_prompts=64", [64]),
    "training.micro_batch_tokens": ((), "training.micro_batch_tokens=50000", [50000]),
    "eval.every": ((), "eval.every=3", [3]),
    "eval.samples": ((), "eval.samples=16", [16]),
    "eval.temperature": ((), "eval.temperature=0.0", [0.0, False]),
    "checkpoint.every": ((), "checkpoint.every=3", [3]),
    "checkpoint.keep": ((), "checkpoint.keep=5", [5]),
    "log.rollouts_every": ((), "log.rollouts_every=3", [3]),
    "log.rollouts_sampled": ((), "log.rollouts_sampled=3", [3]),
    "runtime.device": (
        (),
        "runtime.device=cpu",
        [
            "cpu",
            "forkrl_cpu",
            1,
            False,
            False,
            False,
            {
                "VERL_USE_EXTERNAL_MODULES": "forkrl.cluster.plugin",
                "VERL_PLATFORM": "cpu",
                "VERL_ENGINE_DEVICE": "cuda",
            },
            19,
            1,
            False,
            300000000,
            1,
            0.1,
        ],
    ),
    "cluster.address": ((), "cluster.address=auto", ["auto"]),
    "cluster.nodes": (("cluster.address=auto",), "cluster.nodes=8", [8, 16]),
    "cluster.gpus_per_node": ((), "cluster.gpus_per_node=8", [8]),
    "cluster.trainer": ((), "cluster.trainer=colocate_async", ["forkrl_colocate_async"]),
    "cluster.rollout_engine": ((), "cluster.rollout_engine=sglang", ["sglang"]),
    "cluster.tensor_parallel": (("cluster.gpus_per_node=8",), "cluster.tensor_parallel=4", [4]),
    "cluster.sequence_parallel": (
        ("cluster.gpus_per_node=8", "model.precision=bf16"),
        "cluster.sequence_parallel=4",
        [4, 8192],
    ),
    "cluster.gpu_memory": ((), "cluster.gpu_memory=0.8", [0.8]),
    "cluster.offload": ((), "cluster.offload=true", [True, True]),
    "cluster.reward_workers": ((), "cluster.reward_workers=4", [4]),
    "cluster.patience_s": ((), "cluster.patience_s=60.0", [60.0]),
}
"""A change of each setting that is handed on, with what must be set beside it, and what its counterparts then are.
``selection.threshold`` comes with its rule, and has a test of its own."""


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
    beside, change, expected = CHANGES[row.recipe]
    before, after = settings_of(recipe(*beside)), settings_of(recipe(*beside, change))
    changed = {key for key in {**before, **after} if before.get(key, ABSENT) != after.get(key, ABSENT)}
    assert changed == set(row.verl)
    assert [after.get(key, ABSENT) for key in row.verl] == expected


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        ((), "actor_rollout_ref.rollout.top_k", -1),
        ((), "actor_rollout_ref.actor.clip_ratio_c", math.inf),
        ((), "actor_rollout_ref.actor.use_kl_loss", False),
        ((), "actor_rollout_ref.rollout.val_kwargs.do_sample", True),
        ((), "algorithm.filter_groups.max_inflight_gen_batches", 1),
        ((), "trainer.v1.trainer_mode", "forkrl"),
        ((), "+ray_kwargs.ray_init.address", "local"),
        (("eval.every=0", "training.steps=30"), "trainer.test_freq", 30),
        (("dynamic_sampling.generation_prompts=512",), "algorithm.filter_groups.max_inflight_gen_batches", 1),
        (("cluster.nodes=2", "cluster.address=auto"), "transfer_queue.backend.SimpleStorage.num_data_storage_units", 8),
        ((*CPU, "cluster.gpus_per_node=4"), "+ray_kwargs.ray_init.num_gpus", 4),
    ],
)
def test_values_that_verl_writes_otherwise(overrides: Sequence[str], key: str, expected: object) -> None:
    assert settings_of(recipe(*overrides))[key] == expected


def test_what_is_always_set_is_what_the_table_says() -> None:
    of_the_run = {"a folder", "a file of the run", "a folder of the run", "the run folder", "of rollout.stop"}
    given = settings_of(recipe())
    for row in FIXED:
        if row.value not in of_the_run:
            value = given[row.verl]
            shown = f"{value:g}" if isinstance(value, float) else json.dumps(value).replace('"', "")
            assert shown == row.value, row.verl


def test_a_threshold_goes_with_its_rule() -> None:
    given = settings_of(recipe("selection.rule=threshold", "selection.threshold=0.672"))
    assert (given["+forkrl.rule"], given["+forkrl.threshold"]) == ("threshold", 0.672)


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


def test_the_users_own_settings_come_last_and_as_they_stand() -> None:
    own = ["actor_rollout_ref.rollout.enforce_eager=true", "+actor_rollout_ref.rollout.custom={a: [1, 'b c']}"]
    given = verl_overrides(recipe(f"cluster.overrides={own}"), PATHS, stop_token_ids=[])
    assert given[-2:] == own


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
