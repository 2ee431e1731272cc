"""DAPO's clipped loss on the selected tokens, and a KL penalty. Axes: ``B`` sequences, ``T`` token positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from forkrl.errors import TrainingHalted
from forkrl.method.objectives.dapo import dapo
from forkrl.method.plugins import load_method
from forkrl.method.signals import MAX_LOG_RATIO, Terms
from forkrl.methods import objective_of
from forkrl.types import LossOutput, TokenStats, require_tensors

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import LossConfig


class Counts(NamedTuple):
    """Token counts of the whole mini-batch, over all micro-batches and ranks."""

    response: int
    selected: int
    sequences: int = 0
    """Read by objectives that average over responses."""

    def divisor(self, config: LossConfig) -> int:
        if objective_of(config.objective).per_response:
            return self.sequences
        if isinstance(config.denominator, int):
            return config.denominator
        return self.selected if config.denominator == "selected" else self.response


class TokenSums(NamedTuple):
    """A micro-batch's contribution to a gradient step. All fields add up except ``ratio_max``.

    ``policy``, ``kl`` and ``entropy`` are already divided by mini-batch counts; ``clipped`` and ``approx_kl`` are sums
    over ``contributing`` tokens (selected, non-zero advantage).
    """

    policy: float
    kl: float
    entropy: float
    contributing: int
    clipped: float
    approx_kl: float
    ratio_max: float


def total(parts: Sequence[TokenSums]) -> TokenSums:
    """Combine the sums of micro-batches or ranks."""
    sums = TokenSums(*(sum(values) for values in zip(*parts, strict=True)))
    return sums._replace(ratio_max=max(part.ratio_max for part in parts))


def loss_metrics(sums: TokenSums) -> dict[str, float]:
    """The ``loss/`` metrics of a gradient step."""
    contributing = max(1, sums.contributing)
    return {
        "loss/policy": sums.policy,
        "loss/kl": sums.kl,
        "loss/entropy": sums.entropy,
        "loss/clip_fraction": sums.clipped / contributing,
        "loss/approx_kl": sums.approx_kl / contributing,
        "loss/ratio_max": sums.ratio_max,
    }


def policy_loss_only(config: LossConfig) -> bool:
    """Whether only selected tokens with a non-zero advantage contribute to the loss."""
    return not (config.kl_coef or config.entropy_coef)


def step_loss(
    stats: TokenStats,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    selected_mask: Tensor,
    counts: Counts,
    config: LossConfig,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, TokenSums]:
    """The contribution of one micro-batch to the mini-batch loss, independent of the division into micro-batches.

    The policy loss is divided by ``counts.divisor(config)``, KL penalty and entropy bonus by
    ``counts.response``. ``advantages`` is ``[B]`` or ``[B, T]``; other tensors are ``[B, T]``. Without KL penalty and
    entropy bonus only contributing tokens of ``stats`` are read. Raises TrainingHalted if the loss is not finite.
    """
    advantages_BT = advantages[:, None].expand_as(response_mask) if advantages.ndim == 1 else advantages
    _check_tokens(stats.logprobs, old_logprobs, advantages_BT, response_mask, selected_mask)
    objective = objective_of(config.objective)
    selected_BT = selected_mask & (advantages_BT != 0)
    # A response is read whole, also where a weight is 0.
    known_BT = response_mask & (advantages_BT != 0).any(1, keepdim=True)
    terms = _terms(
        stats,
        old_logprobs,
        advantages_BT,
        known_BT if objective.all_tokens else selected_BT,
        selected_BT,
        (config.clip_low, config.clip_high, config.dual_clip),
        ref_logprobs if objective.reference else None,
    )
    function = load_method("loss.objective", config.objective, objective.path, config.options)
    policy = _sum_up(terms, function(terms), counts.divisor(config), per_response=objective.per_response)
    loss, kl, bonus = policy.loss, 0.0, 0.0
    if config.kl_coef:
        assert ref_logprobs is not None, "a KL penalty needs the log-probs of the reference policy"
        penalty = kl_penalty(stats.logprobs, ref_logprobs, response_mask, float(counts.response)).loss
        loss, kl = loss + config.kl_coef * penalty, penalty.item()
    if config.entropy_coef:
        entropy = stats.entropy[response_mask].sum() / counts.response
        loss, bonus = loss - config.entropy_coef * entropy, entropy.item()
    if not loss.isfinite():
        raise TrainingHalted(f"the loss is {loss.item()}; the policy's logits or log-probs are out of range")
    contributing = int(policy.metrics["num_selected"])
    clipped, approx_kl = (float(policy.metrics[name]) * contributing for name in ("clip_fraction", "approx_kl"))
    ratio_max = float(policy.metrics["ratio_max"])
    return loss, TokenSums(policy.loss.item(), kl, bonus, contributing, clipped, approx_kl, ratio_max)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    selected_mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    denominator: Literal["selected", "response"] | float = "selected",
) -> LossOutput:
    """Clipped surrogate on the selected tokens (arXiv 2506.01939v2, eq. 6; without a selection eq. 4, plain DAPO).

    With ``r = exp(logprobs - old_logprobs)``, each selected token contributes
    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``; where A < 0, ``dual_clip`` bounds it at ``dual_clip |A|``.
    Other tokens have exactly zero gradient, even if NaN. The log-ratio is clamped to +-``MAX_LOG_RATIO``, so
    ``|log r| > 20`` has zero gradient; in eq. 6 it has one if A < 0 and r > e^20 without ``dual_clip``, or A > 0 and
    r < e^-20.

    Args:
        logprobs: ``[B, T]``, of the policy being trained; carries the gradient.
        old_logprobs: ``[B, T]``, of the policy that sampled.
        advantages: ``[B]`` or ``[B, T]``.
        response_mask: ``[B, T]`` bool.
        selected_mask: ``[B, T]`` bool, a subset of ``response_mask``; None selects the whole response.
        clip_low: clip range below 1, in [0, 1).
        clip_high: clip range above 1.
        dual_clip: c > 1, or None.
        denominator: "selected" (paper v2) or "response" (paper v1, TRL) counts this call's tokens; a number is the
            count of the whole mini-batch. An empty selection gives loss 0 and zero gradients.

    Returns:
        The loss, and metrics over the selected tokens of this call: ``clip_fraction`` (gradient removed by a clip or
            the clamp), ``ratio_mean``, ``ratio_max``, ``approx_kl`` (k3 estimate of KL(old || current)) and
            ``num_selected`` to weight the means; all are 0 if nothing is selected.

    Raises:
        ValueError: shapes disagree, a mask is not bool, a selected token is outside the response, or a setting is out
            of range.
        TypeError: an argument that must be a tensor is not one.
    """
    require_tensors(logprobs=logprobs, advantages=advantages)
    selected_mask = response_mask if selected_mask is None else selected_mask
    advantages_BT = advantages[:, None].expand(-1, logprobs.shape[-1]) if advantages.ndim == 1 else advantages
    _check_settings(clip_low, clip_high, dual_clip, denominator)
    _check_tokens(logprobs, old_logprobs, advantages_BT, response_mask, selected_mask)
    stats = TokenStats(logprobs, torch.zeros_like(logprobs))
    clips = (clip_low, clip_high, dual_clip)
    terms = _terms(stats, old_logprobs, advantages_BT, selected_mask, selected_mask, clips, None)
    masks = {"selected": selected_mask, "response": response_mask}
    return _sum_up(terms, dapo(terms), masks[denominator].sum() if isinstance(denominator, str) else denominator)


def _terms(
    stats: TokenStats,
    old_logprobs: Tensor,
    advantages_BT: Tensor,
    read_BT: Tensor,
    selected_BT: Tensor,
    clips: tuple[float, float, float | None],
    ref_logprobs: Tensor | None,
) -> Terms:
    """Masked before ``exp`` and again in the sum: 0 times the gradient of an infinite ratio is NaN."""

    def known(values_BT: Tensor) -> Tensor:
        return torch.where(read_BT, values_BT, 0.0)

    return Terms(
        read_BT,
        selected_BT,
        known(stats.logprobs),
        known(old_logprobs.detach()),
        None if ref_logprobs is None else known(ref_logprobs.detach()),
        known(stats.entropy.detach()),
        known(advantages_BT.detach()),
        *clips,
    )


def _sum_up(
    terms: Terms, found: Tensor | tuple[Tensor, Tensor], divisor: float | Tensor, *, per_response: bool = False
) -> LossOutput:
    """The loss and metrics of what an objective returned: losses ``[B, T]``, and where a clip removed the gradient."""
    loss_BT, cut_BT = found if isinstance(found, tuple) else (found, torch.zeros_like(terms.selected))
    if per_response:
        loss_BT = loss_BT / terms.selected.sum(1, keepdim=True).clamp(min=1)
    loss = _masked_sum_over(loss_BT, terms.selected, divisor)
    return LossOutput(loss, _metrics(terms.log_ratio.detach(), cut_BT, terms.selected))


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    denominator: Literal["response"] | float = "response",
) -> LossOutput:
    """Mean k3 estimate of KL(policy || reference): ``exp(d) - d - 1`` with ``d = ref_logprobs - logprobs``.

    Non-negative per token, and unbiased for tokens sampled from the policy (GRPO, arXiv 2402.03300, eq. 4). ``d`` is
    clamped from above at ``MAX_LOG_RATIO``; such a token has zero gradient. verl also clamps ``d`` from below and the
    estimate at 10, which removes the gradient far from the reference (d > 2.6 or d < -11). Tensors are ``[B, T]``;
    ``denominator`` is "response" for this call's tokens or the count of the whole mini-batch.
    """
    require_tensors(logprobs=logprobs)
    _check_like(logprobs, ref_logprobs=ref_logprobs, response_mask=response_mask)
    if isinstance(denominator, str) and denominator != "response":
        raise ValueError(f'denominator = {denominator!r} must be "response" or a number')
    num_response = response_mask.sum()
    difference_BT = torch.where(response_mask, ref_logprobs.detach(), 0.0) - torch.where(response_mask, logprobs, 0.0)
    difference_BT = difference_BT.clamp(max=MAX_LOG_RATIO)
    kl_BT = difference_BT.expm1() - difference_BT  # expm1: exp(d) - 1 loses all digits of a small d
    loss = _masked_sum_over(kl_BT, response_mask, num_response if isinstance(denominator, str) else denominator)
    return LossOutput(
        loss, {"kl": _masked_sum_over(kl_BT.detach(), response_mask, num_response), "num_response": num_response}
    )


def _masked_sum_over(values_BT: Tensor, mask_BT: Tensor, denominator: float | Tensor) -> Tensor:
    """``sum(values[mask]) / denominator``; 0 with a graph for denominator 0. NaN outside the mask is ignored."""
    total = torch.where(mask_BT, values_BT, 0.0).sum()
    if isinstance(denominator, Tensor):
        return total / denominator.clamp(min=1)
    if not (math.isfinite(denominator) and denominator >= 0):
        raise ValueError(f"denominator = {denominator} must be a finite count of tokens")
    if denominator == 0 and bool(mask_BT.any()):
        raise ValueError(f"denominator = 0, yet {int(mask_BT.sum())} tokens enter the loss")
    return total / (denominator or 1.0)


def _check_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, selected_mask: Tensor
) -> None:
    _check_like(
        logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        response_mask=response_mask,
        selected_mask=selected_mask,
    )
    if bool((selected_mask & ~response_mask).any()):
        raise ValueError("selected_mask selects tokens outside response_mask")


def _check_like(reference_BT: Tensor, **others: Tensor) -> None:
    require_tensors(**others)
    for name, tensor in others.items():
        if tensor.shape != reference_BT.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} is not shaped like logprobs {tuple(reference_BT.shape)}")
        if name.endswith("_mask") and tensor.dtype != torch.bool:
            raise ValueError(f"{name} is {tensor.dtype}; it must be bool")


def _metrics(log_ratio_BT: Tensor, clipped_BT: Tensor, selected_mask: Tensor) -> dict[str, Tensor]:
    num_selected = selected_mask.sum()
    ratio_BT = log_ratio_BT.exp()

    def mean(values_BT: Tensor) -> Tensor:
        return _masked_sum_over(values_BT, selected_mask, num_selected)

    return {
        "clip_fraction": mean(clipped_BT.to(ratio_BT.dtype)),
        "ratio_mean": mean(ratio_BT),
        # Ratios are positive: the appended 0 is the maximum only if no token is selected.
        "ratio_max": torch.cat([torch.where(selected_mask, ratio_BT, 0.0).flatten(), ratio_BT.new_zeros(1)]).amax(),
        "approx_kl": mean(log_ratio_BT.expm1() - log_ratio_BT),
        "num_selected": num_selected,
    }


def _check_settings(
    clip_low: float, clip_high: float, dual_clip: float | None, denominator: Literal["selected", "response"] | float
) -> None:
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low = {clip_low} must lie in [0, 1)")
    if not (math.isfinite(clip_high) and clip_high >= 0):
        raise ValueError(f"clip_high = {clip_high} must be finite and at least 0")
    if dual_clip is not None and not (math.isfinite(dual_clip) and dual_clip > 1):
        raise ValueError(f"dual_clip = {dual_clip} must be finite and above 1")
    if isinstance(denominator, str) and denominator not in ("selected", "response"):
        raise ValueError(f'denominator = {denominator!r} must be "selected", "response" or a number')
