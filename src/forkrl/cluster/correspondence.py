"""Every setting of a recipe, and what becomes of it under ``runtime.engine = "verl"``.

Tests hold this against the schema of recipes, against what ``translate.py`` emits and against verl's own files;
docs/cluster-settings.md is printed from it (``settings_page.py``).
"""

from __future__ import annotations

from typing import NamedTuple


class Counterpart(NamedTuple):
    """A setting that verl, or ForkRL's plug-in inside verl, is given."""

    recipe: str
    verl: tuple[str, ...]
    """Every setting of verl that follows it; a ``+`` before those that verl's own files do not have."""
    remark: str = ""


class Elsewhere(NamedTuple):
    """A setting that never reaches verl's command line, because ForkRL has acted on it before or acts on it beside."""

    recipe: str
    where: str


class Refusal(NamedTuple):
    """Values of a setting that verl cannot honour."""

    recipe: str
    values: str
    reason: str


class Fixed(NamedTuple):
    """A setting of verl that no recipe changes."""

    verl: str
    value: str
    reason: str


_ACTOR = "actor_rollout_ref.actor."
_REF = "actor_rollout_ref.ref."
_ROLLOUT = "actor_rollout_ref.rollout."
_MODEL = "actor_rollout_ref.model."
_RAY = "ray_kwargs.ray_init."
_STORAGE = "transfer_queue.backend.SimpleStorage."

TRANSLATED = (
    Counterpart(
        "seed",
        ("data.seed", _ROLLOUT + "seed", _ACTOR + "data_loader_seed", _ACTOR + "fsdp_config.seed", "+forkrl.seed"),
        "Of the order of prompts, of sampling, and of dealing responses to mini-batches. vLLM does not repeat itself "
        "bit by bit, whatever the seed",
    ),
    Counterpart(
        "model.precision",
        (
            _ROLLOUT + "dtype",
            f"+{_ACTOR}fsdp_config.mixed_precision",
            f"+{_REF}fsdp_config.mixed_precision",
            _MODEL + "use_remove_padding",
            f"+{_MODEL}override_config.attn_implementation",
        ),
        'Weights and optimizer state stay fp32. "bf16" runs sequences without padding in FlashAttention, which is fast '
        'and needs flash-attn; "fp32" runs them padded with PyTorch\'s own attention',
    ),
    Counterpart("model.gradient_checkpointing", (_MODEL + "enable_gradient_checkpointing",)),
    Counterpart("rollout.prompts_per_step", ("data.train_batch_size",)),
    Counterpart("rollout.group_size", (_ROLLOUT + "n",)),
    Counterpart("rollout.temperature", (_ROLLOUT + "temperature",), "verl takes log-probs and entropies at it as well"),
    Counterpart("rollout.top_p", (_ROLLOUT + "top_p",)),
    Counterpart("rollout.top_k", (_ROLLOUT + "top_k",), "0 becomes -1"),
    Counterpart("rollout.max_prompt_tokens", ("data.max_prompt_length", _ROLLOUT + "max_model_len")),
    Counterpart(
        "rollout.max_response_tokens",
        ("data.max_response_length", _ROLLOUT + "max_model_len"),
        "The model must be declared to handle max_prompt_tokens + max_response_tokens",
    ),
    Counterpart("rollout.max_sequences", (_ROLLOUT + "max_num_seqs",), "Of each copy of the sampling engine"),
    Counterpart("dynamic_sampling.enabled", ("algorithm.filter_groups.enable",)),
    Counterpart(
        "dynamic_sampling.generation_prompts",
        ("algorithm.filter_groups.max_inflight_gen_batches",),
        "verl starts with prompts_per_step and goes on by need, two new prompts for each group dropped; this bounds "
        "how many are under way at once",
    ),
    Counterpart(
        "dynamic_sampling.max_generation_batches",
        ("+forkrl.max_generation_batches",),
        "verl has a setting of that name and does not read it; the plug-in counts in units of prompts_per_step",
    ),
    Counterpart("selection.rule", ("+forkrl.rule",)),
    Counterpart("selection.ratio", ("+forkrl.ratio",)),
    Counterpart("selection.threshold", ("+forkrl.threshold",)),
    Counterpart(
        "selection.scope",
        ("+forkrl.scope",),
        "A micro-batch is what one rank (sequence_parallel GPUs) runs at once, a mini-batch the gradient step of all",
    ),
    Counterpart(
        "selection.entropy",
        ("+forkrl.entropy",),
        '"rollout": of the policy at the start of the step, which with cluster.trainer = "colocate_async" has moved on '
        "from the one that sampled",
    ),
    Counterpart("loss.clip_low", (_ACTOR + "clip_ratio_low",)),
    Counterpart("loss.clip_high", (_ACTOR + "clip_ratio_high",)),
    Counterpart("loss.dual_clip", (_ACTOR + "clip_ratio_c",), "Not set becomes infinity; verl's own default is 3"),
    Counterpart("loss.denominator", ("+forkrl.denominator",)),
    Counterpart("loss.kl_coef", (_ACTOR + "use_kl_loss", _ACTOR + "kl_loss_coef")),
    Counterpart("loss.entropy_coef", (_ACTOR + "entropy_coeff",)),
    Counterpart("optimizer.lr", (_ACTOR + "optim.lr",)),
    Counterpart(
        "optimizer.warmup_steps",
        ("+forkrl.warmup_steps",),
        "In gradient steps, which the plug-in counts; verl's lr_warmup_steps counts rollout batches and stays unset",
    ),
    Counterpart("optimizer.weight_decay", (_ACTOR + "optim.weight_decay",)),
    Counterpart("optimizer.betas", (_ACTOR + "optim.betas",)),
    Counterpart("optimizer.eps", (_ACTOR + "optim.override_optimizer_config",)),
    Counterpart("optimizer.max_grad_norm", (_ACTOR + "optim.clip_grad",), "actor.grad_clip is read by nothing"),
    Counterpart(
        "training.steps",
        ("trainer.total_training_steps", "trainer.total_epochs", "trainer.test_freq"),
        "Epochs never end a run. test_freq follows it where eval.every = 0",
    ),
    Counterpart(
        "training.mini_batch_prompts",
        (_ACTOR + "ppo_mini_batch_size",),
        "A gradient step takes as many responses as that many groups have, drawn from all groups of the step",
    ),
    Counterpart(
        "training.micro_batch_tokens",
        (_ACTOR + "ppo_max_token_len_per_gpu",),
        "Without padding, and divided by cluster.sequence_parallel. A target: verl evens out the work of "
        "micro-batches, so that one may hold somewhat more",
    ),
    Counterpart(
        "eval.every", ("trainer.test_freq",), "0 becomes training.steps: verl evaluates after the last in any case"
    ),
    Counterpart("eval.samples", (_ROLLOUT + "val_kwargs.n",)),
    Counterpart("eval.temperature", (_ROLLOUT + "val_kwargs.temperature", _ROLLOUT + "val_kwargs.do_sample")),
    Counterpart("checkpoint.every", ("trainer.save_freq",), "The last step is saved in any case"),
    Counterpart(
        "checkpoint.keep",
        ("trainer.max_actor_ckpt_to_keep",),
        "verl counts those of the process that runs: a resumed run keeps the ones before it besides",
    ),
    Counterpart("log.rollouts_every", ("+forkrl.rollouts_every",)),
    Counterpart("log.rollouts_sampled", ("+forkrl.rollouts_sampled",)),
    Counterpart(
        "runtime.device",
        (
            "trainer.device",
            _ROLLOUT + "name",
            _ROLLOUT + "agent.num_workers",
            _ACTOR + "use_torch_compile",
            _ACTOR + "fsdp_config.use_torch_compile",
            _REF + "fsdp_config.use_torch_compile",
            f"+{_RAY}runtime_env.env_vars",
            _RAY + "num_cpus",
            f"+{_RAY}num_gpus",
            f"+{_RAY}include_dashboard",
            f"+{_RAY}object_store_memory",
            _STORAGE + "num_data_storage_units",
            "+forkrl.poll_s",
        ),
        '"cpu" is verl without a GPU, for tests: ranks are processes, and ForkRL\'s own sampler decodes',
    ),
    Counterpart("cluster.address", (f"+{_RAY}address",), 'Empty becomes "local"'),
    Counterpart("cluster.nodes", ("trainer.nnodes", _STORAGE + "num_data_storage_units")),
    Counterpart("cluster.gpus_per_node", ("trainer.n_gpus_per_node",)),
    Counterpart("cluster.trainer", ("trainer.v1.trainer_mode",), "The plug-in's trainers of those kinds"),
    Counterpart("cluster.rollout_engine", (_ROLLOUT + "name",)),
    Counterpart("cluster.tensor_parallel", (_ROLLOUT + "tensor_model_parallel_size",)),
    Counterpart(
        "cluster.sequence_parallel",
        (_ACTOR + "ulysses_sequence_parallel_size", _ACTOR + "ppo_max_token_len_per_gpu"),
        "Must divide the model's attention heads",
    ),
    Counterpart("cluster.gpu_memory", (_ROLLOUT + "gpu_memory_utilization",)),
    Counterpart("cluster.offload", (_ACTOR + "fsdp_config.param_offload", _ACTOR + "fsdp_config.optimizer_offload")),
    Counterpart("cluster.reward_workers", ("reward.num_workers",)),
    Counterpart("cluster.patience_s", ("+forkrl.patience_s",)),
)

_PROMPTS = "prompts, written to Parquet as the model reads them"
_VERIFIERS = "verifiers.json, read by the reward workers"

ELSEWHERE = (
    Elsewhere("model.path", "made a folder by the launcher; verl's actor_rollout_ref.model.path"),
    *(
        Elsewhere(f"task.{key}", _PROMPTS)
        for key in (
            "name",
            "data",
            "subset",
            "split",
            "held_out_data",
            "held_out_rows",
            "prompt_column",
            "answer_column",
            "template",
            "chat_template",
            "skip_bad_rows",
            "allow_unknown_tokens",
            "generator",
            "settings",
            "difficulty",
            "train_prompts",
            "question_seed",
            "instruction",
            "parts",
            "parts.source",
        )
    ),
    *(Elsewhere(f"task.{key}", _VERIFIERS) for key in ("verifier", "verifier_options", "strict")),
    Elsewhere("rollout.stop", "+forkrl.stop_token_ids, once the launcher has the tokenizer"),
    *(Elsewhere(f"reward.{key}", _VERIFIERS) for key in ("overlong_cache", "workers", "deadline_s", "memory_mb")),
    *(
        Elsewhere(f"sandbox.{key}", _VERIFIERS)
        for key in (
            "server",
            "python",
            "seconds",
            "total_seconds",
            "memory_mb",
            "output_kb",
            "files_mb",
            "processes",
        )
    ),
    Elsewhere("eval.problems", "how many held-out prompts are written to Parquet"),
    Elsewhere("log.sinks", "fed by the launcher from the run folder"),
    Elsewhere("runtime.engine", "chooses verl"),
    Elsewhere("cluster.overrides", "added to verl's command line as they stand"),
)

_OWN_LOOP = "ForkRL's own loop alone does it"

REFUSED = (
    Refusal("seed", "2^31 and above", "verl's samplers keep it in 32 bits"),
    Refusal("model.revision", "any", "verl takes a folder; download that revision and name its folder in model.path"),
    *(
        Refusal(
            f"task.curriculum.{key}",
            "any",
            "verl draws from all prompts alike, and cannot follow how well the model does",
        )
        for key in ("raise_above", "lower_below", "window", "start", "most")
    ),
    Refusal(
        "task.parts.weight",
        "other proportions than the parts' numbers of rows, by more than one in a hundred",
        "verl draws from all rows alike",
    ),
    Refusal("rollout.cuda_graphs", "true", "of ForkRL's own sampler; verl's decode by graphs of their own"),
    Refusal("rollout.prompts_per_step", "more than there are prompts to train on", "verl counts epochs in whole steps"),
    Refusal(
        "dynamic_sampling.generation_prompts",
        'no multiple of prompts_per_step; more than it with cluster.trainer = "colocate_async"',
        "verl counts in those, and there samples one step ahead",
    ),
    Refusal(
        "training.mini_batch_prompts",
        "times group_size, not divisible by the ranks (GPUs / sequence_parallel)",
        "every rank takes the same number of responses",
    ),
    Refusal("training.micro_batch_tokens", "not divisible by cluster.sequence_parallel", "GPUs share it evenly"),
    Refusal("training.backward", '"forks_only"', _OWN_LOOP),
    *(
        Refusal(f"forks_only.{key}", "any", "goes with training.backward")
        for key in ("projections", "prompt", "sampled", "kept_mib")
    ),
    Refusal("runtime.device", 'other than "auto", "cuda" and "cpu"', "GPUs are taken by cluster.gpus_per_node"),
    Refusal("runtime.threads", "any", "verl's processes are many; OMP_NUM_THREADS counts for each"),
    Refusal("runtime.replicas", "any", "cluster.nodes and gpus_per_node say it"),
    Refusal("cluster.nodes", "more than 1 without cluster.address", "Ray is then started on this machine alone"),
    Refusal("cluster.tensor_parallel", "no divisor of the GPUs, or that does not fit a node", "copies are whole"),
    Refusal(
        "cluster.sequence_parallel",
        "no divisor of the GPUs; above 1 in fp32",
        "it needs FlashAttention, which runs in 16 bits only",
    ),
    Refusal("cluster.overrides", "a setting that this page names as verl's", "the recipe has it"),
    *(
        Refusal(key, f'other than {only} with runtime.device = "cpu"', "the testing platform does not have it")
        for key, only in (
            ("cluster.nodes", "1"),
            ("cluster.tensor_parallel", "1"),
            ("cluster.sequence_parallel", "1"),
            ("cluster.rollout_engine", '"vllm"'),
            ("cluster.offload", "false"),
            ("model.precision", '"fp32"'),
            ("loss.kl_coef", "0"),
        )
    ),
)

_WRITTEN = "written by the launcher"
_DAPO = "arXiv 2506.01939v2"

FIXED = (
    Fixed(_MODEL + "path", "a folder", "model.path"),
    Fixed("data.train_files", "a file of the run", _WRITTEN),
    Fixed("data.val_files", "a file of the run", _WRITTEN),
    Fixed("+forkrl.verifiers", "a file of the run", _WRITTEN),
    Fixed("+forkrl.store.run_folder", "the run folder", "metrics and samples of responses go there"),
    Fixed("+forkrl.stop_token_ids", "of rollout.stop", "with the tokenizer's EOS and those of generation_config.json"),
    Fixed("trainer.default_local_dir", "a folder of the run", "verl's checkpoints"),
    Fixed("hydra.run.dir", "a folder of the run", "hydra's notes would lie in the working folder"),
    Fixed(
        _MODEL + "use_fused_kernels", "false", "the entropies of verl's fused heads have not been compared with ours"
    ),
    Fixed("data.gen_batch_size", "1", "the end of an epoch would be thrown away"),
    Fixed("data.shuffle", "true", "a new order each epoch"),
    Fixed("data.dataloader_num_workers", "0", "a row is only text"),
    Fixed("data.filter_overlong_prompts", "false", "overlong prompts are refused by name, not left out"),
    Fixed("data.truncation", "error", "a cut prompt is another question"),
    Fixed("data.return_raw_chat", "true", "the agent loop reads the text"),
    Fixed(_ROLLOUT + "calculate_log_probs", "true", "the difference between sampler and trainer is measured"),
    Fixed(_ROLLOUT + "val_kwargs.top_p", "1", "evaluation samples from the whole distribution"),
    Fixed(_ROLLOUT + "val_kwargs.top_k", "-1", "likewise"),
    Fixed(_ROLLOUT + "agent.default_agent_loop", "forkrl_exact_prompt", "a prompt is not templated a second time"),
    Fixed("algorithm.adv_estimator", "grpo", "the group is the baseline"),
    Fixed("algorithm.norm_adv_by_std_in_grpo", "true", _DAPO + ", eq. 4"),
    Fixed("algorithm.use_kl_in_reward", "false", "loss.kl_coef is a term of the loss"),
    Fixed("algorithm.rollout_correction.bypass_mode", "false", "it would skip the pass that measures entropies"),
    Fixed("algorithm.filter_groups.metric", "score", 'correctness; "reward" holds the overlong penalty'),
    Fixed(_ACTOR + "strategy", "fsdp2", "what the plug-in's worker is written for"),
    Fixed(_ACTOR + "ppo_epochs", "1", "each response is trained on once"),
    Fixed(
        _ACTOR + "shuffle",
        "true",
        "responses lie in the order in which they ended: the first gradient steps would get the short ones",
    ),
    Fixed(_ACTOR + "use_dynamic_bsz", "true", "micro-batches are counted in tokens"),
    Fixed(_ACTOR + "loss_agg_mode", "token-mean", _DAPO + ", eq. 4; loss.denominator says over which tokens"),
    Fixed(_ACTOR + "kl_loss_type", "low_var_kl", "the k3 estimator"),
    Fixed(_ACTOR + "entropy_from_logits_with_chunking", "true", "entropies in fp32, where bf16 logits would give bf16"),
    Fixed(_ACTOR + "entropy_checkpointing", "true", "memory: nothing is kept for a gradient that is mostly not taken"),
    Fixed(_ACTOR + "fsdp_config.model_dtype", "fp32", "master weights"),
    Fixed(_ACTOR + "optim.optimizer", "AdamW", "as in ForkRL's own loop"),
    Fixed(_ACTOR + "optim.optimizer_impl", "torch.optim", "likewise"),
    Fixed(_ACTOR + "optim.lr_scheduler_type", "constant", "the plug-in sets the rate of every gradient step"),
    Fixed("reward.reward_manager.source", "importlib", "ForkRL's verifiers judge"),
    Fixed("reward.reward_manager.module.path", "pkg://forkrl.cluster.rewards", "likewise"),
    Fixed("reward.reward_manager.name", "ForkRewardManager", "likewise"),
    Fixed("trainer.use_v1", "true", "what the plug-in extends"),
    Fixed("trainer.val_before_train", "true", "as in ForkRL's own loop"),
    Fixed("trainer.resume_mode", "auto", "a second start goes on from the newest checkpoint"),
    Fixed("trainer.logger", "[console]", "log.sinks are the launcher's"),
    Fixed(_STORAGE + "total_storage_size", "null", "no limit: a step holds as many responses as it must"),
)
