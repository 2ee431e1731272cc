"""``+forkrl.*`` on verl's command line: selection and recording, with ``trainer.v1.trainer_mode=forkrl``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, model_validator

from forkrl.config import SelectionConfig, WeightsConfig
from forkrl.config.recipe import parse_recipe
from forkrl.config.sections import FROM_LIST, Count, Decay, PositiveInt, Seed
from forkrl.config.train import Denominator, Options, check_schedule
from forkrl.errors import UserError

MODES = {"forkrl": "sync", "forkrl_colocate_async": "colocate_async", "forkrl_separate_async": "separate_async"}
"""Names for ``trainer.v1.trainer_mode``, and the verl trainer that each extends."""
_ACTOR = "actor_rollout_ref.actor"


class ForkOptions(SelectionConfig):
    """The plug-in's own settings. Clip range, KL and the rest of the loss stay in verl's."""

    scope: Literal["micro_batch", "mini_batch", "rollout_batch", "sequence"] = "rollout_batch"
    entropy: Literal["current", "rollout"] = "rollout"
    weights: WeightsConfig = WeightsConfig()
    objective: str = "dapo"
    objective_options: Options = Field(default={})
    denominator: Denominator = "selected"
    seed: Seed = 0
    """For the rule "random"."""
    warmup_steps: Count = 0
    """Gradient steps of learning-rate warm-up. verl's own warm-up counts rollout batches."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up; verl's own schedule must stay constant."""
    min_lr_ratio: Decay = 0.0
    """The share of the learning rate that is left after the last step."""
    max_generation_batches: Count = 0
    """Batches of prompts that dynamic sampling may draw per step; 0: no limit, as in verl."""
    poll_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between checks for sampled responses."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """A step in which nothing is sampled or scored for this long ends the run."""
    run_folder: str | None = None
    """Where metrics.jsonl and rollouts/ are written, as by a local run; None: nowhere."""
    rollouts_every: PositiveInt = 10
    rollouts_sampled: Count = 64
    stop_token_ids: Annotated[tuple[int, ...], FROM_LIST] = ()
    """Tokens that end a response, in addition to the tokenizer's EOS."""
    verifiers: str | None = None
    """Verifier file for ForkRewardManager."""

    @model_validator(mode="after")
    def _a_constant_rate_has_no_minimum(self) -> ForkOptions:
        check_schedule(self)
        return self

    def stops(self, tokenizer: Any) -> tuple[int, ...]:
        """All tokens that end a response."""
        return tuple(dict.fromkeys([tokenizer.eos_token_id, *self.stop_token_ids]))


def read_options(config: DictConfig) -> ForkOptions:
    """The options in a verl configuration, or their defaults."""
    given: Any = OmegaConf.to_container(config.get("forkrl") or OmegaConf.create({}), resolve=True)
    try:
        return parse_recipe(ForkOptions, given, "+forkrl.*")
    except UserError as error:
        raise UserError(str(error).replace("selection.", "+forkrl.").replace("optimizer.", "+forkrl.")) from None


_UNSUPPORTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "algorithm.rollout_correction.bypass_mode", bool,
        "skips the pass that measures entropies, which the selection needs; set it to false",
    ),
    (
        "algorithm.rollout_correction.rollout_is_batch_normalize", bool,
        "weighs every token by the batch's mean weight; set it to false",
    ),
    (
        "algorithm.rollout_correction.rollout_rs", bool,
        "removes tokens after they were counted; set it to null (rollout_is weights are supported)",
    ),
    (
        f"{_ACTOR}.loss_agg_mode", lambda mode: mode != "token-mean",
        "the loss is a mean over tokens; set it to token-mean (+forkrl.denominator selects which tokens count)",
    ),
    (
        f"{_ACTOR}.policy_loss.loss_mode", lambda mode: mode not in (None, "vanilla"),
        "the plug-in has DAPO's clipped loss; set it to vanilla, or train with trainer.v1.trainer_mode=sync",
    ),
    (
        f"{_ACTOR}.optim.lr_scheduler_type", lambda kind: kind not in (None, "constant"),
        "the plug-in sets the rate of every gradient step; set it to constant, and +forkrl.schedule instead",
    ),
    ("distillation.enabled", bool, "has its own loss; set it to false"),
    ("trainer.v1.sampler.custom_sampler.path", bool, "the plug-in has its own replay buffer; drop it"),
)  # fmt: skip
"""verl settings, the values that selection or loss does not support, and why."""
_UNSUPPORTED_KL = (
    f"{_ACTOR}.kl_loss_type", lambda kind: kind not in ("low_var_kl", "k3"),
    "the plug-in estimates KL by k3; set it to low_var_kl",
)  # fmt: skip
_UNSUPPORTED_IN_MICRO_BATCHES = (
    f"{_ACTOR}.strategy", lambda strategy: strategy not in ("fsdp", "fsdp2"),
    "+forkrl.scope = micro_batch needs FSDP, which tells how a mini-batch is cut; choose fsdp2, or scope mini_batch",
)  # fmt: skip


def refuse_unsupported(config: DictConfig, options: ForkOptions) -> None:
    """Raises UserError for unsupported verl settings, before anything is loaded."""
    checks = [*_UNSUPPORTED]
    if config.actor_rollout_ref.actor.use_kl_loss:
        checks.append(_UNSUPPORTED_KL)
    if options.scope == "micro_batch":
        checks.append(_UNSUPPORTED_IN_MICRO_BATCHES)
    for key, is_unsupported, why in checks:
        value = OmegaConf.select(config, key)
        if is_unsupported(value):
            raise UserError(f"{key} = {str(value).lower() if isinstance(value, bool) else value}: {why}")
