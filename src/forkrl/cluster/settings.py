"""What verl gets for a recipe and what it does not support, as one table for ``translate.py`` and the docs.

tools/cluster_settings.py prints it as docs/cluster-settings.md. Imports no verl, no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from forkrl.config import TrainConfig
from forkrl.methods import objective_of

Value: TypeAlias = "bool | int | float | str | Path | Sequence[Value] | Mapping[str, Value] | None"
UNSET: Any = ...
"""The value of a setting that a recipe leaves to verl."""
EXTERNAL, PLUGIN = "VERL_USE_EXTERNAL_MODULES", "forkrl.cluster.plugin"
"""verl's variable that lists modules to import, separated by commas, and ForkRL's module."""


class VerlPaths(NamedTuple):
    """Files of a run, as every node sees them. ``train`` and ``held_out`` are Parquet."""

    model: str
    train: Path
    held_out: Path
    verifiers: Path
    checkpoints: Path
    """verl's own, with ``global_step_N`` inside."""
    run_folder: Path


class Run(NamedTuple):
    """Inputs of the settings' values."""

    config: TrainConfig
    paths: VerlPaths
    stop_token_ids: Sequence[int]


class Row(NamedTuple):
    """verl settings that ForkRL sets to the same value."""

    recipe: tuple[str, ...]
    """Recipe settings that determine it; empty for a constant or a path of the run."""
    verl: tuple[str, ...]
    """With a ``+`` before settings that verl's own files lack."""
    value: Callable[[Run], Any]
    remark: str
    shown: str = ""
    """For the docs page: a value that the recipe does not determine."""


def _names(text: str) -> tuple[str, ...]:
    sections = ("actor.", "ref.", "rollout.", "model.")
    return tuple(
        "+" * name.startswith("+") + "actor_rollout_ref." * name.lstrip("+").startswith(sections) + name.lstrip("+")
        for name in text.split()
    )


def _row(recipe: str, verl: str, value: Callable[[TrainConfig], Any] | None = None, remark: str = "") -> Row:
    """A row that depends on the recipe; without a function it copies the recipe's one setting."""

    def of_recipe(run: Run) -> Any:
        return setting(run.config, recipe) if value is None else value(run.config)

    return Row(tuple(recipe.split()), _names(verl), of_recipe, remark)


def _fixed(verl: str, value: Value, remark: str) -> Row:
    return Row((), _names(verl), lambda run: value, remark, json.dumps(value).replace('"', ""))


def _of_run(verl: str, value: Callable[[Run], Value], shown: str, remark: str) -> Row:
    return Row((), _names(verl), value, remark, shown)


def setting(config: TrainConfig, key: str) -> Any:
    """A recipe's setting by name, "section.key"."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def on_cpu(config: TrainConfig) -> bool:
    return config.runtime.device == "cpu"


def _packed(config: TrainConfig) -> bool:
    """Whether sequences run without padding, which needs FlashAttention and so 16 bits."""
    return not on_cpu(config) and config.model.precision == "bf16"


def _own_ray(config: TrainConfig, value: int | bool) -> Any:
    """For a Ray cluster without GPUs: verl's actors reserve cores, and each rank a GPU."""
    return value if on_cpu(config) and not config.cluster.address else UNSET


def verl_environment(config: TrainConfig) -> dict[str, str]:
    """Variables that every verl process needs; Ray passes them on."""
    # With this variable a plug-in that cannot be imported is an error; with the entry point verl ignores it.
    others = [name for name in os.environ.get(EXTERNAL, "").split(",") if name not in ("", PLUGIN)]
    environment = {EXTERNAL: ",".join([*others, PLUGIN])}
    # verl registers FSDP for "cuda" only.
    return environment | ({"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"} if on_cpu(config) else {})


_DAPO = "arXiv 2506.01939v2"
_RAY = "ray_kwargs.ray_init."
_STORAGE = "transfer_queue.backend.SimpleStorage."

TABLE = (
    _row("seed", "data.seed rollout.seed actor.data_loader_seed actor.fsdp_config.seed +forkrl.seed", None,
         "Order of prompts and of responses, and sampling. vLLM is not bit-for-bit reproducible with any seed"),
    _row("model.precision", "rollout.dtype", lambda c: "bfloat16" if c.model.precision == "bf16" else "float32",
         "Weights and optimizer state stay fp32"),
    _row("model.precision", "+actor.fsdp_config.mixed_precision +ref.fsdp_config.mixed_precision",
         lambda c: {"param_dtype": c.model.precision, "reduce_dtype": "fp32"}),
    _row("model.precision", "model.use_remove_padding", _packed,
         '"bf16" runs FlashAttention without padding, which is fast and needs flash-attn'),
    _row("model.precision", "+model.override_config.attn_implementation", lambda c: UNSET if _packed(c) else "sdpa",
         '"fp32" pads sequences and runs PyTorch\'s attention'),
    _row("model.gradient_checkpointing", "model.enable_gradient_checkpointing"),
    _row("rollout.prompts_per_step", "data.train_batch_size"),
    _row("rollout.group_size", "rollout.n"),
    _row("rollout.temperature", "rollout.temperature", None, "verl computes log-probs and entropies at it too"),
    _row("rollout.top_p", "rollout.top_p"),
    _row("rollout.top_k", "rollout.top_k", lambda c: c.rollout.top_k or -1, "0 becomes -1"),
    _row("rollout.max_prompt_tokens", "data.max_prompt_length"),
    _row("rollout.max_response_tokens", "data.max_response_length"),
    _row("rollout.max_prompt_tokens rollout.max_response_tokens", "rollout.max_model_len",
         lambda c: c.rollout.max_prompt_tokens + c.rollout.max_response_tokens,
         "Their sum, which must be within the model's positions"),
    _row("rollout.max_sequences", "rollout.max_num_seqs", None, "Per copy of the sampling engine"),
    _row("dynamic_sampling.enabled", "algorithm.filter_groups.enable"),
    _row("dynamic_sampling.generation_prompts", "algorithm.filter_groups.max_inflight_gen_batches",
         lambda c: max(1, c.dynamic_sampling.generation_prompts // c.rollout.prompts_per_step),
         "verl draws prompts_per_step, then two for each dropped group; this limits how many are in flight"),
    _row("dynamic_sampling.max_generation_batches", "+forkrl.max_generation_batches", None,
         "verl's own setting of that name has no effect; the plug-in counts in units of prompts_per_step"),
    *(_row(f"selection.{name}", f"+forkrl.{name}") for name in ("rule", "ratio", "threshold", "options")),
    _row("weights.rule", "+forkrl.weights.rule"),
    _row("weights.options", "+forkrl.weights.options"),
    _row("loss.objective", "+forkrl.objective"),
    _row("loss.objective", "algorithm.norm_adv_by_std_in_grpo",
         lambda c: objective_of(c.loss.objective).advantage == "standardised", "Dr. GRPO does not divide by it"),
    _row("loss.options", "+forkrl.objective_options"),
    _row("selection.scope", "+forkrl.scope", None,
         "A micro-batch is what one rank (sequence_parallel GPUs) runs at once, a mini-batch one gradient step of all"),
    _row("selection.entropy", "+forkrl.entropy", None,
         '"rollout": the policy before the update; with "colocate_async" newer than the policy that sampled'),
    _row("loss.clip_low", "actor.clip_ratio_low"),
    _row("loss.clip_high", "actor.clip_ratio_high"),
    _row("loss.dual_clip", "actor.clip_ratio_c", lambda c: math.inf if c.loss.dual_clip is None else c.loss.dual_clip,
         "Not set becomes infinity; verl's own default is 3"),
    _row("loss.denominator", "+forkrl.denominator"),
    _row("loss.sampler_correction", "algorithm.rollout_correction.rollout_is",
         lambda c: {"none": None, "sequence_truncated": "sequence"}.get(c.loss.sampler_correction, "token")),
    _row("loss.sampler_correction loss.sampler_cap", "algorithm.rollout_correction.rollout_is_threshold",
         lambda c: f"{1 / c.loss.sampler_cap!r}_{c.loss.sampler_cap!r}" if c.loss.sampler_correction == "masked"
         else c.loss.sampler_cap, 'A pair "lowest_highest" masks'),
    _row("loss.kl_coef", "actor.use_kl_loss", lambda c: c.loss.needs_reference,
         'Also true with loss.objective = "archer", which reads the starting policy'),
    _row("loss.kl_coef", "actor.kl_loss_coef"),
    _row("loss.entropy_coef", "actor.entropy_coeff"),
    _row("optimizer.lr", "actor.optim.lr"),
    _row("optimizer.warmup_steps", "+forkrl.warmup_steps", None,
         "In gradient steps, counted by the plug-in; verl's lr_warmup_steps counts rollout batches and stays unset"),
    _row("optimizer.schedule", "+forkrl.schedule", None,
         "By the plug-in, for every gradient step; verl's lr_scheduler_type has no linear decay and stays constant"),
    _row("optimizer.min_lr_ratio", "+forkrl.min_lr_ratio"),
    _row("optimizer.weight_decay", "actor.optim.weight_decay"),
    _row("optimizer.betas", "actor.optim.betas"),
    _row("optimizer.eps", "actor.optim.override_optimizer_config", lambda c: {"eps": c.optimizer.eps}),
    _row("optimizer.max_grad_norm", "actor.optim.clip_grad", None, "verl does not read actor.grad_clip"),
    _row("training.steps", "trainer.total_training_steps trainer.total_epochs", lambda c: c.training.steps,
         "An epoch has at least one step, so epochs never end a run"),
    _row("eval.every training.steps", "trainer.test_freq", lambda c: c.eval.every or c.training.steps,
         "eval.every = 0 becomes training.steps: verl always evaluates after the last step"),
    _row("training.mini_batch_prompts", "actor.ppo_mini_batch_size", None,
         "A gradient step takes this many groups' number of responses, drawn from all groups of the step"),
    _row("training.micro_batch_tokens cluster.sequence_parallel", "actor.ppo_max_token_len_per_gpu",
         lambda c: c.training.micro_batch_tokens // c.cluster.sequence_parallel,
         "Divided by cluster.sequence_parallel. A target: verl balances micro-batches, and one may hold a few more"),
    _row("eval.samples", "rollout.val_kwargs.n"),
    _row("eval.temperature", "rollout.val_kwargs.temperature"),
    _row("eval.temperature", "rollout.val_kwargs.do_sample", lambda c: c.eval.temperature > 0),
    _row("checkpoint.every", "trainer.save_freq", None, "verl always saves the last step"),
    _row("checkpoint.keep", "trainer.max_actor_ckpt_to_keep", None,
         "verl counts the current process's checkpoints; a resumed run also keeps older ones"),
    _row("log.rollouts_every", "+forkrl.rollouts_every"),
    _row("log.rollouts_sampled", "+forkrl.rollouts_sampled"),
    _row("runtime.device", "trainer.device", lambda c: "cpu" if on_cpu(c) else "cuda",
         '"cpu" is for ForkRL\'s tests: ranks are processes, and ForkRL\'s own sampler decodes'),
    _row("runtime.device cluster.rollout_engine", "rollout.name",
         lambda c: "forkrl_cpu" if on_cpu(c) else c.cluster.rollout_engine),
    _row("runtime.device", "rollout.agent.num_workers", lambda c: 1 if on_cpu(c) else 8),
    _row("runtime.device",
         "actor.use_torch_compile actor.fsdp_config.use_torch_compile ref.fsdp_config.use_torch_compile",
         lambda c: not on_cpu(c)),
    _row("runtime.device", f"+{_RAY}runtime_env.env_vars", verl_environment),
    _row("runtime.device", f"{_RAY}num_cpus",
         lambda c: _own_ray(c, 16 + 2 * c.cluster.gpus_per_node + c.cluster.reward_workers)),
    _row("runtime.device", f"+{_RAY}num_gpus", lambda c: _own_ray(c, c.cluster.gpus_per_node)),
    _row("runtime.device", f"+{_RAY}include_dashboard", lambda c: _own_ray(c, False)),
    _row("runtime.device", f"+{_RAY}object_store_memory", lambda c: _own_ray(c, 300_000_000)),
    _row("runtime.device", "+forkrl.poll_s", lambda c: 0.1 if on_cpu(c) else 2.0),
    _row("runtime.device cluster.nodes", f"{_STORAGE}num_data_storage_units",
         lambda c: 1 if on_cpu(c) else max(8, 2 * c.cluster.nodes)),
    _row("cluster.address", f"+{_RAY}address", lambda c: c.cluster.address or "local",
         'Empty becomes "local", which starts Ray even if RAY_ADDRESS is set'),
    _row("cluster.nodes", "trainer.nnodes"),
    _row("cluster.gpus_per_node", "trainer.n_gpus_per_node"),
    _row("cluster.trainer", "trainer.v1.trainer_mode",
         lambda c: "forkrl" if c.cluster.trainer == "sync" else f"forkrl_{c.cluster.trainer}",
         "The plug-in's trainers of those kinds"),
    _row("cluster.tensor_parallel", "rollout.tensor_model_parallel_size"),
    _row("cluster.sequence_parallel", "actor.ulysses_sequence_parallel_size", None,
         "Must divide the model's attention heads"),
    _row("cluster.gpu_memory", "rollout.gpu_memory_utilization"),
    _row("cluster.offload", "actor.fsdp_config.param_offload actor.fsdp_config.optimizer_offload",
         lambda c: c.cluster.offload),
    _row("cluster.reward_workers", "reward.num_workers"),
    _row("cluster.stall_timeout_s", "+forkrl.stall_timeout_s"),
    _of_run("model.path", lambda r: r.paths.model, "a folder", "model.path"),
    _of_run("data.train_files", lambda r: r.paths.train, "a file of the run", "written by the launcher"),
    _of_run("data.val_files", lambda r: r.paths.held_out, "a file of the run", "written by the launcher"),
    _of_run("+forkrl.verifiers", lambda r: r.paths.verifiers, "a file of the run", "written by the launcher"),
    _of_run("+forkrl.run_folder", lambda r: r.paths.run_folder, "the run folder", "metrics and samples of responses"),
    _of_run("+forkrl.stop_token_ids", lambda r: list(r.stop_token_ids), "from rollout.stop", "and the model's own"),
    _of_run("trainer.default_local_dir", lambda r: r.paths.checkpoints, "a folder of the run", "verl's checkpoints"),
    _of_run("hydra.run.dir", lambda r: r.paths.checkpoints / "hydra", "a folder of the run", "not the working folder"),
    _fixed("model.use_fused_kernels", False, "entropies of verl's fused heads have not been compared with ours"),
    _fixed("data.gen_batch_size", 1, "otherwise verl drops the end of an epoch"),
    _fixed("data.shuffle", True, "a new order each epoch"),
    _fixed("data.dataloader_num_workers", 0, "a row is only text"),
    _fixed("data.filter_overlong_prompts", False, "the launcher rejects overlong prompts by name"),
    _fixed("data.truncation", "error", "a truncated prompt is a different question"),
    _fixed("data.return_raw_chat", True, "the agent loop reads the text"),
    _fixed("rollout.calculate_log_probs", True, "to measure the difference between sampler and trainer"),
    _fixed("rollout.val_kwargs.top_p", 1.0, "evaluation samples from the whole distribution"),
    _fixed("rollout.val_kwargs.top_k", -1, "the same"),
    _fixed("rollout.agent.default_agent_loop", "forkrl_exact_prompt", "does not template a prompt a second time"),
    _fixed("algorithm.adv_estimator", "grpo", "the group is the baseline"),
    _fixed("algorithm.use_kl_in_reward", False, "loss.kl_coef is a term of the loss"),
    _fixed("algorithm.rollout_correction.bypass_mode", False, "it would skip the pass that measures entropies"),
    _fixed("algorithm.filter_groups.metric", "score", 'correctness; "reward" includes the overlong penalty'),
    _fixed("actor.strategy", "fsdp2", "the plug-in's worker is written for it"),
    _fixed("actor.ppo_epochs", 1, "each response is trained on once"),
    _fixed("actor.shuffle", True, "otherwise the first gradient steps would get the responses that ended first"),
    _fixed("actor.use_dynamic_bsz", True, "micro-batches are counted in tokens"),
    _fixed("actor.loss_agg_mode", "token-mean", f"{_DAPO}, eq. 4; loss.denominator selects which tokens"),
    _fixed("actor.kl_loss_type", "low_var_kl", "the k3 estimator"),
    _fixed("actor.entropy_from_logits_with_chunking", True, "entropies in fp32; otherwise in the logits' bf16"),
    _fixed("actor.entropy_checkpointing", True, "saves memory: most entropies need no gradient"),
    _fixed("actor.fsdp_config.model_dtype", "fp32", "master weights"),
    _fixed("actor.optim.optimizer", "AdamW", "as in ForkRL's own loop"),
    _fixed("actor.optim.optimizer_impl", "torch.optim", "as in ForkRL's own loop"),
    _fixed("actor.optim.lr_scheduler_type", "constant", "the plug-in sets the rate of every gradient step"),
    _fixed("reward.reward_manager.source", "importlib", "ForkRL's verifiers score responses"),
    _fixed("reward.reward_manager.module.path", "pkg://forkrl.cluster.rewards", "the same"),
    _fixed("reward.reward_manager.name", "ForkRewardManager", "the same"),
    _fixed("trainer.use_v1", True, "the plug-in extends it"),
    _fixed("trainer.val_before_train", True, "as in ForkRL's own loop"),
    _fixed("trainer.resume_mode", "auto", "a second start resumes from the newest checkpoint"),
    _fixed("trainer.logger", ["console"], "the launcher feeds log.trackers"),
    _fixed(f"{_STORAGE}total_storage_size", None, "no limit on the responses of a step"),
)  # fmt: skip

_PROMPTS, _VERIFIERS = "prompts, written to Parquet as the model reads them", "verifiers.json, read by reward workers"
ELSEWHERE = {
    f"{section}.{name}": where
    for section, names, where in (
        ("model", "path", "made a folder by the launcher; verl's actor_rollout_ref.model.path"),
        ("loss", "old_logprobs", "always the trainer's: verl computes them in the pass that measures entropies"),
        ("task", "name data subset split held_out_data held_out_rows prompt_column answer_column template", _PROMPTS),
        ("task", "chat_template skip_bad_rows allow_unknown_tokens generator settings difficulty", _PROMPTS),
        ("task", "chat_template_kwargs system_prompt few_shot few_shot_response", _PROMPTS),
        ("task", "assistant_prefill", f"{_PROMPTS}; and {_VERIFIERS}"),
        ("task", "train_prompts question_seed instruction parts parts.source", _PROMPTS),
        ("task", "verifier verifier_options strict answer_format", _VERIFIERS),
        ("rollout", "stop", "+forkrl.stop_token_ids, once the launcher has the tokenizer"),
        ("reward", "overlong_cache workers timeout_s memory_mb", _VERIFIERS),
        ("sandbox", "server python seconds total_seconds memory_mb output_kb files_mb processes", _VERIFIERS),
        ("eval", "problems", "number of held-out prompts written to Parquet"),
        ("log", "trackers", "fed by the launcher from the run folder"),
        ("log", "entropy_floor", "compared by the launcher and the report with the run folder's metrics"),
        ("runtime", "trainer", "selects verl"),
        ("cluster", "overrides", "added to verl's command line unchanged"),
    )
    for name in names.split()
}
"""Recipe settings that ForkRL handles itself, before verl starts or while it runs."""


class Refusal(NamedTuple):
    """Values of a setting that verl does not support."""

    recipe: str
    values: str
    why: str
    """The reason, and the remedy where ``refused`` decides."""
    refused: Callable[[TrainConfig], bool] | None = None
    """None: checked by ``require_even_shares``, ``refuse_unsuitable_prompts`` or ``translate.py``."""


_OWN_LOOP = 'only ForkRL\'s own loop (runtime.trainer = "local") supports it'

REFUSED = (
    Refusal("seed", "2^31 and above", "verl's samplers keep it in 32 bits; take one below 2147483648",
            lambda c: c.seed >= 2**31),
    Refusal("model.revision", "any",
            "verl takes a folder; download that revision to a folder, and set model.path to it",
            lambda c: c.model.revision is not None),
    Refusal("model.head", 'other than "auto"', "verl computes log-probs and entropies itself; drop it",
            lambda c: c.model.head != "auto"),
    *(
        Refusal(f"task.curriculum.{name}", "any", "verl draws from all prompts alike, and cannot follow the accuracy")
        for name in ("promote_above", "demote_below", "window", "start", "max_level")
    ),
    Refusal("task.environment", "any", f'{_OWN_LOOP}; set runtime.trainer = "local"',
            lambda c: c.task.name == "environment"),
    *(Refusal(f"task.{name}", "any", "only read with task.environment")
      for name in ("environment_args", "max_turns", "max_turn_tokens")),
    Refusal("task.parts.weight", "other proportions than the parts' numbers of rows, by more than one in a hundred",
            "verl draws from all rows alike"),
    Refusal("rollout.engine", '"vllm"', "verl starts a sampling engine of its own; set it to \"torch\"",
            lambda c: c.rollout.engine == "vllm"),
    Refusal("rollout.kv_cache_gib", "any", "only read with rollout.engine"),
    Refusal("rollout.prompts_per_step", "more than there are prompts to train on", "verl counts epochs in whole steps"),
    Refusal("dynamic_sampling.generation_prompts", "not a multiple of rollout.prompts_per_step",
            "verl counts in units of rollout.prompts_per_step; set it to 0 or to a multiple",
            lambda c: c.dynamic_sampling.generation_prompts % c.rollout.prompts_per_step != 0),
    Refusal("dynamic_sampling.generation_prompts", 'above prompts_per_step with cluster.trainer = "colocate_async"',
        'cluster.trainer = "colocate_async" samples one step ahead; set it to 0',
        lambda c: c.dynamic_sampling.generation_prompts > c.rollout.prompts_per_step and c.cluster.trainer != "sync"),
    Refusal("training.epochs", "above 0", f"{_OWN_LOOP}; set it to 0, and training.steps to the length of the run",
            lambda c: c.training.epochs > 0),
    Refusal("training.mini_batch_prompts", "times group_size, not divisible by the ranks (GPUs / sequence_parallel)",
            "every rank takes the same number of responses"),
    Refusal("training.micro_batch_tokens", "not divisible by cluster.sequence_parallel", "GPUs share it evenly"),
    Refusal(
        "training.backward", '"forks_only"', f'{_OWN_LOOP}; set it to "dense"', lambda c: c.training.backward != "dense"
    ),
    *(
        Refusal(f"forks_only.{name}", "any", "only read with training.backward")
        for name in ("projections", "prompt", "sampled", "kept_mib")
    ),
    Refusal("loss.objective", "maxrl", "verl has no advantage divided by the mean reward; set it to dapo",
            lambda c: objective_of(c.loss.objective).advantage == "relative"),
    Refusal("lora.rank", "above 0", f"{_OWN_LOOP}; drop lora.*", lambda c: c.lora.rank > 0),
    *(Refusal(f"lora.{name}", "any", "only read with lora.rank") for name in ("alpha", "targets")),
    Refusal("checkpoint.merged", "true", "only read with lora.rank"),
    Refusal("loss.entropy_target", "above 0", f"{_OWN_LOOP}; set it to 0, or use a constant loss.entropy_coef",
            lambda c: c.loss.entropy_target > 0),
    Refusal("loss.entropy_delta", "any", "only read with loss.entropy_target"),
    Refusal("checkpoint.keep_best", "true", f"{_OWN_LOOP}; set it to false, and raise checkpoint.keep",
            lambda c: c.checkpoint.keep_best),
    Refusal("reward.terms", "any", f"{_OWN_LOOP}; remove it, or add the terms up in one verifier",
            lambda c: bool(c.reward.terms)),
    *(Refusal(f"reward.terms.{name}", "any", "only read with reward.terms")
      for name in ("name", "verifier", "options", "weight")),
    Refusal("eval.patience", "above 0", f"{_OWN_LOOP}; set it to 0", lambda c: c.eval.patience > 0),
    Refusal("checkpoint.kind", 'other than "full"', f'{_OWN_LOOP}; set it to "full"',
            lambda c: c.checkpoint.kind != "full"),
    Refusal("runtime.device", 'other than "auto", "cuda" and "cpu"',
            'verl takes GPUs by cluster.gpus_per_node; set it to "auto"',
            lambda c: c.runtime.device not in ("auto", "cuda", "cpu")),
    Refusal("runtime.threads", "any", f"{_OWN_LOOP}; drop it, and set OMP_NUM_THREADS on each node if needed",
            lambda c: bool(c.runtime.threads)),
    Refusal("runtime.workers", "any", f"{_OWN_LOOP}; set cluster.nodes and cluster.gpus_per_node",
            lambda c: bool(c.runtime.workers)),
    Refusal("cluster.nodes", "more than 1 without cluster.address",
            "without cluster.address Ray starts on this machine alone; start Ray on every node and set the address, "
            '"auto" on the head node', lambda c: c.cluster.nodes > 1 and not c.cluster.address),
    Refusal("cluster.tensor_parallel", "not a divisor of the GPUs, or does not fit a node", "copies are complete"),
    Refusal("cluster.sequence_parallel", "not a divisor of the GPUs; above 1 in fp32",
            "it needs FlashAttention, which runs in 16 bits only"),
    Refusal("cluster.overrides", "a setting of verl that is on this page", "the recipe sets it"),
    *(
        Refusal(
            key, f'other than {json.dumps(only)} with runtime.device = "cpu"',
            f'runtime.device = "cpu" is for tests and does not support it; set it to {json.dumps(only)}, or drop '
            f"runtime.device",
            lambda c, key=key, only=only: on_cpu(c) and setting(c, key) != only,  # type: ignore[misc]
        )
        for key, only in (
            ("cluster.nodes", 1), ("cluster.tensor_parallel", 1), ("cluster.sequence_parallel", 1),
            ("cluster.rollout_engine", "vllm"), ("cluster.offload", False), ("model.precision", "fp32"),
            ("loss.kl_coef", 0.0),
        )
    ),
)  # fmt: skip
