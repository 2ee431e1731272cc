"""A recipe for ``forkrl train``: its tables, except ``[task]``, and the checks across them.

Defaults are the paper's setting (arXiv 2506.01939v2, section 5.2) wherever it has one. The text under a setting is its
help and its entry in docs/recipes.md.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forkrl.config.cluster import ClusterConfig
from forkrl.config.lora import LoraConfig
from forkrl.config.reward import RewardConfig, SandboxConfig
from forkrl.config.sections import FROM_LIST, Count, Decay, Fraction, NonNegative, Positive, PositiveInt, Section, Seed
from forkrl.config.task import TaskConfig
from forkrl.methods import MASKS, OBJECTIVES, WEIGHTS, Clip, mask_of, objective_of

CHANGEABLE = (
    "training.steps", "training.epochs", "eval.*", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best",
    "log.*",
)  # fmt: skip
"""Settings that a resumed run may change: they do not affect finished steps."""


class ModelConfig(Section):
    path: str = "embedded:countdown-base"
    """A local folder, a hub id, or "embedded:countdown-base", the small base model inside the package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products (autocast). Weights and optimizer state are always fp32."""
    head: Literal["auto", "chunked", "triton"] = "auto"
    """Log-probs and entropies of an update by Triton kernels or by chunked matrix products; "auto": Triton for 16-bit
    tensors on a CUDA device."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class RolloutConfig(Section):
    engine: Literal["torch", "vllm"] = "torch"
    """"torch" samples in this process. "vllm" samples with vLLM, in a process that reads the weights being trained: for
    a GPU, and for large models (docs/engines.md)."""
    prompts_per_step: PositiveInt = 512
    """Groups in the loss of one step."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Responses per prompt; their mean is the baseline of their advantages."""
    temperature: Positive = 1.0
    """Sampling temperature; training computes log-probs and entropies at the same temperature."""
    top_p: Fraction = 1.0
    """Nucleus sampling. Below 1 the sampling policy differs from the trained one: a bias that the paper avoids."""
    top_k: Count = 0
    """Sample from the k most likely tokens; 0: all."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are an error."""
    max_response_tokens: PositiveInt = 20480
    """L_max: responses are truncated here."""
    stop: Annotated[tuple[str, ...], FROM_LIST] = ()
    """Additional stop tokens, each a single token; EOS of tokenizer and generation_config.json always stops."""
    max_sequences: PositiveInt = 256
    """Sequences that one worker decodes at once; bounds its KV cache."""
    kv_cache_gib: Positive = 4.0
    """"vllm": the most memory for keys and values, in GiB; sequences that do not fit wait."""

    @model_validator(mode="after")
    def _settings_of_the_engine(self) -> RolloutConfig:
        if self.engine == "torch" and "kv_cache_gib" in self.changed():
            raise ValueError('rollout.kv_cache_gib is read only with rollout.engine = "vllm"; set that, or remove it')
        return self


class DynamicSamplingConfig(Section):
    enabled: bool = True
    """Drop groups whose responses are all right or all wrong, and sample more prompts until the step is full."""
    generation_prompts: Count = 0
    """Prompts sampled at a time; 0: prompts_per_step. The official scripts use 3 x 512."""
    max_generation_batches: PositiveInt = 10
    """After this many batches, train on the groups found so far; if there are none, the run ends with an error."""


Options = dict[str, int | float | bool | str]


def _method(known: Collection[str]) -> AfterValidator:
    """Accepts the names of built-in methods, and functions of users by import path."""

    def check(name: str) -> str:
        if name in known or re.fullmatch(r"[\w.]+:\w+", name):
            return name
        near = difflib.get_close_matches(name, known, n=2)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f'must be one of {", ".join(known)}, or "module:function"{meant}')

    return AfterValidator(check)


class SelectionConfig(Section):
    rule: Annotated[str, _method(MASKS)] = "top_entropy"
    """Which response tokens carry gradient: "all" (plain DAPO), "top_entropy", "bottom_entropy", "random", "threshold",
    "low_probability", "high_probability", "gmts", "proximal_entropy", "rsi", "stapo", or your own function as
    "module:function" (docs/methods.md)."""
    ratio: Fraction = 0.2
    """rho: the fraction that is kept by rules that score tokens."""
    options: Options = Field(default={})
    """Options of the rule (docs/methods.md), such as options.window = 101 of "proximal_entropy"."""
    threshold: NonNegative | None = None
    """rule "threshold" only: keep tokens with at least this entropy, in nats (the paper's 80th percentile: 0.672)."""
    scope: Literal["micro_batch", "mini_batch", "rollout_batch", "sequence"] = "micro_batch"
    """Tokens over which the fraction is taken. The paper: one micro-batch. "mini_batch" does not depend on how it is
    split; "rollout_batch", all tokens of a step, is selected before the first update and needs entropy = "rollout"."""
    entropy: Literal["current", "rollout"] = "current"
    """Entropy of the policy being trained, as in the paper, or of the policy that sampled."""

    @model_validator(mode="after")
    def _threshold_goes_with_its_rule(self) -> SelectionConfig:
        if (self.threshold is None) == (self.rule == "threshold"):
            raise ValueError('selection.threshold goes with selection.rule = "threshold", and only with it')
        return self

    @model_validator(mode="after")
    def _ratio_is_known(self) -> SelectionConfig:
        if self.rule in MASKS and "ratio" in mask_of(self.rule).reads and self.entropy == "rollout":
            raise ValueError(
                f'selection.rule = "{self.rule}" reads the ratio of the current policy to the old one, which is 1 for '
                f'every token with selection.entropy = "rollout"; set entropy = "current"'
            )
        return self

    @model_validator(mode="after")
    def _rollout_batch_is_chosen_before_it_is_trained_on(self) -> SelectionConfig:
        if self.scope == "rollout_batch" and self.entropy == "current":
            raise ValueError(
                'selection.scope = "rollout_batch" selects before the first update, when only the entropy of the '
                'rollout is known; set selection.entropy = "rollout", or scope = "mini_batch"'
            )
        return self


def _require_denominator(value: Any) -> Any:
    if value in ("selected", "response") or (type(value) is int and value >= 1):
        return value
    raise ValueError('must be "selected", "response" or a whole number of at least 1')


Denominator = Annotated[Literal["selected", "response"] | int, BeforeValidator(_require_denominator)]


class WeightsConfig(Section):
    rule: Annotated[str, _method(["none", *WEIGHTS])] = "none"
    """Factors of the advantages of single tokens: "none", "w_reinforce", "entropy_advantage", "proximal_entropy",
    "steer", "stare", "prob_reweight" (docs/methods-weights.md), or your own function as "module:function"
    (docs/methods.md). They are computed over the tokens of selection.scope."""
    options: Options = Field(default={})
    """Options of the rule."""


class LossConfig(Section):
    objective: Annotated[str, _method(OBJECTIVES)] = "dapo"
    """How ratio and advantage make a token's loss: "dapo", "cispo", "dr_grpo", "maxrl", "gspo", "gmpo", "sapo",
    "dppo_tv", "clip_cov", "kl_cov", "hapo", "archer" (docs/methods-objectives.md), or your own function as
    "module:function" (docs/methods.md)."""
    options: Options = Field(default={})
    """Options of the objective."""
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """epsilon_low: where the advantage is negative, ratios below 1 - clip_low carry no gradient."""
    clip_high: NonNegative = 0.28
    """epsilon_high (clip-higher): where the advantage is positive, ratios above 1 + clip_high carry no gradient."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound the loss of negative advantages at dual_clip x |advantage| (the official scripts: 10)."""
    old_logprobs: Literal["sampler", "trainer"] = "sampler"
    """Log-probs in the denominator of the ratio: those that the engine recorded, or those of an additional pass of the
    trained model before the first update of a step (docs/engines.md). On verl always the latter."""
    sampler_correction: Literal["none", "token_truncated", "sequence_truncated", "masked"] = "none"
    """With old_logprobs = "trainer": multiply each token's policy loss by w = p(trainer) / p(sampler), at most
    sampler_cap; by the same of its whole response; or by w, and 0 where w is outside [1 / sampler_cap, sampler_cap]."""
    sampler_cap: Annotated[float, Field(gt=1)] = 2.0
    """Largest weight of sampler_correction."""
    denominator: Denominator = "selected"
    """Divide by the selected tokens (paper v2), by all response tokens (paper v1, TRL) of the mini-batch, or by a fixed
    number such as 8192, so that a token has the same weight in every mini-batch."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL divergence to the starting policy (k3 estimator, mean over all response tokens)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (mean over all response tokens)."""
    entropy_target: NonNegative = 0.0
    """Adaptive entropy bonus: its weight rises after each step whose mean entropy, in nats, is below this, falls after
    the others, and applies below it only (docs/training-control.md); 0: off."""
    entropy_delta: Positive = 0.005
    """Change of the adaptive weight in one step; it starts at 0."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the log-probs of the starting policy."""
        return bool(self.kl_coef) or objective_of(self.objective).reference

    @property
    def entropy_bonus(self) -> bool:
        """Whether a step may have one."""
        return bool(self.entropy_coef or self.entropy_target)

    @model_validator(mode="after")
    def _objective_reads_the_settings(self) -> LossConfig:
        name, objective = self.objective, objective_of(self.objective)
        for clip in get_args(Clip):
            if clip in self.changed() and clip not in objective.clips:
                raise ValueError(
                    f'loss.{clip} = {getattr(self, clip)} is not read by loss.objective = "{name}"; remove it '
                    f"(docs/methods-objectives.md names the settings of the clip)"
                )
        if objective.per_response and "denominator" in self.changed():
            raise ValueError(
                f'loss.denominator = {json.dumps(self.denominator)} is not read by loss.objective = "{name}", which '
                f"averages over the tokens of each response; remove it"
            )
        if objective.fixed_denominator and not isinstance(self.denominator, int):
            raise ValueError(
                f'loss.denominator = "{self.denominator}" counts tokens, but loss.objective = "{name}" divides by a '
                f"constant; set it to training.mini_batch_prompts x rollout.group_size x rollout.max_response_tokens"
            )
        if objective.reference and self.kl_coef:
            raise ValueError(
                f'loss.kl_coef = {self.kl_coef}: loss.objective = "{name}" has a KL penalty of its own; set '
                f"loss.options.kl_coef, and loss.kl_coef to 0"
            )
        if objective.ranks and self.sampler_correction != "none":
            raise ValueError(
                f'loss.sampler_correction = "{self.sampler_correction}" multiplies advantages, by which '
                f'loss.objective = "{name}" ranks tokens; set it to "none"'
            )
        return self

    @model_validator(mode="after")
    def _correction_has_two_log_probs(self) -> LossConfig:
        if self.sampler_correction == "none":
            if "sampler_cap" in self.changed():
                raise ValueError("loss.sampler_cap is read with loss.sampler_correction alone; set that, or remove it")
        elif self.old_logprobs == "sampler":
            raise ValueError(
                f'loss.sampler_correction = "{self.sampler_correction}" weights tokens by the trainer\'s old log-probs '
                f'over the sampler\'s; set loss.old_logprobs = "trainer", or the correction to "none": a ratio to the '
                f"sampler's needs none"
            )
        return self

    @model_validator(mode="after")
    def _one_entropy_bonus(self) -> LossConfig:
        if self.entropy_target and self.entropy_coef:
            raise ValueError(
                f"loss.entropy_target = {self.entropy_target} lets the weight of the entropy bonus follow the entropy, "
                f"and loss.entropy_coef = {self.entropy_coef} is a constant weight; set one of them to 0"
            )
        if not self.entropy_target and "entropy_delta" in self.changed():
            raise ValueError("loss.entropy_delta is read with loss.entropy_target alone; set that, or remove it")
        return self


def check_schedule(settings: Any, gradient_steps: int | None = None) -> None:
    """Raise ValueError for a minimum without a decay, or a warm-up that leaves no gradient step for the decay.

    ``gradient_steps``: of the whole run; None: only the first is checked.
    """
    if settings.schedule == "constant" and settings.min_lr_ratio:
        raise ValueError(
            f"optimizer.min_lr_ratio = {settings.min_lr_ratio} is where a falling rate ends; set optimizer.schedule to "
            f'"linear" or "cosine", or remove it'
        )
    if gradient_steps is not None and settings.schedule != "constant" and settings.warmup_steps >= gradient_steps:
        raise ValueError(
            f"optimizer.warmup_steps = {settings.warmup_steps} leaves no gradient step for optimizer.schedule = "
            f'"{settings.schedule}": the run has {gradient_steps}; lower it, or raise training.steps'
        )


class OptimizerConfig(Section):
    lr: Positive = 1e-6
    """AdamW's learning rate after the warm-up."""
    warmup_steps: Count = 0
    """Gradient steps over which lr rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What lr does after the warm-up: stay, or fall until the end of training.steps (docs/training-control.md)."""
    min_lr_ratio: Decay = 0.0
    """"linear" and "cosine": the share of lr that is left when training.steps are done."""
    weight_decay: NonNegative = 0.1
    """Decoupled, on all parameters (as in the official scripts)."""
    betas: Annotated[tuple[Decay, Decay], FROM_LIST] = (0.9, 0.999)
    """AdamW's decay rates for the averages of the gradient and its square."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Positive = 1.0
    """Gradients with a larger norm are scaled down to it (as in the official scripts)."""

    @model_validator(mode="after")
    def _a_constant_rate_has_no_minimum(self) -> OptimizerConfig:
        check_schedule(self)
        return self


class TrainingConfig(Section):
    steps: PositiveInt = 100
    """Rollout batches to train on."""
    epochs: NonNegative = 0.0
    """End the run after the first step whose sampling/epochs is at least this, or after training.steps; 0: no limit
    (docs/training-control.md)."""
    mini_batch_prompts: PositiveInt = 32
    """Groups per gradient step; there are prompts_per_step / mini_batch_prompts gradient steps per batch."""
    micro_batch_tokens: PositiveInt = 32768
    """Tokens (prompts and responses) that the model processes at once; bounds memory. A prompt counts once for all its
    responses, except with models that need padding (docs/models.md). Changes gradients only with selection.scope =
    "micro_batch"."""
    backward: Literal["dense", "forks_only"] = "dense"
    """"dense" is exact. "forks_only" computes gradients only through the selected tokens and treats the others as
    constants: a faster approximation (docs/forks-only.md)."""


class ForksOnlyConfig(Section):
    """What `training.backward = "forks_only"` adds to its gradient, at a cost (docs/forks-only.md)."""

    projections: bool = False
    """Also train the key and value projections at the other positions, with their input held constant."""
    prompt: bool = False
    """Also compute gradients through the prompt's tokens."""
    sampled: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Also compute gradients through this share of the other tokens, drawn at random and weighted by 1 / sampled: the
    expected gradient is then exact."""
    kept_mib: Count = 1024
    """For a selection over the whole mini-batch: MiB of keys and values that each worker keeps from the entropy pass
    for the gradient pass. The rest is recomputed; results do not change. Has no effect with projections."""


class EvalConfig(Section):
    every: Count = 20
    """Steps between evaluations on held-out prompts; 0: only before and after training."""
    problems: PositiveInt = 512
    """Held-out prompts per evaluation, the same each time."""
    samples: PositiveInt = 1
    """Responses per held-out prompt."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    patience: Count = 0
    """Stop training after this many evaluations in a row without a higher accuracy than before; 0: never
    (docs/training-control.md)."""


class CheckpointConfig(Section):
    kind: Literal["full", "weights", "none"] = "full"
    """"full" can be resumed exactly. "weights" has no optimizer state (a third of the size in fp32 remains) and "none"
    saves nothing, also not at the end: such a run cannot be resumed."""
    every: PositiveInt = 20
    """Steps between checkpoints; the last step and an interruption always save."""
    keep: PositiveInt = 2
    """Checkpoints to keep; older ones are removed once a newer one is complete."""
    merged: bool = False
    """With lora.rank: also write the whole model, with its adapter merged, to step-N/merged."""
    keep_best: bool = False
    """Also save and keep the step with the highest held-out accuracy so far (docs/training-control.md)."""

    @model_validator(mode="after")
    def _the_best_is_saved(self) -> CheckpointConfig:
        if self.keep_best and self.kind == "none":
            raise ValueError(
                'checkpoint.keep_best has nothing to keep with checkpoint.kind = "none"; set it to false, or '
                'the kind to "weights"'
            )
        return self


class LogConfig(Section):
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], FROM_LIST] = ()
    """In addition to metrics.jsonl, which is always written. A tracker that fails is reported once and dropped."""
    rollouts_every: PositiveInt = 10
    """Steps between samples of training responses written to rollouts/."""
    rollouts_sampled: Count = 64
    """Responses per sample."""
    entropy_floor: NonNegative = 0.0
    """Warn, once, of a step whose mean entropy is below this many nats, in the log and in the report; 0: never."""


class RuntimeConfig(Section):
    device: str = "auto"
    """"auto" (an accelerator if there is one), "cpu", "cuda:0", "mps"."""
    threads: Count = 0
    """CPU threads in total; 0: OMP_NUM_THREADS if set, else one per core (docs/threads.md)."""
    trainer: Literal["local", "verl"] = "local"
    """"local" trains in this process. "verl" spreads the same recipe over a Ray cluster (docs/cluster.md); so does
    --trainer verl."""
    workers: Count = 0
    """CPU processes that share weights, work and threads; 0: one per thread for a small model (up to 50M parameters),
    which several threads would slow down, else one. On an accelerator: one."""


class TrainConfig(Section):
    """A recipe for ``forkrl train``."""

    seed: Seed = 0
    """Seed of sampling, data order and evaluation: the same seed, machine, threads and workers give the same bits."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    sandbox: SandboxConfig = SandboxConfig()
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    selection: SelectionConfig = SelectionConfig()
    weights: WeightsConfig = WeightsConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    forks_only: ForksOnlyConfig = ForksOnlyConfig()
    lora: LoraConfig = LoraConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _sizes_agree(self) -> TrainConfig:
        per_step, per_mini = self.rollout.prompts_per_step, self.training.mini_batch_prompts
        if per_step % per_mini:
            raise ValueError(
                f"training.mini_batch_prompts = {per_mini} does not divide rollout.prompts_per_step = {per_step}; "
                f"every gradient step takes the same number of groups"
            )
        if self.reward.overlong_cache >= self.rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong_cache = {self.reward.overlong_cache} is not below rollout.max_response_tokens = "
                f"{self.rollout.max_response_tokens}; every response would be penalised (0 turns the penalty off)"
            )
        if self.task.verifier == "code" and self.sandbox.memory_mb + 256 > self.reward.memory_mb:
            raise ValueError(
                f"sandbox.memory_mb = {self.sandbox.memory_mb} does not fit in reward.memory_mb = "
                f"{self.reward.memory_mb} with 256 to spare; lower the former, or raise the latter"
            )
        if self.runtime.trainer == "local" and (changed := self.cluster.changed()):
            raise ValueError(
                f'cluster.{changed[0]} is for runtime.trainer = "verl"; add --trainer verl, or remove the setting'
            )
        if self.checkpoint.merged and (not self.lora.rank or self.checkpoint.kind == "none"):
            raise ValueError(
                "checkpoint.merged = true needs an adapter and checkpoints; set lora.rank, and checkpoint.kind other "
                'than "none", or drop it'
            )
        exact = self.runtime.trainer == "local" and self.rollout.engine == "torch" and self.model.precision == "fp32"
        if self.loss.sampler_correction != "none" and exact:
            raise ValueError(
                f'loss.sampler_correction = "{self.loss.sampler_correction}": with rollout.engine = "torch" and '
                f'model.precision = "fp32" sampler and trainer compute the same log-probs; set it to "none"'
            )
        if self.checkpoint.keep_best and not self.eval.every:
            raise ValueError(
                "checkpoint.keep_best needs evaluations to choose from; set eval.every above 0, or keep_best to false"
            )
        if self.eval.patience and not self.eval.every:
            raise ValueError(
                f"eval.patience = {self.eval.patience} counts evaluations; set eval.every above 0, or patience to 0"
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if self.training.micro_batch_tokens < longest:
            raise ValueError(
                f"training.micro_batch_tokens = {self.training.micro_batch_tokens} cannot hold one sequence of "
                f"max_prompt_tokens + max_response_tokens = {longest}; raise it, or shorten the responses"
            )
        return self

    @property
    def gradient_steps(self) -> int:
        """Gradient steps of the run if every batch is full."""
        return self.training.steps * (self.rollout.prompts_per_step // self.training.mini_batch_prompts)

    @model_validator(mode="after")
    def _decay_follows_the_warm_up(self) -> TrainConfig:
        check_schedule(self.optimizer, self.gradient_steps)
        return self

    @model_validator(mode="after")
    def _environment_fits(self) -> TrainConfig:
        if self.task.name == "environment":
            if self.training.backward == "forks_only":
                raise ValueError(
                    'training.backward = "forks_only" is not tested with responses that the model wrote in part, as in '
                    'task.name = "environment"; set it to "dense"'
                )
            if self.reward.terms:
                raise ValueError(
                    'reward.terms judge one response, and task.name = "environment" has several turns; let the '
                    "environment compute the whole reward"
                )
        return self

    @model_validator(mode="after")
    def _rewards_can_be_divided_by(self) -> TrainConfig:
        if objective_of(self.loss.objective).advantage == "relative":
            below = f'makes rewards negative, and loss.objective = "{self.loss.objective}" divides by their mean'
            if self.reward.overlong_cache:
                raise ValueError(f"reward.overlong_cache = {self.reward.overlong_cache} {below}; set it to 0")
            for term in self.reward.terms:
                if term.weight < 0:
                    raise ValueError(f"reward.terms ({term.name}): weight = {term.weight} {below}; remove the term")
        return self

    @model_validator(mode="after")
    def _forks_only_fits(self) -> TrainConfig:
        if self.training.backward == "dense":
            if self.forks_only.changed():
                raise ValueError(
                    'forks_only.* is read by training.backward = "forks_only" alone; set that, or remove it'
                )
            return self
        if self.loss.kl_coef or self.loss.entropy_bonus:
            raise ValueError(
                'training.backward = "forks_only" computes gradients of selected tokens only, but loss.kl_coef and '
                "loss.entropy_coef are means over all, and so is the bonus of loss.entropy_target; set all to 0, or "
                'training.backward to "dense"'
            )
        if objective_of(self.loss.objective).all_tokens:
            raise ValueError(
                f'loss.objective = "{self.loss.objective}" reads the log-probs of whole responses, and '
                f'training.backward = "forks_only" computes those of selected tokens only; set it to "dense"'
            )
        if self.model.gradient_checkpointing:
            raise ValueError(
                'training.backward = "forks_only" records keys and values as layers run, and recomputed layers would '
                "record them twice; set model.gradient_checkpointing to false"
            )
        if self.forks_only.projections and self.forks_only.sampled:
            raise ValueError(
                f"forks_only.projections and forks_only.sampled = {self.forks_only.sampled} would count the same "
                f"gradients twice; set one of them"
            )
        selection = self.selection
        ahead = selection.entropy == "current" and (
            selection.rule == "threshold"
            or (selection.scope == "mini_batch" and selection.rule in ("top_entropy", "bottom_entropy"))
        )
        if "kept_mib" in self.forks_only.changed() and (self.forks_only.projections or not ahead):
            raise ValueError(
                f"forks_only.kept_mib = {self.forks_only.kept_mib} is read only for a selection by current entropies "
                f"over the mini-batch, without forks_only.projections; remove it"
            )
        return self
