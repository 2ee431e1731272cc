"""``+forkrl.*`` on verl's command line: which tokens carry gradient, and where the run is recorded.

python -m verl.trainer.main_ppo … trainer.v1.trainer_mode=forkrl +forkrl.ratio=0.2 +forkrl.scope=mini_batch
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from forkrl.config import SelectionConfig
from forkrl.config.recipe import parse_recipe
from forkrl.config.sections import FROM_LIST, Count, PositiveInt, Seed
from forkrl.config.train import Denominator
from forkrl.errors import UserError

MODES = {"forkrl": "sync", "forkrl_colocate_async": "colocate_async", "forkrl_separate_async": "separate_async"}
"""Names for ``trainer.v1.trainer_mode``, and verl's trainer that each extends."""


class ForkOptions(SelectionConfig):
    """The plug-in's own settings. Clip range, KL and the rest of the loss stay in verl's."""

    scope: Literal["micro_batch", "mini_batch", "rollout_batch", "sequence"] = "rollout_batch"
    entropy: Literal["current", "rollout"] = "rollout"
    denominator: Denominator = "selected"
    seed: Seed = 0
    """For the rule "random"."""
    warmup_steps: Count = 0
    """Gradient steps over which the learning rate rises. verl's own warm-up counts rollout batches."""
    max_generation_batches: Count = 0
    """Batches of prompts that dynamic sampling may draw for one step; 0: no limit, as in verl."""
    poll_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between checks for sampled responses; verl's is 2."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """A step in which nothing is sampled or judged for this long ends the run."""
    run_folder: str | None = None
    """Where metrics.jsonl and rollouts/ are written, in the form of a local run; not set: nowhere."""
    rollouts_every: PositiveInt = 10
    rollouts_sampled: Count = 64
    stop_token_ids: Annotated[tuple[int, ...], FROM_LIST] = ()
    """Tokens that end a response, in addition to the tokenizer's EOS."""
    verifiers: str | None = None
    """For the reward manager ForkRewardManager: the file that names the verifiers."""

    def stops(self, tokenizer: Any) -> tuple[int, ...]:
        """All tokens that end a response, for the agent loop, the rewards and the trainer."""
        return tuple(dict.fromkeys([tokenizer.eos_token_id, *self.stop_token_ids]))

    @property
    def selection(self) -> SelectionConfig:
        return self


def read_options(config: DictConfig) -> ForkOptions:
    """The options in a configuration of verl's, or their defaults."""
    given: Any = OmegaConf.to_container(config.get("forkrl") or OmegaConf.create({}), resolve=True)
    try:
        return parse_recipe(ForkOptions, given, "+forkrl.*")
    except UserError as error:
        raise UserError(str(error).replace("selection.", "+forkrl.")) from None


def refuse_unsupported(config: DictConfig, options: ForkOptions) -> None:
    """Refuse settings of verl that the selection or the loss does not support, before anything is loaded."""
    actor, correction = config.actor_rollout_ref.actor, config.algorithm.get("rollout_correction") or {}
    loss_mode = (actor.get("policy_loss") or {}).get("loss_mode", "vanilla")
    sampler = (config.trainer.v1.sampler.get("custom_sampler") or {}).get("path")
    for refused, key, value, why in (
        (
            correction.get("bypass_mode", False), "algorithm.rollout_correction.bypass_mode", "true",
            "skips the pass that measures entropies, which the selection needs; set it to false",
        ),
        (
            correction.get("rollout_rs"), "algorithm.rollout_correction.rollout_rs", correction.get("rollout_rs"),
            "removes tokens after they were counted; set it to null (rollout_is weights are honoured)",
        ),
        (
            actor.loss_agg_mode != "token-mean", "actor_rollout_ref.actor.loss_agg_mode", actor.loss_agg_mode,
            "the loss is a mean over tokens; set it to token-mean (+forkrl.denominator selects which tokens count)",
        ),
        (
            loss_mode != "vanilla", "actor_rollout_ref.actor.policy_loss.loss_mode", loss_mode,
            "the plug-in has DAPO's clipped loss; set it to vanilla, or train with trainer.v1.trainer_mode=sync",
        ),
        (
            actor.use_kl_loss and actor.kl_loss_type not in ("low_var_kl", "k3"),
            "actor_rollout_ref.actor.kl_loss_type", actor.kl_loss_type,
            "the plug-in estimates KL by k3; set it to low_var_kl",
        ),
        (
            options.scope == "micro_batch" and actor.strategy not in ("fsdp", "fsdp2"),
            "actor_rollout_ref.actor.strategy", actor.strategy,
            "+forkrl.scope = micro_batch needs FSDP, which tells how a mini-batch is cut; choose fsdp2, or scope "
            "mini_batch",
        ),
        (
            (config.get("distillation") or {}).get("enabled", False), "distillation.enabled", "true",
            "has its own loss; set it to false",
        ),
        (
            sampler, "trainer.v1.sampler.custom_sampler.path", sampler,
            "the plug-in has its own replay buffer; drop it",
        ),
    ):  # fmt: skip
        if refused:
            raise UserError(f"{key} = {value}: {why}")
