"""+forkrl.* on verl's command line, and the settings of verl under which the selection would not be what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forkrl.errors import UserError
from tests.verl_here import needs_verl

pytestmark = needs_verl


def composed(*overrides: str) -> Any:
    """verl's own configuration with these overrides."""
    import hydra
    import verl

    with hydra.initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return hydra.compose("ppo_trainer", ["actor_rollout_ref.rollout.name=vllm", *overrides])


@pytest.mark.parametrize("module", ["worker", "replay"])
def test_a_module_of_the_plug_in_can_be_what_loads_verl(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import forkrl.cluster.{module}; import forkrl.cluster.trainer"],
        capture_output=True, text=True, env={**os.environ, "VERL_USE_EXTERNAL_MODULES": "forkrl.cluster.plugin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-600:]


def test_two_words_more_are_enough() -> None:
    from forkrl.cluster.options import ForkOptions, read_options, refuse_unsupported

    config = composed("trainer.v1.trainer_mode=forkrl")
    assert read_options(config) == ForkOptions()
    config = composed("trainer.v1.trainer_mode=forkrl", "+forkrl.ratio=0.1", "+forkrl.scope=mini_batch")
    options = read_options(config)
    assert (options.ratio, options.scope, options.rule) == (0.1, "mini_batch", "top_entropy")
    refuse_unsupported(config, options)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+forkrl.ration=0.1", ["+forkrl.*", "ration", "ratio"]),
        ("+forkrl.ratio=1.5", ["+forkrl.*", "ratio", "1.5"]),
        ("+forkrl.ratio=many", ["ratio", "many"]),
        ("+forkrl.rule=best", ["rule", "best", "top_entropy"]),
        ("+forkrl.entropy=current", ["rollout_batch", "+forkrl.entropy"]),
        ("+forkrl.rule=threshold", ["threshold"]),
        ("+forkrl.stop_token_ids=[a]", ["stop_token_ids"]),
        ("+forkrl.min_lr_ratio=0.1", ["+forkrl.min_lr_ratio", "+forkrl.schedule", "linear"]),
    ],
)
def test_an_option_that_makes_no_sense_is_named(override: str, words: list[str]) -> None:
    from forkrl.cluster.options import read_options

    with pytest.raises(UserError) as caught:
        read_options(composed(override))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["algorithm.rollout_correction.bypass_mode=True"], "bypass_mode"),
        (["algorithm.rollout_correction.rollout_rs=token_k1"], "rollout_rs"),
        (["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"], "loss_agg_mode"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=gspo"], "loss_mode"),
        (["actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_type=mse"], "kl_loss_type"),
        (["+forkrl.scope=micro_batch", "actor_rollout_ref.actor.strategy=megatron"], "strategy"),
        (["actor_rollout_ref.actor.optim.lr_scheduler_type=cosine"], "lr_scheduler_type"),
        (["distillation.enabled=True"], "distillation"),
        (["trainer.v1.sampler.custom_sampler.path=mine.py"], "custom_sampler"),
    ],
)
def test_what_the_selection_cannot_live_with_is_refused(overrides: list[str], key: str) -> None:
    from forkrl.cluster.options import read_options, refuse_unsupported

    config = composed(*overrides)
    with pytest.raises(UserError, match=key) as caught:
        refuse_unsupported(config, read_options(config))
    assert "set it to" in str(caught.value) or "drop it" in str(caught.value) or "choose" in str(caught.value)


def test_the_trainer_refuses_before_it_loads_anything(tmp_path: Path) -> None:
    from forkrl.cluster.trainer import ForkTrainerSync

    config = composed("algorithm.rollout_correction.bypass_mode=True", "+forkrl.ratio=0.2")
    with pytest.raises(UserError, match="bypass_mode"):
        ForkTrainerSync(config)


def test_the_three_trainers_are_registered_under_their_names() -> None:
    from verl.trainer.ppo.v1 import get_trainer_cls

    import forkrl.cluster.trainer  # noqa: F401
    from forkrl.cluster.options import MODES

    for name, base in MODES.items():
        assert get_trainer_cls(name).base_mode == base
        assert issubclass(get_trainer_cls(name), get_trainer_cls(base))
