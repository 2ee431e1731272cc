"""The method: which tokens carry gradient, what their loss is, and how the weights follow it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from forkrl.config.sections import FROM_LIST, Count, Decay, Fraction, NonNegative, PositiveInt, Section


class SelectionConfig(Section):
    rule: Literal["all", "top_entropy", "bottom_entropy", "random", "threshold"] = "top_entropy"
    """Which response tokens carry gradient. "all" is plain DAPO."""
    ratio: Fraction = 0.2
    """rho: the fraction kept by top_entropy, bottom_entropy and random."""
    threshold: NonNegative | None = None
    """rule "threshold" only: keep tokens of at least this entropy, in nats (the paper's 80th percentile: 0.672)."""
    scope: Literal["micro_batch", "mini_batch", "rollout_batch", "sequence"] = "micro_batch"
    """Over what tokens the fraction is taken. The paper: one micro-batch. "mini_batch" does not depend on the cut;
    "rollout_batch", all tokens of a step, is known before its first update: with entropy = "rollout"."""
    entropy: Literal["current", "rollout"] = "current"
    """Whose entropy: the policy being trained, as in the paper, or the policy that sampled."""

    @model_validator(mode="after")
    def _threshold_goes_with_its_rule(self) -> SelectionConfig:
        if (self.threshold is None) == (self.rule == "threshold"):
            raise ValueError('selection.threshold goes with selection.rule = "threshold", and only with it')
        return self

    @model_validator(mode="after")
    def _rollout_batch_is_chosen_before_it_is_trained_on(self) -> SelectionConfig:
        if self.scope == "rollout_batch" and self.entropy == "current":
            raise ValueError(
                'selection.scope = "rollout_batch" is chosen before the first update, when no other entropy than that '
                'of the rollout is known; set selection.entropy = "rollout", or scope = "mini_batch"'
            )
        return self


def _require_denominator(value: Any) -> Any:
    if value in ("selected", "response") or (type(value) is int and value >= 1):
        return value
    raise ValueError('must be "selected", "response" or a whole number of at least 1')


Denominator = Annotated[Literal["selected", "response"] | int, BeforeValidator(_require_denominator)]


class LossConfig(Section):
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """epsilon_low: below 1 - clip_low a ratio brings no more gradient where the advantage is negative."""
    clip_high: NonNegative = 0.28
    """epsilon_high (clip-higher): the ratio may rise further than it may fall."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound the loss of negative advantages at dual_clip x |advantage| (the official scripts: 10)."""
    denominator: Denominator = "selected"
    """Divide by the selected tokens (paper v2) or by all response tokens (paper v1, TRL) of the mini-batch, or by a
    fixed number such as 8192: long and short responses of all mini-batches then count the same per token."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL divergence to the starting policy (k3 estimator, mean over all response tokens)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (mean over all response tokens)."""


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Learning rate of AdamW, constant after the warm-up."""
    warmup_steps: Count = 0
    """Gradient steps over which lr rises linearly from 0; then it stays constant."""
    weight_decay: NonNegative = 0.1
    """Decoupled, on all parameters (the official scripts')."""
    betas: Annotated[tuple[Decay, Decay], FROM_LIST] = (0.9, 0.999)
    """Decay rates of AdamW's averages of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second average."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are scaled down to this norm (the official scripts')."""


class TrainingConfig(Section):
    steps: PositiveInt = 100
    """Rollout batches to train on."""
    mini_batch_prompts: PositiveInt = 32
    """Groups in one gradient step; prompts_per_step / mini_batch_prompts gradient steps per batch."""
    micro_batch_tokens: PositiveInt = 32768
    """Padded tokens (prompt and response) run through the model at once: bounds memory. It changes no gradient,
    unless the scope of the selection is the micro-batch."""
    backward: Literal["dense", "forks_only"] = "dense"
    """"dense" is exact. "forks_only" runs the selected tokens alone with gradients, the others as constants: faster,
    and an approximation (docs/forks-only.md)."""


class ForksOnlyConfig(Section):
    """Which more of the gradient `training.backward = "forks_only"` keeps, and pays for (docs/forks-only.md)."""

    projections: bool = False
    """Give the projections of keys and values their gradients at the other positions too, their input a constant."""
    prompt: bool = False
    """Run the prompt's tokens with gradients as well."""
    sampled: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """This share of the other tokens, drawn at random, runs with gradients as well, each counting 1 / sampled times:
    on average over draws the gradient is then the exact one."""
    kept_mib: Count = 1024
    """For a selection over the whole mini-batch: keys and values that each worker keeps from the pass that measures
    entropies for the gradient. Those that do not fit are computed again; no number changes. Not with projections, whose
    keys and values hold all that made them."""
