"""One gradient step: statistics, selection, loss and backward for each micro-batch of a mini-batch, then the optimizer.

The gradient is a token mean over the whole mini-batch: every loss term is divided by the mini-batch's own count, so the
cut into micro-batches changes nothing but memory (and, by definition, a selection of scope "micro_batch").

Axes: ``B`` sequences, ``T`` token positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forkrl.backward import compute_token_stats
from forkrl.batching import cut_micro_batches
from forkrl.config import TrainConfig
from forkrl.errors import TrainingHalted
from forkrl.model import Policy
from forkrl.objectives import kl_penalty, policy_loss
from forkrl.selectors.scope import count_selected, needs_entropy_ahead, select_in_scope
from forkrl.types import TokenBatch, TokenStats


@dataclass(frozen=True, slots=True)
class Update:
    """What a gradient step did: which tokens carried gradient, their entropies, and figures to log."""

    selected_BT: Tensor
    entropy_BT: Tensor
    metrics: dict[str, float]


def update_policy(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    mini_batch: TokenBatch,
    config: TrainConfig,
    generator: torch.Generator,
) -> Update:
    """Take one gradient step on a mini-batch.

    Args:
        policy: the weights that learn.
        reference: the starting policy, if ``loss.kl_coef`` is above 0.
        optimizer: over the policy's parameters.
        mini_batch: on the policy's device.
        config: selection, loss and optimizer settings.
        generator: what the "random" rule draws from; on the policy's device.

    Raises:
        TrainingHalted: a NaN or infinite entropy, loss or gradient; the weights are as they were.
    """
    micro_batches = cut_micro_batches(mini_batch, config.training.micro_batch_tokens)
    temperature = config.rollout.temperature
    ahead_BT = _select_ahead(policy, mini_batch, config, micro_batches, generator)
    num_selected = (
        count_selected(mini_batch.response_mask, config.selection, micro_batches)
        if ahead_BT is None
        else int(ahead_BT.sum())
    )
    denominator = num_selected if config.loss.denominator == "selected" else mini_batch.num_response_tokens
    selected_BT = torch.zeros_like(mini_batch.response_mask)
    entropy_BT = torch.zeros_like(mini_batch.old_logprobs)
    sums = dict.fromkeys(("loss/policy", "loss/kl", "loss/entropy", "clipped", "approx_kl"), 0.0)
    ratio_max = 0.0

    optimizer.zero_grad(set_to_none=True)
    for rows_B in micro_batches:
        micro = mini_batch.rows(rows_B)
        width = micro.response_mask.shape[1]
        stats = compute_token_stats(policy, micro, temperature=temperature, entropy_grad=config.loss.entropy_coef != 0)
        _require_finite_entropy(stats.entropy.detach()[micro.response_mask])
        if ahead_BT is None:
            selected = _select(stats.entropy, micro.response_mask, config, [torch.arange(len(micro))], generator)
        else:
            selected = ahead_BT[rows_B, :width]
        loss, figures = _loss(stats, selected, micro, mini_batch, reference, denominator, config)
        if not loss.isfinite():
            raise TrainingHalted(f"the loss is {loss.item()}; the policy's logits or log-probs have run out of range")
        loss.backward()
        selected_BT[rows_B, :width], entropy_BT[rows_B, :width] = selected, stats.entropy.detach()
        sums = {name: total + figures[name] for name, total in sums.items()}
        ratio_max = max(ratio_max, figures["ratio_max"])

    grad_norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.optimizer.max_grad_norm)
    if not grad_norm.isfinite():
        raise TrainingHalted(f"the gradient norm is {grad_norm.item()}; the weights were left as they are")
    optimizer.step()
    if not all(bool(parameter.isfinite().all()) for parameter in policy.model.parameters()):
        # Found here, before the step counts as done: no checkpoint may hold such weights.
        raise TrainingHalted("the optimizer's step left weights that are NaN or infinite; lower optimizer.lr")
    means = {
        "loss/clip_fraction": sums.pop("clipped") / max(1, num_selected),
        "loss/approx_kl": sums.pop("approx_kl") / max(1, num_selected),
    }
    return Update(
        selected_BT, entropy_BT, {**sums, **means, "loss/ratio_max": ratio_max, "grad/norm": float(grad_norm)}
    )


def _require_finite_entropy(entropy_N: Tensor) -> None:
    """Whatever the rule: one that does not look at entropy would go on training a model that has diverged."""
    if num_bad := int((~entropy_N.isfinite()).sum()):
        raise TrainingHalted(
            f"entropy is NaN or infinite at {num_bad} of {len(entropy_N)} response tokens; "
            f"the model's weights have diverged"
        )


def _select_ahead(
    policy: Policy, mini_batch: TokenBatch, config: TrainConfig, micro_batches: list[Tensor], generator: torch.Generator
) -> Tensor | None:
    """The selection before any loss, or None where each micro-batch can select from its own forward pass."""
    if needs_entropy_ahead(config.selection):
        entropy_BT = torch.zeros_like(mini_batch.old_logprobs)
        with torch.no_grad():
            for rows_B in micro_batches:
                micro = mini_batch.rows(rows_B)
                stats = compute_token_stats(policy, micro, temperature=config.rollout.temperature)
                entropy_BT[rows_B, : stats.entropy.shape[1]] = stats.entropy
        return _select(entropy_BT, mini_batch.response_mask, config, micro_batches, generator)
    if config.selection.entropy == "current" and config.selection.rule in ("top_entropy", "bottom_entropy"):
        return None
    return _select(mini_batch.rollout_entropy, mini_batch.response_mask, config, micro_batches, generator)


def _select(
    entropy_BT: Tensor, mask_BT: Tensor, config: TrainConfig, micro_batches: list[Tensor], generator: torch.Generator
) -> Tensor:
    try:
        return select_in_scope(entropy_BT, mask_BT, config.selection, micro_batches, generator)
    except ValueError as error:
        raise TrainingHalted(f"{error}; the model's weights have diverged") from error


def _loss(
    stats: TokenStats,
    selected_BT: Tensor,
    micro: TokenBatch,
    mini_batch: TokenBatch,
    reference: Policy | None,
    denominator: int,
    config: TrainConfig,
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of the mini-batch's loss, and its shares of what is logged."""
    settings = config.loss
    policy = policy_loss(
        stats.logprobs,
        micro.old_logprobs,
        micro.advantages,
        micro.response_mask,
        selected_BT,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        denominator=denominator,
    )
    loss = policy.loss
    figures = {
        "loss/policy": policy.loss.item(),
        "clipped": float(policy.metrics["clip_fraction"] * policy.metrics["num_selected"]),
        "approx_kl": float(policy.metrics["approx_kl"] * policy.metrics["num_selected"]),
        "ratio_max": float(policy.metrics["ratio_max"]),
        "loss/kl": 0.0,
        "loss/entropy": 0.0,
    }
    if reference is not None:
        with torch.no_grad():
            ref_logprobs = compute_token_stats(reference, micro, temperature=config.rollout.temperature).logprobs
        kl = kl_penalty(stats.logprobs, ref_logprobs, micro.response_mask, mini_batch.num_response_tokens).loss
        loss, figures["loss/kl"] = loss + settings.kl_coef * kl, kl.item()
    if settings.entropy_coef:
        bonus = stats.entropy[micro.response_mask].sum() / mini_batch.num_response_tokens
        loss, figures["loss/entropy"] = loss - settings.entropy_coef * bonus, bonus.item()
    return loss, figures
