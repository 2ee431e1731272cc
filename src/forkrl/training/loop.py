"""One training step. Axes: ``P`` prompts, ``G`` rollouts per prompt, ``B`` sequences, ``T`` token positions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forkrl.errors import NothingToLearn, out_of_memory_names
from forkrl.method.advantages import group_advantages, informative_groups, overlong_penalty
from forkrl.method.batches import collate, mini_batches
from forkrl.methods import objective_of
from forkrl.rollout.logprob_gap import LogprobGap
from forkrl.rollout.scoring import Scoring, require_judged_terms, why_nothing_to_learn
from forkrl.training.metrics import part_metrics, rollout_metrics, update_metrics
from forkrl.training.rollout_rows import rollout_rows
from forkrl.training.run import Run
from forkrl.training.update import Update, choose_in_rollout_batch, recompute_logprobs, update_policy
from forkrl.types import RolloutGroup, TokenBatch


def train(run: Run, on_step: Callable[[Run, dict[str, float]], None] | None = None) -> None:
    """Train to the recipe's last step; raises NothingToLearn, TrainingHalted (NaN, memory) or Interrupted."""
    run.evaluate_if_due()
    for _ in run.steps():
        started = time.perf_counter()
        groups, metrics = collect_groups(run)
        rewards_PG = shaped_rewards(run, groups)
        advantages_PG = group_advantages(rewards_PG, objective_of(run.config.loss.objective).advantage)
        batch = collate(groups, advantages_PG, run.policy.tokenizer.eos_token_id, rewards_PG)
        run.check_logprobs(batch)
        metrics |= run.adapt_entropy_bonus(batch)

        update_started = time.perf_counter()
        run.display.phase("update")
        if run.config.loss.old_logprobs == "trainer":
            with out_of_memory_names("training.micro_batch_tokens", run.config.training.micro_batch_tokens):
                batch, mismatch = recompute_logprobs(run.workers, batch, run.config)
            metrics |= mismatch
        if run.config.selection.scope == "rollout_batch":  # else take_gradient_step selects
            batch = choose_in_rollout_batch(batch, run.config, run.generator)
        parts = mini_batches(batch, run.config.training.mini_batch_prompts * run.config.rollout.group_size)
        updates = [take_gradient_step(run, part, done=number / len(parts)) for number, part in enumerate(parts)]

        if run.config.loss.old_logprobs == "sampler":
            metrics |= LogprobGap.of(updates[0].log_ratio_N).metrics()
        metrics |= {"reward/mean": float(rewards_PG.mean())} | update_metrics(parts, updates)
        metrics |= {"time/update_s": time.perf_counter() - update_started, "time/step_s": time.perf_counter() - started}
        run.finish_step(metrics, sample_rows(run, groups, rewards_PG, advantages_PG, parts, updates))
        if on_step is not None:
            on_step(run, metrics)
        run.evaluate_if_due()


def collect_groups(run: Run) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Sample and score until enough groups have a gradient (DAPO's dynamic sampling); metrics include dropped ones."""
    wanted, dynamic = run.config.rollout.prompts_per_step, run.config.dynamic_sampling
    kept: list[RolloutGroup] = []
    dropped: list[RolloutGroup] = []
    sampled: list[RolloutGroup] = []
    seconds = {"rollout": 0.0, "reward": 0.0}
    num_batches = 0
    while len(kept) < wanted and num_batches < (dynamic.max_generation_batches if dynamic.enabled else 1):
        num_batches += 1
        prompts = run.prompts.take((dynamic.generation_prompts or wanted) if dynamic.enabled else wanted)
        with run.phase("rollout", len(prompts) * run.config.rollout.group_size):
            started = time.perf_counter()
            scoring = Scoring(run.verifier, [term.name for term in run.config.reward.terms])
            groups = run.engine.generate(
                prompts,
                group_size=run.config.rollout.group_size,
                sampling=run.sampling,
                generator=run.generator,
                on_finished=scoring.add,
            )
            seconds["rollout"] += time.perf_counter() - started
        with run.phase("reward"):
            started = time.perf_counter()
            groups = scoring.finish(groups)
            seconds["reward"] += time.perf_counter() - started
        require_judged_terms(groups, [term.name for term in run.config.reward.terms], run.verifier.first_failures)
        run.prompts.observe(groups)
        sampled += groups
        useful_P = informative_groups(summed_rewards(run, groups))
        for group, useful in zip(groups, useful_P, strict=True):
            (kept if useful or not dynamic.enabled else dropped).append(group)
    if not kept:
        raise NothingToLearn(why_nothing_to_learn(sampled, num_batches, run.verifier.first_failures))
    kept = kept[:wanted]
    metrics = rollout_metrics(sampled, dropped, len(kept), num_batches, seconds)
    return kept, metrics | part_metrics(sampled, dropped)


def shaped_rewards(run: Run, groups: Sequence[RolloutGroup]) -> Tensor:
    """Summed rewards plus DAPO's overlong penalty, fp32 ``[P, G]`` (v2 section 5.2)."""
    lengths_PG = torch.tensor([[len(rollout) for rollout in group.rollouts] for group in groups])
    cache = run.config.reward.overlong_cache
    return summed_rewards(run, groups) + overlong_penalty(lengths_PG, run.config.rollout.max_response_tokens, cache)


def summed_rewards(run: Run, groups: Sequence[RolloutGroup]) -> Tensor:
    """Scores plus the weighted terms of ``reward.terms``, fp32 ``[P, G]``; a failure is worth the least."""
    rewards_PG = torch.tensor([group.scores for group in groups])
    for term in run.config.reward.terms:
        worst = 1.0 if term.weight < 0 else 0.0
        results = [[result.terms[term.name] for result in group.results] for group in groups]
        values_PG = torch.tensor([[worst if each.failure else each.score for each in group] for group in results])
        rewards_PG = rewards_PG + term.weight * values_PG
    return rewards_PG


def take_gradient_step(run: Run, mini_batch: TokenBatch, *, done: float) -> Update:
    """One gradient step, before which ``done`` of the rollout batch's gradient steps were taken, in [0, 1)."""
    lr = run.set_learning_rate(done)
    with out_of_memory_names("training.micro_batch_tokens", run.config.training.micro_batch_tokens):
        update = update_policy(
            run.workers,
            run.optimizer,
            mini_batch.to(run.policy.device),
            run.step_config,
            run.generator,
            on_policy=not done,
        )
    # Frees memory for the next rollout. Other workers' gradients share one block, which is kept.
    run.optimizer.zero_grad(set_to_none=True)
    metrics = update.metrics | {"optimizer/lr": lr}
    return replace(update, selected_BT=update.selected_BT.cpu(), metrics=metrics)


def sample_rows(
    run: Run,
    groups: Sequence[RolloutGroup],
    rewards_PG: Tensor,
    advantages_PG: Tensor,
    parts: Sequence[TokenBatch],
    updates: Sequence[Update],
) -> list[dict[str, Any]]:
    """The step's first groups as rows for ``rollouts/``, with their selected tokens; empty if not due."""
    if not run.should_sample():
        return []
    num_groups = -(-run.config.log.rollouts_sampled // run.config.rollout.group_size)
    selected = [
        selected_T[mask_T].tolist()
        for part, update in zip(parts, updates, strict=True)
        for selected_T, mask_T in zip(update.selected_BT, part.response_mask, strict=True)
    ]
    rewards, advantages = rewards_PG.flatten().tolist(), advantages_PG.flatten().tolist()
    return rollout_rows(run.step + 1, groups[:num_groups], run.policy.tokenizer, selected, rewards, advantages)
