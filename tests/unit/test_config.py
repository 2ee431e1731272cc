"""Recipes: every mistake gets one line that names the key, the value and the remedy."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import pytest

from forkrl.config import SftConfig, TrainConfig
from forkrl.config.recipe import load_recipe, recipe_differences, recipe_toml
from forkrl.errors import UserError

MISTAKES = [
    ("loss.clip_hgh=0.3", "loss.clip_hgh is not a setting; did you mean loss.clip_high?"),
    ("selecton.rule=all", "selecton is not a setting; did you mean selection?"),
    ("loss.denominator=tokens", 'loss.denominator = \'tokens\': must be "selected", "response" or a whole number'),
    ("loss.denominator=0", 'loss.denominator = 0: must be "selected", "response" or a whole number of at least 1'),
    ("loss.lr=1", "loss.lr is not a setting; did you mean optimizer.lr?"),
    ("rollout.cuda_graphs=false", 'rollout.cuda_graphs was removed before version 0.1.0; rollout.engine = "vllm"'),
    ("selection.rule=top", "selection.rule = 'top': must be one of all, top_entropy, bottom_entropy, random"),
    ("selection.ratio=1.5", "selection.ratio = 1.5: input should be less than or equal to 1"),
    ("selection.ratio=0", "selection.ratio = 0: input should be greater than 0"),
    ("selection.rule=threshold", 'selection.threshold goes with selection.rule = "threshold"'),
    ("selection.threshold=0.5", 'selection.threshold goes with selection.rule = "threshold"'),
    ("rollout.group_size=1", "rollout.group_size = 1: input should be greater than or equal to 2"),
    ("rollout.group_size=8.5", "rollout.group_size = 8.5: input should be a valid integer"),
    ("rollout.temperature=nan", "rollout.temperature = nan: input should be a finite number"),
    ("optimizer.lr=fast", "optimizer.lr = 'fast': input should be a valid number"),
    ("training.mini_batch_prompts=5", "training.mini_batch_prompts = 5 does not divide rollout.prompts_per_step = 512"),
    ("training.micro_batch_tokens=100", "training.micro_batch_tokens = 100 cannot hold one sequence"),
    ("reward.overlong_cache=20480", "reward.overlong_cache = 20480 is not below rollout.max_response_tokens = 20480"),
    ("task.name=dataset", "task.data is empty"),
    (
        "task.template=hello",
        'task.template is for task.name = "dataset" or "reasoning-gym", but task.name = "countdown"',
    ),
    ("task.data=prompts.jsonl", 'task.data is for task.name = "dataset", but task.name = "countdown"'),
    ("seed=99999999999999999999", "seed = 99999999999999999999: input should be less than 9223372036854775808"),
    ("training.steps=true", "training.steps = True: input should be a valid integer"),
    ("training.epochs=-1", "training.epochs = -1: input should be greater than or equal to 0"),
    ("training.epochs=inf", "training.epochs = inf: input should be a finite number"),
    ('optimizer.lr="1e-3"', "optimizer.lr = '1e-3': input should be a valid number"),
    ('rollout.prompts_per_step="32"', "rollout.prompts_per_step = '32': input should be a valid integer"),
    ("training.mini_batch_prompts=16.0", "training.mini_batch_prompts = 16.0: input should be a valid integer"),
    ('model.gradient_checkpointing="yes"', "model.gradient_checkpointing = 'yes': input should be a valid boolean"),
    ("dynamic_sampling.enabled=1", "dynamic_sampling.enabled = 1: input should be a valid boolean"),
    ("loss=3", "loss = 3: input should be a valid dictionary"),
    ("nonsense", "'nonsense' is not an override; write section.key=value"),
    ("training.steps=15e-1", "training.steps = 1.5: input should be a valid integer"),
    ("log.trackers=tensorbord", "log.trackers.0 = 'tensorbord': input should be 'tensorboard', 'wandb' or 'trackio'"),
    ("rollout.stop=[<x>]", "rollout.stop = '[<x>]': input should be a list"),
    ("optimizer.betas=x", "optimizer.betas = 'x': input should be a list"),
    ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=lambda value: value[:30])
def test_a_mistake_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(TrainConfig, None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[loss]\nclip_low = 0.1\nclip_high = 0.3\n[model]\npath = "there"\n')
    config = load_recipe(
        TrainConfig, recipe, ["loss.clip_high=0.4", 'log.trackers=["tensorboard"]', "model.path=here/x"]
    )
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.dual_clip) == (0.1, 0.4, None)
    assert config.log.trackers == ("tensorboard",)
    assert config.model.path == "here/x"


SHORTHAND: list[tuple[str, str, Any]] = [
    ("training.steps=1e3", "training.steps", 1000),
    ("training.epochs=1.5", "training.epochs", 1.5),
    ("seed=1e18", "seed", 10**18),
    ("optimizer.lr=1e3", "optimizer.lr", 1000.0),
    ("loss.denominator=1e3", "loss.denominator", 1000),
    ("log.trackers=tensorboard", "log.trackers", ("tensorboard",)),
    ("rollout.stop=</answer>", "rollout.stop", ("</answer>",)),
    ('rollout.stop=["a","b"]', "rollout.stop", ("a", "b")),
]


@pytest.mark.parametrize("place", ["command line", "file"])
@pytest.mark.parametrize(("override", "key", "value"), SHORTHAND)
def test_shorthand_is_accepted(place: str, override: str, key: str, value: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = override.partition("=")[2]
    recipe.write_text(f"{key} = {text if text[0] in '[1' else json.dumps(text)}\n")
    config = load_recipe(TrainConfig, *((None, [override]) if place == "command line" else (recipe, [])))
    found = operator.attrgetter(key)(config)
    assert (found, type(found)) == (value, type(value))


def test_shorthand_is_accepted_in_a_part_of_a_mix() -> None:
    part = "{name='reasoning-gym', generator='chain_sum', train_prompts=1e2}"
    config = load_recipe(TrainConfig, None, ["task.name=mix", f"task.parts=[{part}]"])
    assert config.task.parts[0].train_prompts == 100


@pytest.mark.parametrize(
    ("schema", "text", "says"),
    [
        (TrainConfig, "steps = 9\n[data]\n", "this is a recipe for `forkrl sft`, not for `forkrl train`"),
        (SftConfig, "[selection]\nratio = 0.2\n", "this is a recipe for `forkrl train`, not for `forkrl sft`"),
        (TrainConfig, "steps = 9\n[selection]\n", "steps is not a setting; did you mean training.steps?"),
    ],
)
def test_a_recipe_for_the_other_command_is_named(schema: Any, text: str, says: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(schema, recipe)
    assert str(caught.value) == f"{recipe}: {says}"


CLIP = "loss.clip_hgh is not a setting; did you mean loss.clip_high?"
PLACES = [
    ([], f"FILE: {CLIP}; optimizer.lr = 'fast': input should be a valid number"),
    (["seed=4"], f"FILE: {CLIP}; optimizer.lr = 'fast': input should be a valid number"),
    (["optimizer.lr=slow"], f"FILE: {CLIP}; command line: optimizer.lr = 'slow': input should be a valid number"),
    (["seed=x", "loss="], "command line: seed = 'x': input should be a valid integer; FILE: optimizer.lr = 'fast': "),
    (["loss=", "optimizer=", "training.mini_batch_prompts=5"], "command line: training.mini_batch_prompts = 5 does"),
]


@pytest.mark.parametrize(("overrides", "message"), PLACES)
def test_a_mistake_is_named_with_its_place(overrides: list[str], message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[optimizer]\nlr = "fast"\n[loss]\nclip_hgh = 0.3\n')
    with pytest.raises(UserError) as caught:
        load_recipe(TrainConfig, recipe, overrides)
    assert str(caught.value).replace(str(recipe), "FILE").startswith(message)


def test_a_template_without_a_place_for_the_prompt_is_refused() -> None:
    with pytest.raises(UserError, match=r"task.template has no \{prompt\}"):
        load_recipe(TrainConfig, None, ["task.name=dataset", "task.data=x.jsonl", "task.template=hello"])


def test_the_best_checkpoint_of_a_run_without_checkpoints_is_refused() -> None:
    with pytest.raises(
        UserError, match=r'checkpoint.keep_best has nothing to keep with checkpoint.kind = "none"; set it'
    ):
        load_recipe(TrainConfig, None, ["checkpoint.keep_best=true", "checkpoint.kind=none"])
    with pytest.raises(UserError, match=r"checkpoint.keep_best needs evaluations to choose from; set eval.every"):
        load_recipe(TrainConfig, None, ["checkpoint.keep_best=true", "eval.every=0"])
    with pytest.raises(UserError, match=r"eval.patience = 3 counts evaluations; set eval.every above 0"):
        load_recipe(TrainConfig, None, ["eval.patience=3", "eval.every=0"])


def test_an_empty_value_restores_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[loss]\ndual_clip = 10.0\n[optimizer]\nlr = 1\nbetas = [0.8, 0.9]\n")
    config = load_recipe(TrainConfig, recipe, ["loss.dual_clip=", "optimizer.eps="])
    assert (config.loss.dual_clip, config.optimizer.lr, config.optimizer.betas) == (None, 1.0, (0.8, 0.9))


def test_the_config_of_a_run_is_a_recipe(tmp_path: Path) -> None:
    stored = tmp_path / "config.toml"
    stored.write_text('seed = 4\n[rollout]\ncuda_graphs = false\n[provenance]\ntorch = "2.13.0"\n')
    assert load_recipe(TrainConfig, stored).seed == 4, "a removed setting at its default changed nothing"


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: no such recipe"):
        load_recipe(TrainConfig, tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[loss\n")
    with pytest.raises(UserError, match=r"broken\.toml: not valid TOML: .*line 1"):
        load_recipe(TrainConfig, broken)


def test_a_recipe_survives_its_own_toml() -> None:
    config = load_recipe(TrainConfig, None, ["selection.rule=threshold", "selection.threshold=0.672", "seed=7"])
    assert TrainConfig.model_validate(recipe_toml(config)) == config


def test_differences_name_the_key_and_both_values() -> None:
    old, new = TrainConfig(), load_recipe(TrainConfig, None, ["optimizer.lr=2e-6", "selection.ratio=0.1"])
    assert recipe_differences(old, new) == ["selection.ratio: 0.2 -> 0.1", "optimizer.lr: 1e-06 -> 2e-06"]
    assert not recipe_differences(old, TrainConfig())


def test_options_of_a_verifier_are_a_table_of_their_own(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[task]\nname = "dataset"\ndata = "x.jsonl"\n[task.verifier_options]\ntolerance = 0.1\n')
    options = ["task.verifier_options.units.length=m"]
    config = load_recipe(TrainConfig, recipe, options)
    assert config.task.verifier_options == {"tolerance": 0.1, "units": {"length": "m"}}
    assert TrainConfig.model_validate(recipe_toml(config)) == config
    assert recipe_differences(config, load_recipe(TrainConfig, recipe, [])) == [
        "task.verifier_options.units.length: 'm' -> None"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "task.verifier_options.day=2026-01-01",
            "task.verifier_options.day = datetime.date(2026, 1, 1) is not a JSON value; write it as text",
        ),
        ("task.verifier_options=3", "task.verifier_options = 3: input should be a valid dictionary"),
        ("task.verifier=none", 'task.verifier_options are for a verifier, but task.verifier = "none"'),
        ("task.name=countdown", 'task.data is for task.name = "dataset"'),
    ],
)
def test_options_that_no_verifier_could_take_are_refused(override: str, message: str) -> None:
    dataset = ["task.name=dataset", "task.data=x.jsonl", "task.verifier_options.tolerance=1"]
    with pytest.raises(UserError) as caught:
        load_recipe(TrainConfig, None, [*dataset, override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.alpha=8"], "lora.alpha is read only with lora.rank above 0"),
        (["lora.rank=8", "lora.targets=[]"], "lora.targets is empty"),
        (["checkpoint.merged=true"], "checkpoint.merged = true needs an adapter"),
        (
            ["lora.rank=8", "checkpoint.merged=true", "checkpoint.kind=none"],
            "checkpoint.merged = true needs an adapter",
        ),
    ],
)
def test_settings_of_adapters_go_with_a_rank(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(TrainConfig, None, overrides)
