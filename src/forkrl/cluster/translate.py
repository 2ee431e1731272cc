"""From a recipe to verl's command line. Imports neither verl, hydra nor torch.

``correspondence.py`` says for every setting of a recipe where it goes; ``refusals.py`` holds what verl cannot do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from forkrl.cluster.hydra_text import Value, overridden_key, override
from forkrl.cluster.refusals import refuse_untranslatable
from forkrl.config import TrainConfig
from forkrl.errors import UserError

__all__ = ["VerlPaths", "refuse_untranslatable", "verl_command", "verl_environment", "verl_overrides"]

ACTOR = "actor_rollout_ref.actor"
REF = "actor_rollout_ref.ref"
ROLLOUT = "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"
RAY = "ray_kwargs.ray_init"
STORAGE = "transfer_queue.backend.SimpleStorage"
PLUGIN = "forkrl.cluster.plugin"


class VerlPaths(NamedTuple):
    """Where a run's files lie, as every node sees them."""

    model: str
    """A folder."""
    train: Path
    """Parquet."""
    held_out: Path
    """Parquet."""
    verifiers: Path
    """verifiers.json."""
    checkpoints: Path
    """verl's own, ``global_step_N`` inside."""
    run_folder: Path


def verl_command(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> list[str]:
    """What to run, with ``verl_environment`` added to the environment."""
    overrides = verl_overrides(config, paths, stop_token_ids=stop_token_ids)
    return [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]


def verl_environment(config: TrainConfig) -> dict[str, str]:
    """Variables that every process of verl needs; Ray hands them on to those it starts."""
    # By this variable a plug-in that cannot be imported is an error; by the entry point verl passes over it in silence.
    environment = {"VERL_USE_EXTERNAL_MODULES": PLUGIN}
    if config.runtime.device == "cpu":
        # FSDP is registered for "cuda" alone.
        environment |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
    return environment


def verl_overrides(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> list[str]:
    """verl's settings for a recipe, followed by the user's own.

    Args:
        config: the recipe.
        paths: the files of this run.
        stop_token_ids: all that end a response (``stop_tokens.stop_token_ids``).

    Raises:
        UserError: a setting that verl cannot honour, or an override of one that ForkRL sets.
    """
    refuse_untranslatable(config)
    settings = verl_settings(config, paths, stop_token_ids=stop_token_ids)
    _refuse_contradiction(config.cluster.overrides, settings)
    return [override(key, value) for key, value in settings.items()] + [
        text.strip() for text in config.cluster.overrides
    ]


def verl_settings(config: TrainConfig, paths: VerlPaths, *, stop_token_ids: Sequence[int]) -> dict[str, Value]:
    """Every setting of verl that ForkRL sets, in the order of its command line."""
    return {
        **_model(config, paths),
        **_data(config, paths),
        **_rollout(config),
        **_algorithm(config),
        **_actor(config),
        **_optimizer(config),
        **_reward(config),
        **_trainer(config, paths),
        **_ray(config),
        **_forkrl(config, paths, stop_token_ids),
    }


def _on_cpu(config: TrainConfig) -> bool:
    return config.runtime.device == "cpu"


def _packed(config: TrainConfig) -> bool:
    """Whether sequences are run end to end without padding: FlashAttention does, and only in 16 bits."""
    return not _on_cpu(config) and config.model.precision == "bf16"


def _model(config: TrainConfig, paths: VerlPaths) -> dict[str, Value]:
    settings: dict[str, Value] = {
        f"{MODEL}.path": paths.model,
        f"{MODEL}.enable_gradient_checkpointing": config.model.gradient_checkpointing,
        f"{MODEL}.use_remove_padding": _packed(config),
        # verl's fused heads give log-probs and entropies without logits; their entropies have not been compared here.
        f"{MODEL}.use_fused_kernels": False,
    }
    if not _packed(config):
        settings[f"+{MODEL}.override_config.attn_implementation"] = "sdpa"
    return settings


def _data(config: TrainConfig, paths: VerlPaths) -> dict[str, Value]:
    return {
        "data.train_files": paths.train,
        "data.val_files": paths.held_out,
        "data.train_batch_size": config.rollout.prompts_per_step,
        # One by one, so that the end of an epoch is not thrown away; dynamic sampling takes them so in any case.
        "data.gen_batch_size": 1,
        "data.max_prompt_length": config.rollout.max_prompt_tokens,
        "data.max_response_length": config.rollout.max_response_tokens,
        "data.shuffle": True,
        "data.seed": config.seed,
        "data.dataloader_num_workers": 0,  # a row is only text
        "data.filter_overlong_prompts": False,  # the launcher refuses them by name
        "data.truncation": "error",
        "data.return_raw_chat": True,
    }


def _rollout(config: TrainConfig) -> dict[str, Value]:
    rollout, cluster = config.rollout, config.cluster
    return {
        f"{ROLLOUT}.name": "forkrl_cpu" if _on_cpu(config) else cluster.rollout_engine,
        f"{ROLLOUT}.n": rollout.group_size,
        f"{ROLLOUT}.temperature": rollout.temperature,
        f"{ROLLOUT}.top_p": rollout.top_p,
        f"{ROLLOUT}.top_k": rollout.top_k or -1,
        f"{ROLLOUT}.max_num_seqs": rollout.max_sequences,
        f"{ROLLOUT}.max_model_len": rollout.max_prompt_tokens + rollout.max_response_tokens,
        f"{ROLLOUT}.dtype": "bfloat16" if config.model.precision == "bf16" else "float32",
        f"{ROLLOUT}.seed": config.seed,
        f"{ROLLOUT}.tensor_model_parallel_size": cluster.tensor_parallel,
        f"{ROLLOUT}.gpu_memory_utilization": cluster.gpu_memory,
        f"{ROLLOUT}.calculate_log_probs": True,
        f"{ROLLOUT}.val_kwargs.n": config.eval.samples,
        f"{ROLLOUT}.val_kwargs.temperature": config.eval.temperature,
        f"{ROLLOUT}.val_kwargs.do_sample": config.eval.temperature > 0,
        # From the whole distribution, whatever training's responses are cut to.
        f"{ROLLOUT}.val_kwargs.top_p": 1.0,
        f"{ROLLOUT}.val_kwargs.top_k": -1,
        f"{ROLLOUT}.agent.default_agent_loop": "forkrl_exact_prompt",
        f"{ROLLOUT}.agent.num_workers": 1 if _on_cpu(config) else 8,
    }


def _algorithm(config: TrainConfig) -> dict[str, Value]:
    dynamic = config.dynamic_sampling
    return {
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False,
        "algorithm.rollout_correction.bypass_mode": False,  # it would skip the pass that measures entropies
        "algorithm.filter_groups.enable": dynamic.enabled,
        "algorithm.filter_groups.metric": "score",  # correctness; verl's "reward" holds the overlong penalty
        "algorithm.filter_groups.max_inflight_gen_batches": max(
            1, dynamic.generation_prompts // config.rollout.prompts_per_step
        ),
    }


def _actor(config: TrainConfig) -> dict[str, Value]:
    loss, cluster = config.loss, config.cluster
    precision = "bf16" if config.model.precision == "bf16" else "fp32"
    compiled = not _on_cpu(config)
    return {
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.ppo_mini_batch_size": config.training.mini_batch_prompts,
        f"{ACTOR}.ppo_epochs": 1,
        # Responses lie in the order in which they ended. Unshuffled, the first gradient steps would get the short ones.
        f"{ACTOR}.shuffle": True,
        f"{ACTOR}.data_loader_seed": config.seed,
        f"{ACTOR}.use_dynamic_bsz": True,
        # verl multiplies it by the GPUs that share a sequence; log-prob passes take the same.
        f"{ACTOR}.ppo_max_token_len_per_gpu": config.training.micro_batch_tokens // cluster.sequence_parallel,
        f"{ACTOR}.ulysses_sequence_parallel_size": cluster.sequence_parallel,
        f"{ACTOR}.clip_ratio_low": loss.clip_low,
        f"{ACTOR}.clip_ratio_high": loss.clip_high,
        f"{ACTOR}.clip_ratio_c": math.inf if loss.dual_clip is None else loss.dual_clip,
        f"{ACTOR}.loss_agg_mode": "token-mean",
        f"{ACTOR}.use_kl_loss": loss.kl_coef > 0,
        f"{ACTOR}.kl_loss_coef": loss.kl_coef,
        f"{ACTOR}.kl_loss_type": "low_var_kl",
        f"{ACTOR}.entropy_coeff": loss.entropy_coef,
        # fp32 a chunk at a time, where verl otherwise takes the logits' own 16 bits; and no graph of it is kept.
        f"{ACTOR}.entropy_from_logits_with_chunking": True,
        f"{ACTOR}.entropy_checkpointing": True,
        f"{ACTOR}.use_torch_compile": compiled,
        f"{ACTOR}.fsdp_config.use_torch_compile": compiled,
        f"{REF}.fsdp_config.use_torch_compile": compiled,
        f"{ACTOR}.fsdp_config.seed": config.seed,
        f"{ACTOR}.fsdp_config.model_dtype": "fp32",  # master weights
        f"+{ACTOR}.fsdp_config.mixed_precision": {"param_dtype": precision, "reduce_dtype": "fp32"},
        f"+{REF}.fsdp_config.mixed_precision": {"param_dtype": precision, "reduce_dtype": "fp32"},
        f"{ACTOR}.fsdp_config.param_offload": cluster.offload,
        f"{ACTOR}.fsdp_config.optimizer_offload": cluster.offload,
    }


def _optimizer(config: TrainConfig) -> dict[str, Value]:
    optimizer = config.optimizer
    return {
        f"{ACTOR}.optim.optimizer": "AdamW",
        f"{ACTOR}.optim.optimizer_impl": "torch.optim",
        f"{ACTOR}.optim.lr": optimizer.lr,
        f"{ACTOR}.optim.lr_scheduler_type": "constant",  # the plug-in sets the rate of every gradient step
        f"{ACTOR}.optim.weight_decay": optimizer.weight_decay,
        f"{ACTOR}.optim.betas": optimizer.betas,
        f"{ACTOR}.optim.override_optimizer_config": {"eps": optimizer.eps},
        f"{ACTOR}.optim.clip_grad": optimizer.max_grad_norm,  # actor.grad_clip is read by no one
    }


def _reward(config: TrainConfig) -> dict[str, Value]:
    return {
        "reward.num_workers": config.cluster.reward_workers,
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.module.path": "pkg://forkrl.cluster.rewards",
        "reward.reward_manager.name": "ForkRewardManager",
    }


def _trainer(config: TrainConfig, paths: VerlPaths) -> dict[str, Value]:
    cluster, steps = config.cluster, config.training.steps
    return {
        "trainer.use_v1": True,
        "trainer.v1.trainer_mode": "forkrl" if cluster.trainer == "sync" else f"forkrl_{cluster.trainer}",
        "trainer.device": "cpu" if _on_cpu(config) else "cuda",
        "trainer.nnodes": cluster.nodes,
        "trainer.n_gpus_per_node": cluster.gpus_per_node,
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": steps,  # an epoch is one step at least, so this never ends a run
        "trainer.val_before_train": True,
        "trainer.test_freq": config.eval.every or steps,  # the last step is evaluated in any case
        "trainer.save_freq": config.checkpoint.every,
        "trainer.max_actor_ckpt_to_keep": config.checkpoint.keep,
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": paths.checkpoints,
        "trainer.logger": ["console"],
        "hydra.run.dir": paths.checkpoints / "hydra",
    }


def _ray(config: TrainConfig) -> dict[str, Value]:
    cluster = config.cluster
    settings: dict[str, Value] = {
        # "local" starts one, even where RAY_ADDRESS names another.
        f"+{RAY}.address": cluster.address or "local",
        f"+{RAY}.runtime_env.env_vars": verl_environment(config),
        f"{STORAGE}.total_storage_size": None,  # no limit: a step holds as many responses as it must
        f"{STORAGE}.num_data_storage_units": 1 if _on_cpu(config) else max(8, 2 * cluster.nodes),
    }
    if _on_cpu(config) and not cluster.address:
        settings |= {
            # Each of verl's actors reserves a core, and each rank a GPU; here neither is one of the machine's.
            f"{RAY}.num_cpus": 16 + 2 * cluster.gpus_per_node + cluster.reward_workers,
            f"+{RAY}.num_gpus": cluster.gpus_per_node,
            f"+{RAY}.include_dashboard": False,
            f"+{RAY}.object_store_memory": 300_000_000,
        }
    return settings


def _forkrl(config: TrainConfig, paths: VerlPaths, stop_token_ids: Sequence[int]) -> dict[str, Value]:
    selection = config.selection
    options: dict[str, Value] = {
        "rule": selection.rule,
        "ratio": selection.ratio,
        "threshold": selection.threshold,
        "scope": selection.scope,
        "entropy": selection.entropy,
        "denominator": config.loss.denominator,
        "seed": config.seed,
        "warmup_steps": config.optimizer.warmup_steps,
        "max_generation_batches": config.dynamic_sampling.max_generation_batches,
        "poll_s": 0.1 if _on_cpu(config) else 2.0,
        "patience_s": config.cluster.patience_s,
        "run_folder": paths.run_folder,
        "rollouts_every": config.log.rollouts_every,
        "rollouts_sampled": config.log.rollouts_sampled,
        "stop_token_ids": list(stop_token_ids),
        "verifiers": paths.verifiers,
    }
    return {f"+forkrl.{name}": value for name, value in options.items()}


def _refuse_contradiction(overrides: Sequence[str], settings: dict[str, Value]) -> None:
    own = [key.lstrip("+") for key in settings]
    for text in overrides:
        key = overridden_key(text)
        if taken := next(
            (name for name in own if f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.")), None
        ):
            raise UserError(
                f"cluster.overrides: {text!r} sets what ForkRL sets itself ({taken}); leave it out, and see "
                f"docs/cluster-settings.md for the recipe's own setting"
            )
