"""What ForkRL hands to verl is what verl reads: its own configuration files, checks and dataclasses.

Without verl these are skipped; nothing here starts Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkrl.cluster.settings import TABLE, Value, VerlPaths
from forkrl.cluster.translate import override, verl_overrides, verl_settings
from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.model.locations import model_location
from tests.verl_recipes import CPU, recipe

pytestmark = [
    pytest.mark.verl,
    pytest.mark.skipif(find_spec("verl") is None, reason="needs the verl extra"),
    # Raised on import by packages that verl brings.
    pytest.mark.filterwarnings("ignore"),
]

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = sorted(path for path in RECIPES.rglob("*.toml") if not path.stem.endswith("-base"))
ENVIRONMENT = ("environment", "environment_args", "max_turns", "max_turn_tokens", "held_out_rows", "train_prompts")
REFUSED = {
    "countdown": ("dynamic_sampling.generation_prompts", ["dynamic_sampling.generation_prompts=0"]),
    "countdown-fast": ("checkpoint.kind", ["checkpoint.kind=full"]),
    "guess-number": (
        "task.environment",
        ["task.name=countdown", *(f"task.{name}=" for name in ENVIRONMENT)],
    ),
    "gym-curriculum": ("task.curriculum.promote_above", ["task.curriculum="]),
}
"""Shipped recipes that verl cannot do as they are, with what to change."""
NASTY = [
    "/a b",
    "/a,b",
    "/a{b}",
    "/[a]",
    "/(a)",
    "/a'b",
    "/a''b'",
    '/a"b',
    "/a\\b",
    "/a\\'b",
    "/a\\\\'b",
    "/a\\",
    "/a\\\\",
    "/$HOME",
    "/a$",
    "/$(pwd)",
    "/a=b",
    "/a:b",
    "/a#b",
    "/a%b",
    "/a*?",
    "/é中文/🌱",
    "/a\nb",
    "/a\tb",
    "~",
    "",
    " ",
    "null",
    "true",
    "1",
    "1e3",
    "inf",
    "glob(*)",
    "choice(1,2)",
    "@x",
    "+x",
]


def paths(model: str = "/run/model", folder: str = "/run") -> VerlPaths:
    own = Path(folder)
    return VerlPaths(model, own / "train.parquet", own / "held_out.parquet", own / "verifiers.json", own / "verl", own)


def verl_recipe(path: Path) -> TrainConfig:
    return recipe(*(REFUSED[path.stem][1] if path.stem in REFUSED else []), path=path)


@pytest.fixture(scope="module")
def compose() -> Callable[[Sequence[str]], Any]:
    """verl's configuration with overrides, as its own program reads it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    spec = find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations))) / "trainer" / "config"

    def composed(overrides: Sequence[str]) -> Any:
        with initialize_config_dir(str(folder), version_base=None):
            return hydra_compose("ppo_trainer", list(overrides))

    return composed


def plain(value: Any) -> Any:
    """As TOML would have it: paths are text, tuples are lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value


def assert_verl_takes(compose: Callable[[Sequence[str]], Any], config: TrainConfig, where: VerlPaths) -> Any:
    """verl's reading of every setting is ours, and its own checks pass."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    read = compose(verl_overrides(config, where, stop_token_ids=[5, 7]))
    OmegaConf.resolve(read)  # as verl's trainer does, besides the resolving of every access
    for key, value in verl_settings(config, where, stop_token_ids=[5, 7]).items():
        if key.startswith("hydra."):
            continue  # hydra keeps it to itself
        found = OmegaConf.select(read, key.lstrip("+"), throw_on_missing=True)
        found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
        assert (type(found), found) == (type(plain(value)), plain(value)), key
    assert not need_critic(read)
    assert need_reference_policy(read) == (config.loss.kl_coef > 0)
    validate_config(read, use_reference_policy=need_reference_policy(read), use_critic=False)
    for part in (
        read.actor_rollout_ref.actor,
        read.actor_rollout_ref.rollout,
        read.actor_rollout_ref.rollout.checkpoint_engine,
        read.algorithm,
    ):
        omega_conf_to_dataclass(part)
    return read


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: str(path.relative_to(RECIPES)))
def test_verl_takes_every_shipped_recipe(path: Path, compose: Callable[[Sequence[str]], Any]) -> None:
    assert_verl_takes(compose, verl_recipe(path), paths())


@pytest.mark.parametrize("name", REFUSED)
def test_shipped_recipes_that_verl_cannot_do_are_refused_as_they_are(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name][0]):
        verl_overrides(recipe(path=RECIPES / f"{name}.toml"), paths(), stop_token_ids=[])


@pytest.mark.parametrize(
    "overrides",
    [
        (*CPU, "cluster.gpus_per_node=2"),
        (*CPU, "dynamic_sampling.enabled=false", "selection.rule=all", "training.steps=2", "eval.every=0"),
        ("loss.kl_coef=0.01", "loss.dual_clip=3.5", "loss.entropy_coef=-0.001", "eval.temperature=0.0"),
        ("cluster.gpus_per_node=8", "cluster.sequence_parallel=8", "model.precision=bf16", "cluster.offload=true"),
        ("cluster.trainer=colocate_async", "cluster.rollout_engine=sglang", "selection.scope=sequence"),
        ("cluster.nodes=4", "cluster.gpus_per_node=8", "cluster.tensor_parallel=8", "cluster.address=10.0.0.1:6379"),
        ("selection.rule=threshold", "selection.threshold=0.672", "optimizer.betas=[0.9, 0.95]", "optimizer.eps=1e-15"),
        ("seed=2147483647", "rollout.top_k=20", "selection.scope=rollout_batch", "selection.entropy=rollout"),
    ],
    ids=["cpu", "plain", "kl", "ulysses", "async", "nodes", "threshold", "sampling"],
)
def test_verl_takes_recipes_of_many_kinds(overrides: Sequence[str], compose: Callable[[Sequence[str]], Any]) -> None:
    assert_verl_takes(compose, recipe(*overrides), paths())


def test_verl_reads_nasty_paths_as_they_are(compose: Callable[[Sequence[str]], Any]) -> None:
    name = "/runs/a 'b' \"c\", {d} [e] $HOME=é\\"
    assert_verl_takes(compose, recipe(), paths(model=f"{name}/model", folder=name))


def test_verl_loads_the_model_that_it_is_given(compose: Callable[[Sequence[str]], Any]) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    folder = str(model_location("embedded:countdown-base"))
    for overrides, attention in ((CPU, "sdpa"), (("model.precision=bf16",), "flash_attention_2")):
        read = assert_verl_takes(compose, recipe(*overrides), paths(model=folder))
        model = omega_conf_to_dataclass(read.actor_rollout_ref.model)
        assert model.local_path == folder
        assert model.hf_config._attn_implementation == attention
        assert model.use_remove_padding == (attention != "sdpa")


def test_a_users_own_setting_is_read_as_verls_command_line_reads_it(compose: Callable[[Sequence[str]], Any]) -> None:
    own = "cluster.overrides=['actor_rollout_ref.rollout.enforce_eager=true', '+a.b={c: [1, x]}']"
    read = assert_verl_takes(compose, recipe(own), paths())
    assert read.actor_rollout_ref.rollout.enforce_eager is True
    assert read.a.b.c == [1, "x"]


def test_a_setting_that_verl_does_not_have_is_an_error(compose: Callable[[Sequence[str]], Any]) -> None:
    """So a name that verl's files lose fails the tests above."""
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException, match=r"trainer\.total_training_step"):
        compose([override("trainer.total_training_step", 3)])


def test_only_settings_that_verl_does_not_have_are_added_to_it(compose: Callable[[Sequence[str]], Any]) -> None:
    from omegaconf import OmegaConf

    as_it_comes = compose([])
    named = {key for row in TABLE for key in row.verl}
    for key in named:
        section, _, name = key.lstrip("+").rpartition(".")
        parent = OmegaConf.select(as_it_comes, section)
        there = parent is not None and name in list(parent)
        assert there != key.startswith(("+", "hydra.")), key


def read_back(value: Value) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parsed = OverridesParser.create().parse_override(override("a.b", value))
    assert parsed.key_or_group == "a.b"
    assert not parsed.is_sweep_override()
    config = OmegaConf.create({"b": parsed.value()})
    OmegaConf.resolve(config)
    return OmegaConf.to_container(config, resolve=True)["b"]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_comes_back_as_it_was(text: str) -> None:
    assert read_back(text) == text
    assert read_back([text, {"inner": text}]) == [text, {"inner": text}]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("'\"\\${}[],=: ")))
def test_any_text_comes_back_as_it_was_or_is_refused(text: str) -> None:
    if "${" in text or text == "???":
        with pytest.raises(UserError):
            override("a.b", text)
    else:
        assert read_back(text) == text


@pytest.mark.parametrize(
    "value", [True, False, None, 0, -1, 2**40, 0.1, 1e-6, 1e-8, 1e-15, 1.0, float("inf"), [0.9, 0.95], {"eps": 1e-8}]
)
def test_a_value_comes_back_with_its_type(value: Value) -> None:
    found = read_back(value)
    assert (type(found), found) == (type(value), value)
