"""``+forkrl.*`` on verl's command line: what carries gradient, and where the run is recorded.

python -m verl.trainer.main_ppo … trainer.v1.trainer_mode=forkrl +forkrl.ratio=0.2 +forkrl.scope=mini_batch
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError, model_validator

from forkrl.config import SelectionConfig
from forkrl.config.recipe import parse_recipe
from forkrl.config.sections import FROM_LIST, Count, Fraction, NonNegative, PositiveInt, Section, Seed
from forkrl.errors import UserError

MODES = {"forkrl": "sync", "forkrl_colocate_async": "colocate_async", "forkrl_separate_async": "separate_async"}
"""Names for ``trainer.v1.trainer_mode``, and the trainer of verl's behind each."""
K3 = ("low_var_kl", "k3")


class ForkOptions(Section):
    """The plug-in's own settings. Clip range, KL and the rest of the loss stay where verl has them."""

    rule: Literal["all", "top_entropy", "bottom_entropy", "random", "threshold"] = "top_entropy"
    ratio: Fraction = 0.2
    threshold: NonNegative | None = None
    scope: Literal["rollout_batch", "mini_batch", "micro_batch", "sequence"] = "rollout_batch"
    entropy: Literal["rollout", "current"] = "rollout"
    denominator: Literal["selected", "response"] = "selected"
    seed: Seed = 0
    """Of the rule "random"."""
    warmup_steps: Count = 0
    """Gradient steps over which the learning rate rises. verl's own warm-up counts rollout batches."""
    max_generation_batches: Count = 0
    """Batches of prompts that dynamic sampling may draw for one step; 0: no bound, as in verl."""
    poll_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between two looks at what has been sampled; verl's is 2."""
    patience_s: Annotated[float, Field(gt=0)] = 3600.0
    """A step in which nothing is sampled or judged for so long ends the run."""
    run_folder: str | None = None
    """Where metrics.jsonl and rollouts/ are written, in the form of a local run; not set: nowhere."""
    rollouts_every: PositiveInt = 10
    rollouts_sampled: Count = 64
    stop_token_ids: Annotated[tuple[int, ...], FROM_LIST] = ()
    """Tokens that end a response, in addition to the tokenizer's EOS."""
    verifiers: str | None = None
    """For the reward manager ForkRewardManager: the file that names the verifiers."""

    @model_validator(mode="after")
    def _selection_is_one(self) -> ForkOptions:
        try:
            _ = self.selection
        except ValidationError as error:
            said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise ValueError(said.replace("selection.", "+forkrl.")) from None
        return self

    def stops(self, tokenizer: Any) -> tuple[int, ...]:
        """All tokens that end a response, for the agent loop, the rewards and the trainer."""
        return tuple(dict.fromkeys([tokenizer.eos_token_id, *self.stop_token_ids]))

    @property
    def selection(self) -> SelectionConfig:
        """The same choice as a recipe makes it."""
        return SelectionConfig(
            rule=self.rule, ratio=self.ratio, threshold=self.threshold, scope=self.scope, entropy=self.entropy
        )


def read_options(config: DictConfig) -> ForkOptions:
    """The options in a configuration of verl's, or their defaults.

    Raises:
        UserError: an option that there is not, or a value that it does not take.
    """
    given: Any = OmegaConf.to_container(config.get("forkrl") or OmegaConf.create({}), resolve=True)
    return parse_recipe(ForkOptions, given, "+forkrl.*")


def refuse_unsupported(config: DictConfig, options: ForkOptions) -> None:
    """Refuse, before anything is loaded, the settings of verl under which the selection would not be what it says.

    Raises:
        UserError: naming the setting and what to do.
    """
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    correction = algorithm.get("rollout_correction") or {}
    if correction.get("bypass_mode", False):
        raise UserError(
            "algorithm.rollout_correction.bypass_mode = true skips the pass that measures entropies, which the "
            "selection needs; set it to false"
        )
    if correction.get("rollout_rs"):
        raise UserError(
            f"algorithm.rollout_correction.rollout_rs = {correction['rollout_rs']!r} takes tokens out of the response "
            f"after they were counted; set it to null (rollout_is weights are honoured)"
        )
    if actor.loss_agg_mode != "token-mean":
        raise UserError(
            f"actor_rollout_ref.actor.loss_agg_mode = {actor.loss_agg_mode!r}: the loss is a mean over tokens here; "
            f"set it to token-mean (+forkrl.denominator chooses which tokens count)"
        )
    mode = (actor.get("policy_loss") or {}).get("loss_mode", "vanilla")
    if mode != "vanilla":
        raise UserError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode = {mode!r}: the plug-in brings DAPO's clipped loss; set it "
            f"to vanilla, or train with trainer.v1.trainer_mode=sync"
        )
    if actor.use_kl_loss and actor.kl_loss_type not in K3:
        raise UserError(
            f"actor_rollout_ref.actor.kl_loss_type = {actor.kl_loss_type!r}: the plug-in estimates KL by k3; set it to "
            f"low_var_kl"
        )
    if options.scope == "micro_batch" and actor.strategy not in ("fsdp", "fsdp2"):
        raise UserError(
            f"+forkrl.scope = 'micro_batch' with actor_rollout_ref.actor.strategy = {actor.strategy!r}: only FSDP "
            f"tells how a mini-batch is cut; choose fsdp2, or scope mini_batch"
        )
    if (config.get("distillation") or {}).get("enabled", False):
        raise UserError("distillation.enabled = true has a loss of its own; set it to false")
    sampler = config.trainer.v1.sampler.get("custom_sampler") or {}
    if sampler.get("path"):
        raise UserError(
            f"trainer.v1.sampler.custom_sampler.path = {sampler['path']!r}: the plug-in brings its own replay buffer; "
            f"leave it out"
        )
