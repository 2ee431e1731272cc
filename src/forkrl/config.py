"""Every knob of ForkRL, with its default, its range and its reason. Imports no torch.

``recipe.py`` reads them from a TOML file and from ``section.key=value`` on the command line. Defaults are the paper's
setting (arXiv 2506.01939v2, section 5.2) wherever the paper has one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
FROM_LIST = Field(strict=False)
"""TOML has arrays, not tuples."""
GYM_INSTRUCTION = "Think step by step, then give the final answer alone between <answer> and </answer>."
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of a recipe: unknown keys are refused, values are not coerced across types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _default_of(schema: type[Section], key: str) -> Any:
    return schema.model_fields[key].get_default()


class ModelConfig(Section):
    path: str = "embedded:countdown-base"
    """A local folder, a hub id, or "embedded:countdown-base", the small base model inside the package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products (autocast). Weights and optimizer state are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class CurriculumConfig(Section):
    """Levels of difficulty that follow how well the model does, for a reasoning-gym generator that has them."""

    raise_above: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Go one level up when the mean accuracy of the last `window` groups is above this. Not set: no curriculum."""
    lower_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Go one level down when it is below this. 0: never."""
    window: PositiveInt = 64
    """Groups of responses, all of the present level; after each change of level they are counted anew."""
    start: Count = 0
    """The first level."""
    most: Count | None = None
    """The last level. Not set: the last that the generator has."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> CurriculumConfig:
        if self.raise_above is None:
            changed = [name for name in type(self).model_fields if getattr(self, name) != _default_of(type(self), name)]
            if changed:
                raise ValueError(
                    f"task.curriculum.{changed[0]} has no effect without task.curriculum.raise_above; set that too"
                )
            return self
        if self.lower_below >= self.raise_above:
            raise ValueError(
                f"task.curriculum.lower_below = {self.lower_below} is not below raise_above = {self.raise_above}; "
                f"every window would change the level"
            )
        if self.most is not None and self.most < self.start:
            raise ValueError(f"task.curriculum.most = {self.most} is below start = {self.start}; raise it")
        return self


class TaskConfig(Section):
    name: Literal["countdown", "countdown-validation", "dataset", "reasoning-gym", "mix"] = "countdown"
    """"countdown" makes its own problems; "countdown-validation" evaluates on others than those, for choosing settings;
    "dataset" reads yours; "reasoning-gym" takes one of that package's generators; "mix" mixes several tasks."""
    data: str = ""
    """dataset: a .jsonl or .parquet file, a folder of them, or a hub id."""
    subset: str | None = None
    """dataset: configuration name of a hub data set."""
    split: str = "train"
    """dataset: the split to train on."""
    held_out_data: str = ""
    """dataset: prompts to evaluate on, in the same columns; a hub id may name its split, "owner/name:test". Empty:
    `held_out_rows` rows are kept aside from `data`."""
    held_out_rows: PositiveInt = 256
    """dataset: how many rows to keep aside when `held_out_data` is empty. reasoning-gym: questions to evaluate on."""
    prompt_column: str = "prompt"
    """dataset: column with the question (text or chat messages). Dots reach inside: "reward_model.ground_truth"."""
    answer_column: str = "answer"
    """dataset: column with the gold answer."""
    template: str = "{prompt}"
    """dataset, reasoning-gym: text around the question; {prompt} stands for it."""
    chat_template: bool = False
    """dataset, reasoning-gym: wrap the templated question as a user message with the tokenizer's chat template."""
    verifier: str = "forkrl.rewards.math:verify_math"
    """dataset: import path "module:function" of (answer, response) -> score in [0, 1], or the "http://…" or "https://…"
    address of a server that judges (docs/verifiers.md). "code": the answers are tests of programs, which run in a
    sandbox (docs/code-rewards.md). "none": nothing is judged and no answers are read, for commands that can do
    without."""
    verifier_options: dict[str, Any] = {}
    """dataset: further arguments of the verifier by name, as in task.verifier_options.tolerance = 0.1."""
    generator: str = ""
    """reasoning-gym: the generator's name, such as "chain_sum" (docs/tasks.md lists them)."""
    settings: dict[str, JsonValue] = {}
    """reasoning-gym: the generator's own settings, such as { min_terms = 2, max_terms = 3 }."""
    difficulty: Count | None = None
    """reasoning-gym: a fixed level of the generator's curriculum, from 0. Not set: the generator's own defaults."""
    train_prompts: PositiveInt = 2048
    """reasoning-gym: distinct questions to train on, at each level of a curriculum."""
    question_seed: Seed = 0
    """reasoning-gym: of the questions themselves; `seed` orders them."""
    instruction: str = GYM_INSTRUCTION
    """reasoning-gym: what follows the question inside {prompt}. Only what stands in <answer> tags is judged."""
    strict: bool = False
    """reasoning-gym: only full marks count; the fractions that many scorers give become 0."""
    curriculum: CurriculumConfig = CurriculumConfig()
    parts: Annotated[tuple[PartConfig, ...], FROM_LIST] = ()
    """mix: the tasks, each a table [[task.parts]] with the settings of [task] and those below."""

    @model_validator(mode="after")
    def _settings_go_with_the_name(self) -> TaskConfig:
        for key in TaskConfig.model_fields:
            owners = _TASK_KEYS.get(key, ("dataset",))
            if key != "name" and self.name not in owners and getattr(self, key) != _default_of(TaskConfig, key):
                raise ValueError(
                    f'task.{key} is for task.name = "{owners[0]}", but task.name = "{self.name}"; set task.name too'
                )
        if self.name == "dataset" and not self.data:
            raise ValueError(
                'task.data is empty; name a .jsonl or .parquet file, or a hub data set, for task.name = "dataset"'
            )
        if self.verifier_options and self.verifier == "none":
            raise ValueError('task.verifier_options are for a verifier, but task.verifier = "none"; leave them out')
        for name, value in self.verifier_options.items():
            _require_json(f"task.verifier_options.{name}", value)
        if self.name == "reasoning-gym" and not self.generator:
            raise ValueError(
                'task.generator is empty; name one of reasoning-gym\'s, such as "chain_sum" (docs/tasks.md lists them)'
            )
        if "{prompt}" not in self.template:
            raise ValueError("task.template has no {prompt}; every prompt would be the same text")
        if self.difficulty is not None and self.curriculum.raise_above is not None:
            raise ValueError(
                f"task.difficulty = {self.difficulty} is a fixed level, and task.curriculum changes levels; set one of "
                f"the two (task.curriculum.start is the first level)"
            )
        return self

    @model_validator(mode="after")
    def _parts_are_told_apart(self) -> TaskConfig:
        if self.name != "mix":
            return self
        if not self.parts:
            raise ValueError('task.parts is empty; give a table [[task.parts]] for each task of task.name = "mix"')
        labels = [part.label for part in self.parts]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f'task.parts has two parts called "{twice}"; give one of them another source')
        return self


class PartConfig(TaskConfig):
    """One task of a mix."""

    source: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    """What the part is called in metrics and reports. Empty: after its generator, its data or its name."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the prompts is this over the sum of all weights."""

    @model_validator(mode="after")
    def _is_no_mix(self) -> PartConfig:
        if self.name == "mix":
            raise ValueError("task.name: a part of a mix cannot be a mix; list its parts beside the others")
        if self.verifier == "none":
            raise ValueError('task.verifier = "none" judges nothing, and a mix is trained on')
        return self

    @property
    def label(self) -> str:
        """``source``, or a name made of what the part is."""
        own = {"dataset": Path(self.data).stem if self.data.endswith((".jsonl", ".parquet")) else Path(self.data).name}
        name = self.source or self.generator or own.get(self.name, self.name)
        return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


_TASK_KEYS = {
    **dict.fromkeys(
        (
            "generator",
            "settings",
            "difficulty",
            "train_prompts",
            "question_seed",
            "instruction",
            "strict",
            "curriculum",
        ),
        ("reasoning-gym",),
    ),
    **dict.fromkeys(("held_out_rows", "template", "chat_template"), ("dataset", "reasoning-gym")),
    "parts": ("mix",),
}
"""The tasks that read a setting; those that are not here are for "dataset" alone."""


TaskConfig.model_rebuild()


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 512
    """Groups that enter the loss in one step."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Responses to each prompt; the group is the baseline of its own advantage."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; log-probs and entropies of training are taken at the same temperature."""
    top_p: Fraction = 1.0
    """Nucleus sampling. Below 1 the sampling policy is not the trained one: a bias the paper does not have."""
    top_k: Count = 0
    """Sample among the k likeliest tokens; 0 means all."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are an error that names the row."""
    max_response_tokens: PositiveInt = 20480
    """L_max: a response without a stop token is cut here."""
    stop: Annotated[tuple[str, ...], FROM_LIST] = ()
    """Further stop tokens, each exactly one token of the tokenizer; its EOS always stops."""
    max_sequences: PositiveInt = 256
    """Sequences decoded at once by one replica; bounds its KV cache."""
    cuda_graphs: bool = False
    """Decode by CUDA graphs (docs/engines.md): on a GPU, for Llama, Mistral, Qwen2 and Qwen3. Off because it has not
    run on a GPU yet."""


class RewardConfig(Section):
    overlong_cache: Count = 4096
    """L_cache: within the last L_cache tokens before L_max the reward falls linearly to -1; 0 turns it off."""
    workers: PositiveInt = 1
    """Verifier processes."""
    deadline_s: Annotated[float, Field(gt=0)] = 10.0
    """Wall-clock limit for judging one response; a worker past it is killed and replaced."""
    memory_mb: Annotated[int, Field(ge=64)] = 2048
    """Address space of one verifier process."""


class SandboxConfig(Section):
    """Where and within what limits code rewards run programs (docs/code-rewards.md)."""

    server: str = ""
    """Address of a SandboxFusion server, such as "http://localhost:8080". Empty: bubblewrap, on this machine."""
    python: str = ""
    """Interpreter of the programs, with its standard library alone. Empty: the one that runs ForkRL."""
    seconds: Annotated[float, Field(ge=0.1)] = 6.0
    """CPU time for one test, and half of the wall-clock time that it may take."""
    total_seconds: Annotated[float, Field(ge=0.1)] = 60.0
    """Wall-clock time for all tests of one program; past it the program has failed."""
    memory_mb: Annotated[int, Field(ge=64)] = 1024
    """Memory of one program with all its processes, in MiB; below reward.memory_mb by 256 at least."""
    output_kb: PositiveInt = 16384
    """KiB that a program may print in one test; twice the expected output is allowed in any case."""
    files_mb: PositiveInt = 64
    """MiB of files that a program may have at a time; they are gone after the test."""
    processes: PositiveInt = 32
    """Processes and threads of one program at a time."""


class DynamicSamplingConfig(Section):
    enabled: bool = True
    """Drop groups whose responses are all right or all wrong, and sample on until the step is full."""
    generation_prompts: Count = 0
    """Prompts sampled at a time; 0 means prompts_per_step. The official scripts take 3 x 512."""
    max_generation_batches: PositiveInt = 10
    """After so many, train on the groups at hand; with none at hand the run ends and says why."""


class SelectionConfig(Section):
    rule: Literal["all", "top_entropy", "bottom_entropy", "random", "threshold"] = "top_entropy"
    """Which response tokens carry gradient. "all" is plain DAPO."""
    ratio: Fraction = 0.2
    """rho: the fraction kept by top_entropy, bottom_entropy and random."""
    threshold: NonNegative | None = None
    """rule "threshold" only: keep tokens with entropy of at least so many nats (the paper's 80th percentile: 0.672)."""
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


class LossConfig(Section):
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """epsilon_low: below 1 - clip_low a ratio brings no more gradient where the advantage is negative."""
    clip_high: NonNegative = 0.28
    """epsilon_high (clip-higher): the ratio may rise further than it may fall."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound the loss of negative advantages at dual_clip x |advantage| (the official scripts: 10)."""
    denominator: Literal["selected", "response"] = "selected"
    """Divide by the selected tokens (paper v2) or by all response tokens (paper v1, TRL) of the mini-batch."""
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
    """For a selection over the whole mini-batch: keys and values that each replica keeps from the pass that measures
    entropies for the gradient. Those that do not fit are computed again; no number changes. Not with projections, whose
    keys and values hold all that made them."""


class EvalConfig(Section):
    every: Count = 20
    """Steps between evaluations on held-out prompts; 0: only before and after."""
    problems: PositiveInt = 512
    """Held-out prompts, the same each time."""
    samples: PositiveInt = 1
    """Responses to each."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""


class CheckpointConfig(Section):
    every: PositiveInt = 20
    """Steps between checkpoints; the last step and an interruption always save."""
    keep: PositiveInt = 2
    """Newest checkpoints kept whole; older ones are removed after a newer one is safe."""


class LogConfig(Section):
    sinks: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], FROM_LIST] = ()
    """Besides metrics.jsonl, which is always written. A sink that fails is reported once and dropped."""
    rollouts_every: PositiveInt = 10
    """Steps between samples of training responses written to rollouts/."""
    rollouts_sampled: Count = 64
    """Responses per sample."""


class RuntimeConfig(Section):
    device: str = "auto"
    """"auto" takes an accelerator where there is one; else "cpu", "cuda:0", "mps"."""
    threads: Count = 0
    """CPU threads in all; 0 takes OMP_NUM_THREADS where it is set, else one per core (docs/threads.md)."""
    engine: Literal["local", "verl"] = "local"
    """"local" trains in this process. "verl" spreads the same recipe over a Ray cluster (docs/cluster.md); so does
    --engine verl."""
    replicas: Count = 0
    """Processes on the CPU that share the weights, the work and the threads; 0: one a thread for a small model (up to
    50M parameters), which several threads at once would only slow down, else one. An accelerator takes one."""


class ClusterConfig(Section):
    """How `--engine verl` spreads a run over GPUs and nodes (docs/cluster.md)."""

    address: str = ""
    """A running Ray cluster, "10.0.0.1:6379" or "auto". Empty: Ray is started on this machine for the run."""
    nodes: PositiveInt = 1
    """Machines that train."""
    gpus_per_node: PositiveInt = 1
    """GPUs of each."""
    trainer: Literal["sync", "colocate_async"] = "sync"
    """"sync" samples with the weights it then trains. "colocate_async" samples the next step meanwhile, with older
    weights."""
    rollout_engine: Literal["vllm", "sglang"] = "vllm"
    """What samples on GPUs."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one copy of the model while sampling."""
    sequence_parallel: PositiveInt = 1
    """GPUs that share each sequence while training (Ulysses)."""
    gpu_memory: Fraction = 0.6
    """Share of a GPU's memory that the sampling engine may take."""
    offload: bool = False
    """Keep weights and optimizer state in the host's memory while the GPU does something else."""
    reward_workers: PositiveInt = 1
    """Ray actors that judge, spread over the nodes, each with reward.workers verifier processes."""
    patience_s: Annotated[float, Field(gt=0)] = 3600.0
    """A step in which no response is sampled or judged for so many seconds ends the run: something hangs."""
    overrides: Annotated[tuple[str, ...], FROM_LIST] = ()
    """Further settings of verl, as its command line takes them: "actor_rollout_ref.rollout.max_num_seqs=512". A key
    that ForkRL sets itself is refused."""


class TrainConfig(Section):
    """A recipe for ``forkrl train``."""

    seed: Seed = 0
    """Of sampling, data order and evaluation: the same seed, machine, threads and replicas give the same bits."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    sandbox: SandboxConfig = SandboxConfig()
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    selection: SelectionConfig = SelectionConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    forks_only: ForksOnlyConfig = ForksOnlyConfig()
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
                f"{self.reward.memory_mb} with 256 to spare; raise that, or lower it"
            )
        self._forks_only_fits()
        if self.runtime.engine == "local" and self.cluster != ClusterConfig():
            changed = next(
                key
                for key in ClusterConfig.model_fields
                if getattr(self.cluster, key) != _default_of(ClusterConfig, key)
            )
            raise ValueError(
                f'cluster.{changed} is read by runtime.engine = "verl" alone; add --engine verl, or leave it out'
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if self.training.micro_batch_tokens < longest:
            raise ValueError(
                f"training.micro_batch_tokens = {self.training.micro_batch_tokens} cannot hold one sequence of "
                f"max_prompt_tokens + max_response_tokens = {longest}; raise it, or shorten the responses"
            )
        return self

    def _forks_only_fits(self) -> None:
        if self.training.backward == "dense":
            if self.forks_only != ForksOnlyConfig():
                raise ValueError(
                    'forks_only.* is read by training.backward = "forks_only" alone; set that, or leave the section out'
                )
            return
        if self.loss.kl_coef or self.loss.entropy_coef:
            raise ValueError(
                'training.backward = "forks_only" gives gradients to selected tokens only, and loss.kl_coef and '
                'loss.entropy_coef are means over all; set both to 0, or training.backward to "dense"'
            )
        if self.model.gradient_checkpointing:
            raise ValueError(
                'training.backward = "forks_only" takes keys and values out of layers as they run, which recomputed '
                "layers would do twice; set model.gradient_checkpointing to false"
            )
        if self.forks_only.projections and self.forks_only.sampled:
            raise ValueError(
                f"forks_only.projections and forks_only.sampled = {self.forks_only.sampled} would count the same "
                f"gradients twice; set one of them"
            )
        selection, default = self.selection, ForksOnlyConfig().kept_mib
        ahead = selection.entropy == "current" and (
            selection.rule == "threshold"
            or (selection.scope == "mini_batch" and selection.rule in ("top_entropy", "bottom_entropy"))
        )
        if self.forks_only.kept_mib != default and (self.forks_only.projections or not ahead):
            raise ValueError(
                f"forks_only.kept_mib = {self.forks_only.kept_mib} is read only for a selection by current entropies "
                f"over the mini-batch, without forks_only.projections; leave it out"
            )


class ArchitectureConfig(Section):
    """Shape of a Qwen3 model trained from scratch."""

    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 256
    """Width inside a feed-forward block."""
    num_hidden_layers: PositiveInt = 4
    """Layers, each of attention and a feed-forward block."""
    num_attention_heads: PositiveInt = 4
    """Query heads of a layer."""
    num_key_value_heads: PositiveInt = 2
    """Key and value heads of a layer, each shared by equally many query heads; divides num_attention_heads."""
    head_dim: PositiveInt = 32
    """Width of a head; even, for the rotary embedding."""
    max_position_embeddings: PositiveInt = 512
    """The longest sequence, prompt and response, that the model is declared to handle."""


class SearchHabits(Section):
    """Branches of the random searcher whose traces the base model imitates, as probabilities."""

    give_up: Annotated[float, Field(ge=0, le=1)] = 0.3
    """After a failed try: stop with "?" rather than try again."""
    repeat: Annotated[float, Field(ge=0, le=1)] = 0.25
    """On trying again: do the very same try once more, where an alert searcher takes one it has not tried."""
    skip_check: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Claim success without comparing the result with the target."""
    most_tries: PositiveInt = 12
    """The searcher's patience ends here."""


class SftDataConfig(Section):
    task: Literal["countdown"] = "countdown"
    """Whose search traces to imitate."""
    characters: Annotated[str, Field(min_length=1)] = "0123456789+-*/=,:;!?[] "
    """The alphabet: every character is one token."""
    habits: SearchHabits = SearchHabits()


class SftConfig(Section):
    """A recipe for ``forkrl sft``: next-token training on generated traces, from random weights."""

    seed: Seed = 0
    """Of the first weights and of the traces."""
    data: SftDataConfig = SftDataConfig()
    architecture: ArchitectureConfig = ArchitectureConfig()
    steps: PositiveInt = 3000
    """Gradient steps."""
    batch_tokens: PositiveInt = 16384
    """Tokens of one gradient step."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """The highest learning rate, at the end of the warm-up."""
    final_lr: NonNegative = 1e-4
    """The rate falls to this along a cosine."""
    warmup_steps: Count = 100
    """Gradient steps over which lr rises linearly from 0."""
    weight_decay: NonNegative = 0.1
    """Decoupled, on all parameters."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the matrix products; weights and optimizer state are fp32."""
    eval_problems: PositiveInt = 1000
    """Held-out problems measured for the model card."""
    runtime: RuntimeConfig = RuntimeConfig()


def _require_json(key: str, value: Any) -> None:
    try:
        json.dumps(value)
    except TypeError:
        raise ValueError(
            f"{key} = {value!r} is no text, number, truth value, list or table; write it as text"
        ) from None
