"""One gradient step: statistics, selection, loss and backward for each micro-batch of a mini-batch, then the optimizer.

The gradient is a token mean over the whole mini-batch: every loss term is divided by the mini-batch's own count, so the
cut into micro-batches, and their division among replicas, change nothing but memory and time (and, by definition, a
selection of scope "micro_batch").

Axes: ``B`` sequences, ``T`` token positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from forkrl.errors import TrainingHalted
from forkrl.method.batches import cut_micro_batches
from forkrl.method.loss import kl_penalty, policy_loss
from forkrl.method.selection import count_selected, needs_entropy_ahead, reads_current_entropy, select_in_scope
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.parallel.replicas import Replica, Replicas
from forkrl.train.forks_only import compute_selected_stats, entropies_ahead, read_ahead
from forkrl.types import TokenBatch, TokenStats

if TYPE_CHECKING:  # pydantic, which only reading a recipe needs
    from forkrl.config import ForksOnlyConfig, TrainConfig


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a gradient step did: which tokens carried gradient, their entropies, and figures to log."""

    selected_BT: Tensor
    entropy_BT: Tensor
    metrics: dict[str, float]


class Counts(NamedTuple):
    """Tokens of the whole mini-batch, which every micro-batch divides its sums by."""

    response: int
    selected: int


class Work(NamedTuple):
    """One micro-batch, and what is known of it before it runs."""

    number: int
    micro: TokenBatch
    chosen_BT: Tensor | None
    """Its selected tokens; None: it selects from its own entropies."""
    drawn_BT: Tensor | None
    """Where ``forks_only.sampled`` lets a token run that is not selected; None: nowhere."""
    entropy_known: bool
    """The entropies to log are known without it."""


class Share(NamedTuple):
    """What one micro-batch adds to its gradient step. ``sums`` are over tokens, not yet divided by their number."""

    selected_BT: Tensor
    entropy_BT: Tensor
    losses: dict[str, float]
    num_carrying: int
    """Selected tokens of sequences with an advantage: those that move the weights, which the figures below are of."""
    sums: dict[str, float]
    ratio_max: float


def update_policy(
    replicas: Replicas,
    optimizer: torch.optim.Optimizer,
    mini_batch: TokenBatch,
    config: TrainConfig,
    generator: torch.Generator,
    *,
    on_policy: bool = False,
) -> Update:
    """Take one gradient step on a mini-batch.

    Args:
        replicas: the weights that learn, and the starting policy if ``loss.kl_coef`` is above 0.
        optimizer: over the policy's parameters.
        mini_batch: on the policy's device.
        config: selection, loss and optimizer settings.
        generator: what the "random" rule and ``forks_only.sampled`` draw from; on the policy's device.
        on_policy: the weights are still those that sampled the mini-batch, so that the entropies of the rollout are
            the current ones, and no pass is needed to know them before the first loss.

    Raises:
        TrainingHalted: a NaN or infinite entropy, loss or gradient; the weights are as they were.
    """
    max_tokens = config.training.micro_batch_tokens
    cuts = cut_micro_batches(mini_batch, max_tokens)
    ahead = _select_ahead(replicas, mini_batch, cuts, config, generator, on_policy=on_policy)
    if ahead is None:
        chosen_BT, num_selected = None, count_selected(mini_batch.response_mask, config.selection, cuts)
    else:
        chosen_BT, num_selected = ahead.selected_BT, int(ahead.selected_BT.sum())
    if ahead is not None and ahead.entropy_BT is not None and _only_carrying_tokens_count(config):
        chosen_BT = ahead.selected_BT & (mini_batch.advantages != 0)[:, None]
        if not ahead.kept:  # else keys and values of these very micro-batches lie ready
            live_B = _rows_carrying(chosen_BT)
            cuts = [live_B[rows_B] for rows_B in cut_micro_batches(mini_batch.rows(live_B), max_tokens)]

    work = _divide_work(mini_batch, cuts, chosen_BT, _draw(mini_batch, config, generator), ahead)
    counts = Counts(mini_batch.num_response_tokens, num_selected)
    replicas.zero_gradients()
    shares = replicas.map(accumulate_gradient, work, counts, config, sizes=_sizes([part.micro for part in work]))
    replicas.sum_gradients()
    _set_zero_gradients(replicas.policy)
    grad_norm = _take_step(replicas.policy, optimizer, config.optimizer.max_grad_norm)

    num_carrying = max(1, sum(share.num_carrying for share in shares))
    metrics = {name: sum(share.losses[name] for share in shares) for name in shares[0].losses}
    metrics |= {name: sum(share.sums[name] for share in shares) / num_carrying for name in shares[0].sums}
    metrics |= {"loss/ratio_max": max(share.ratio_max for share in shares), "grad/norm": grad_norm}
    return Update(*_selection_made(mini_batch, cuts, shares, ahead), metrics)


def select_in_rollout_batch(batch: TokenBatch, config: TrainConfig, generator: torch.Generator) -> TokenBatch:
    """The batch with its selection, where the scope is all of it; else as it is, and every update chooses.

    Raises:
        TrainingHalted: an entropy that the rule reads is NaN or infinite.
    """
    if config.selection.scope != "rollout_batch":
        return batch
    there = batch.to(generator.device)
    selected_BT = _select(there.rollout_entropy, there.response_mask, config, [], generator)
    return replace(batch, selected=selected_BT.to(batch.response_mask.device))


def _divide_work(
    mini_batch: TokenBatch, cuts: list[Tensor], chosen_BT: Tensor | None, drawn_BT: Tensor | None, ahead: Ahead | None
) -> list[Work]:
    """The mini-batch as it is cut, each part with what is known of it."""
    work = []
    for number, rows_B in enumerate(cuts):
        micro = mini_batch.rows(rows_B)
        width = micro.input_ids.shape[1]
        chosen, drawn = (None if each is None else each[rows_B, :width] for each in (chosen_BT, drawn_BT))
        work.append(Work(number, micro, chosen, drawn, ahead is not None and ahead.entropy_BT is not None))
    return work


def _selection_made(
    mini_batch: TokenBatch, cuts: list[Tensor], shares: list[Share], ahead: Ahead | None
) -> tuple[Tensor, Tensor]:
    """Selected tokens and entropies of the whole mini-batch, as known ahead or as its parts found them."""
    if ahead is not None and ahead.entropy_BT is not None:
        return ahead.selected_BT, torch.where(mini_batch.response_mask, ahead.entropy_BT, 0.0)
    selected_BT, entropy_BT = torch.zeros_like(mini_batch.response_mask), torch.zeros_like(mini_batch.old_logprobs)
    for rows_B, share in zip(cuts, shares, strict=True):
        width = share.selected_BT.shape[1]
        selected_BT[rows_B, :width], entropy_BT[rows_B, :width] = share.selected_BT, share.entropy_BT
    return selected_BT, entropy_BT


def _only_carrying_tokens_count(config: TrainConfig) -> bool:
    """Whether the loss has no term but the policy's, which is 0 where a token is not selected or has no advantage."""
    return not (config.loss.kl_coef or config.loss.entropy_coef)


def _rows_carrying(carrying_BT: Tensor) -> Tensor:
    """The sequences that move the weights, or one: the optimizer's own state moves on a zero gradient too."""
    live_B = carrying_BT.any(1).cpu().nonzero()[:, 0]
    return live_B if len(live_B) else torch.zeros(1, dtype=torch.int64)


def _set_zero_gradients(policy: Policy) -> None:
    """Where nothing at all has run with gradients, so that the optimizer moves as it does on a gradient of zeros."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    if all(parameter.grad is None for parameter in trained):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)


def _draw(mini_batch: TokenBatch, config: TrainConfig, generator: torch.Generator) -> Tensor | None:
    """Positions drawn to run though nothing selects them, each with probability ``forks_only.sampled``."""
    if not config.forks_only.sampled:
        return None
    shape, device = mini_batch.attention_mask.shape, mini_batch.attention_mask.device
    chance_BT = torch.rand(shape, device=device, generator=generator)
    return (chance_BT < config.forks_only.sampled) & mini_batch.attention_mask


def accumulate_gradient(replica: Replica, work: Work, counts: Counts, config: TrainConfig) -> Share:
    """Statistics, selection (unless made before), loss and backward of one micro-batch."""
    run = _run_forks if config.training.backward == "forks_only" else _run_all
    stats, entropy_BT, chosen_BT = run(replica, work, config)
    loss, share = _loss(stats, entropy_BT, chosen_BT, work.micro, replica.reference, counts, config)
    if not loss.isfinite():
        raise TrainingHalted(f"the loss is {loss.item()}; the policy's logits or log-probs have run out of range")
    if loss.requires_grad:  # forks-only: some token of the micro-batch is selected
        loss.backward()
    return share


def _run_all(replica: Replica, work: Work, config: TrainConfig) -> tuple[TokenStats, Tensor, Tensor]:
    """Statistics with gradients, entropies, and which tokens are selected.

    Of every response token; of the selected ones alone where nothing else is asked of the others.
    """
    asked_BT = work.chosen_BT if work.entropy_known and _only_carrying_tokens_count(config) else None
    temperature, bonus = config.rollout.temperature, config.loss.entropy_coef != 0
    stats = compute_token_stats(replica.policy, work.micro, temperature=temperature, entropy_grad=bonus, at_BT=asked_BT)
    entropy_BT = stats.entropy.detach()
    return stats, entropy_BT, _chosen(work, entropy_BT, config)


def _run_forks(replica: Replica, work: Work, config: TrainConfig) -> tuple[TokenStats, Tensor, Tensor]:
    """The same with statistics of the selected tokens alone; one pass gives entropies, keys and values."""
    policy, micro = replica.policy, work.micro
    settings, temperature = config.forks_only, config.rollout.temperature
    ahead = replica.kept.pop(work.number, None)
    if ahead is None and work.chosen_BT is not None and work.entropy_known and not work.chosen_BT.any():
        nothing_BT = torch.zeros_like(micro.old_logprobs)
        return TokenStats(nothing_BT, nothing_BT), nothing_BT, work.chosen_BT
    if ahead is None:
        ahead = read_ahead(policy, micro, to_the_end=not work.entropy_known, projections=settings.projections)
    entropy_BT = None if work.entropy_known else entropies_ahead(policy, micro, ahead, temperature=temperature)
    chosen_BT = _chosen(work, entropy_BT, config)
    stats = compute_selected_stats(
        policy,
        micro,
        chosen_BT,
        temperature=temperature,
        weight_BT=_running_weights(micro, chosen_BT, work.drawn_BT, settings),
        projections=settings.projections,
        ahead=ahead,
    )
    if entropy_BT is None:
        entropy_BT = stats.entropy.detach()
        _require_finite_entropy(entropy_BT[micro.response_mask])
    return stats, entropy_BT, chosen_BT


def _chosen(work: Work, entropy_BT: Tensor | None, config: TrainConfig) -> Tensor:
    if entropy_BT is not None:
        _require_finite_entropy(entropy_BT[work.micro.response_mask])
    if work.chosen_BT is not None:
        return work.chosen_BT
    assert entropy_BT is not None, "a selection by entropies needs them"
    # In this micro-batch alone, by a rule that draws no random numbers.
    return _select(entropy_BT, work.micro.response_mask, config, [torch.arange(len(work.micro))], torch.Generator())


def _running_weights(
    micro: TokenBatch, chosen_BT: Tensor, drawn_BT: Tensor | None, settings: ForksOnlyConfig
) -> Tensor | None:
    """What runs with gradients beside the selected tokens, by how much each counts; None: nothing does."""
    if not settings.prompt and drawn_BT is None:
        return None
    weight_BT = torch.zeros_like(micro.old_logprobs)
    if drawn_BT is not None:
        weight_BT[drawn_BT] = 1 / settings.sampled
    if settings.prompt:
        weight_BT[micro.attention_mask & ~micro.response_mask] = 1.0
    return weight_BT.masked_fill_(chosen_BT, 1.0)


def _take_step(policy: Policy, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Clip the gradient and move the weights; returns the norm of the gradient before it was clipped."""
    grad_norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_norm))
    if not math.isfinite(grad_norm):
        raise TrainingHalted(f"the gradient norm is {grad_norm}; the weights were left as they are")
    optimizer.step()
    if not all(bool(parameter.isfinite().all()) for parameter in policy.model.parameters()):
        # Found here, before the step counts as done: no checkpoint may hold such weights.
        raise TrainingHalted("the optimizer's step left weights that are NaN or infinite; lower optimizer.lr")
    return grad_norm


def _require_finite_entropy(entropy_N: Tensor) -> None:
    """Whatever the rule: one that does not look at entropy would go on training a model that has diverged."""
    if num_bad := int((~entropy_N.isfinite()).sum()):
        raise TrainingHalted(
            f"entropy is NaN or infinite at {num_bad} of {len(entropy_N)} response tokens; "
            f"the model's weights have diverged"
        )


class Ahead(NamedTuple):
    """A selection made before any loss, and the current policy's entropies if they are known by then."""

    selected_BT: Tensor
    entropy_BT: Tensor | None
    kept: bool
    """The pass that measured them may have left its keys and values in the replicas."""


def _select_ahead(
    replicas: Replicas,
    mini_batch: TokenBatch,
    cuts: list[Tensor],
    config: TrainConfig,
    generator: torch.Generator,
    *,
    on_policy: bool,
) -> Ahead | None:
    """The selection before any loss, or None where each micro-batch can select from its own forward pass."""
    if mini_batch.selected is not None:
        return Ahead(mini_batch.selected, mini_batch.rollout_entropy if on_policy else None, kept=False)
    forks_only, reads_current = config.training.backward == "forks_only", reads_current_entropy(config.selection)
    must_know = needs_entropy_ahead(config.selection)
    if reads_current and not must_know and not (forks_only and on_policy):
        return None
    known_BT = mini_batch.rollout_entropy if on_policy else None
    kept = must_know and known_BT is None
    if kept:
        known_BT = _measure_entropies(replicas, mini_batch, cuts, config)
    entropy_BT = known_BT if reads_current and known_BT is not None else mini_batch.rollout_entropy
    return Ahead(_select(entropy_BT, mini_batch.response_mask, config, cuts, generator), known_BT, kept and forks_only)


def _measure_entropies(replicas: Replicas, mini_batch: TokenBatch, cuts: list[Tensor], config: TrainConfig) -> Tensor:
    micro_batches = [mini_batch.rows(rows_B) for rows_B in cuts]
    items = list(enumerate(micro_batches))
    entropies = replicas.map(measure_entropy, items, config, sizes=_sizes(micro_batches))
    entropy_BT = torch.zeros_like(mini_batch.old_logprobs)
    for rows_B, part_BT in zip(cuts, entropies, strict=True):
        entropy_BT[rows_B, : part_BT.shape[1]] = part_BT
    return entropy_BT


def _sizes(micro_batches: list[TokenBatch]) -> list[int]:
    """Padded tokens: the work in each."""
    return [micro.input_ids.numel() for micro in micro_batches]


def measure_entropy(replica: Replica, item: tuple[int, TokenBatch], config: TrainConfig) -> Tensor:
    """The current policy's entropies, fp32 ``[B, T]``. Forks-only keeps keys and values, if there is room for them."""
    (number, micro), temperature = item, config.rollout.temperature
    if config.training.backward == "dense":
        with torch.no_grad():
            return compute_token_stats(replica.policy, micro, temperature=temperature).entropy
    ahead = read_ahead(replica.policy, micro, to_the_end=True)
    num_bytes = sum(kept.num_bytes for kept in [ahead, *replica.kept.values()])
    # With projections they hold the graph that made them, many times their size.
    if not config.forks_only.projections and num_bytes <= config.forks_only.kept_mib * 2**20:
        replica.kept[number] = ahead._replace(hidden_BTD=None)
    return entropies_ahead(replica.policy, micro, ahead, temperature=temperature)


def _select(
    entropy_BT: Tensor, mask_BT: Tensor, config: TrainConfig, cuts: list[Tensor], generator: torch.Generator
) -> Tensor:
    try:
        return select_in_scope(entropy_BT, mask_BT, config.selection, cuts, generator)
    except ValueError as error:
        raise TrainingHalted(f"{error}; the model's weights have diverged") from error


def _loss(
    stats: TokenStats,
    entropy_BT: Tensor,
    selected_BT: Tensor,
    micro: TokenBatch,
    reference: Policy | None,
    counts: Counts,
    config: TrainConfig,
) -> tuple[Tensor, Share]:
    """This micro-batch's share of the mini-batch's loss, and of what is logged."""
    settings = config.loss
    carrying_BT = selected_BT & (micro.advantages != 0)[:, None]
    policy = policy_loss(
        stats.logprobs,
        micro.old_logprobs,
        micro.advantages,
        micro.response_mask,
        carrying_BT,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        denominator=counts.selected if settings.denominator == "selected" else counts.response,
    )
    loss = policy.loss
    losses = {"loss/policy": policy.loss.item(), "loss/kl": 0.0, "loss/entropy": 0.0}
    if reference is not None:
        with torch.no_grad():
            ref_logprobs = compute_token_stats(reference, micro, temperature=config.rollout.temperature).logprobs
        kl = kl_penalty(stats.logprobs, ref_logprobs, micro.response_mask, counts.response).loss
        loss, losses["loss/kl"] = loss + settings.kl_coef * kl, kl.item()
    if settings.entropy_coef:
        bonus = stats.entropy[micro.response_mask].sum() / counts.response
        loss, losses["loss/entropy"] = loss - settings.entropy_coef * bonus, bonus.item()
    sums = {
        f"loss/{name}": float(policy.metrics[name] * policy.metrics["num_selected"])
        for name in ("clip_fraction", "approx_kl")
    }
    num_carrying, ratio_max = int(policy.metrics["num_selected"]), float(policy.metrics["ratio_max"])
    return loss, Share(selected_BT, entropy_BT, losses, num_carrying, sums, ratio_max)
