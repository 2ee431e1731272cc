"""A recipe as verl's command line: every setting has a place, and what verl cannot do is refused by name."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forkrl.cluster.settings import ELSEWHERE, REFUSED, TABLE, verl_environment
from forkrl.cluster.translate import override, refuse_untranslatable, verl_command, verl_overrides, verl_settings
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
    "selection.options": (
        ("selection.rule=proximal_entropy",),
        "selection.options={window = 9}",
        [{"window": 9}],
    ),
    "weights.rule": ((), "weights.rule=w_reinforce", ["w_reinforce"]),
    "weights.options": (("weights.rule=w_reinforce",), "weights.options={scale = 0.5}", [{"scale": 0.5}]),
    "loss.objective": (("loss.denominator=8192",), "loss.objective=dr_grpo", ["dr_grpo", False]),
    "loss.options": (("loss.objective=own:loss",), "loss.options={tau = 2}", [{"tau": 2}]),
    "selection.scope": ((), "selection.scope=sequence", ["sequence"]),
    "selection.entropy": ((), "selection.entropy=rollout", ["rollout"]),
    "loss.clip_low": ((), "loss.clip_low=0.1", [0.1]),
    "loss.clip_high": ((), "loss.clip_high=0.4", [0.4]),
    "loss.dual_clip": ((), "loss.dual_clip=10.0", [10.0]),
    "loss.denominator": ((), "loss.denominator=response", ["response"]),
    "loss.sampler_correction": (("loss.old_logprobs=trainer",), "loss.sampler_correction=masked", ["token", "0.5_2.0"]),
    "loss.sampler_cap": (
        ("loss.old_logprobs=trainer", "loss.sampler_correction=sequence_truncated"),
        "loss.sampler_cap=3.0",
        [3.0],
    ),
    "loss.kl_coef": ((), "loss.kl_coef=0.01", [True, 0.01]),
    "loss.entropy_coef": ((), "loss.entropy_coef=0.01", [0.01]),
    "optimizer.lr": ((), "optimizer.lr=3e-6", [3e-06]),
    "optimizer.warmup_steps": ((), "optimizer.warmup_steps=10", [10]),
    "optimizer.schedule": ((), "optimizer.schedule=linear", ["linear"]),
    "optimizer.min_lr_ratio": (("optimizer.schedule=cosine",), "optimizer.min_lr_ratio=0.1", [0.1]),
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
            0.1,
            1,
        ],
    ),
    "cluster.address": ((), "cluster.address=auto", ["auto"]),
    "cluster.nodes": (("cluster.address=auto",), "cluster.nodes=8", [16, 8]),
    "cluster.gpus_per_node": ((), "cluster.gpus_per_node=8", [8]),
    "cluster.trainer": ((), "cluster.trainer=colocate_async", ["forkrl_colocate_async"]),
    "cluster.rollout_engine": ((), "cluster.rollout_engine=sglang", ["sglang"]),
    "cluster.tensor_parallel": (("cluster.gpus_per_node=8",), "cluster.tensor_parallel=4", [4]),
    "cluster.sequence_parallel": (
        ("cluster.gpus_per_node=8", "model.precision=bf16"),
        "cluster.sequence_parallel=4",
        [8192, 4],
    ),
    "cluster.gpu_memory": ((), "cluster.gpu_memory=0.8", [0.8]),
    "cluster.offload": ((), "cluster.offload=true", [True, True]),
    "cluster.reward_workers": ((), "cluster.reward_workers=4", [4]),
    "cluster.stall_timeout_s": ((), "cluster.stall_timeout_s=60.0", [60.0]),
}
"""A change of each setting that verl is given, with what must be set next to it, and the values of verl's settings in
the order of the table. ``selection.threshold`` comes with its rule, and has its own test."""
TRANSLATED = sorted({key for row in TABLE for key in row.recipe})


def verl_names(key: str) -> list[str]:
    """The settings of verl that follow a recipe's setting."""
    return [name for row in TABLE if key in row.recipe for name in row.verl]


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
    placed = {*TRANSLATED, *ELSEWHERE, *(row.recipe for row in REFUSED)}
    wanted = set(leaves(TrainConfig))
    assert wanted - placed == set(), "add them to src/forkrl/cluster/settings.py"
    assert placed - wanted == set(), "no settings of a recipe"


def test_no_setting_is_both_translated_and_handled_elsewhere() -> None:
    assert not set(TRANSLATED) & set(ELSEWHERE)


def test_no_setting_of_verl_is_there_twice() -> None:
    names = [name for row in TABLE for name in row.verl]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("key", [key for key in TRANSLATED if key != "selection.threshold"])
def test_changing_a_setting_changes_its_counterparts_and_nothing_else(key: str) -> None:
    with_it, change, expected = CHANGES[key]
    before, after = settings_of(recipe(*with_it)), settings_of(recipe(*with_it, change))
    changed = {name for name in {**before, **after} if before.get(name, ABSENT) != after.get(name, ABSENT)}
    assert changed == set(verl_names(key))
    assert [after.get(name, ABSENT) for name in verl_names(key)] == expected


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


def test_a_row_without_a_recipe_setting_follows_no_recipe() -> None:
    names = [name for row in TABLE if not row.recipe for name in row.verl]
    recipes = [settings_of(recipe(*setting)) for setting in ((), CPU, ("model.precision=bf16", "seed=3"))]
    assert all({name: given[name] for name in names} == {name: recipes[0][name] for name in names} for given in recipes)


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
    with pytest.raises(ValueError, match="not an identifier"):
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


def test_other_external_modules_are_kept_and_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "mine,forkrl.cluster.plugin")
    assert verl_environment(recipe()) == {"VERL_USE_EXTERNAL_MODULES": "mine,forkrl.cluster.plugin"}


def test_the_page_is_what_the_table_says() -> None:
    folder = Path(__file__).parents[2]
    printed = subprocess.run(
        [sys.executable, "tools/cluster_settings.py"], cwd=folder, check=True, capture_output=True, text=True
    )
    page = (folder / "docs" / "cluster-settings.md").read_text()
    assert page == printed.stdout, "run: python tools/cluster_settings.py > docs/cluster-settings.md"
