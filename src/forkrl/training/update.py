"""One gradient step on a mini-batch: selection, loss and backward for each micro-batch, then the optimizer.

The policy loss is divided by ``counts.divisor(loss.denominator)`` of the mini-batch, KL penalty and entropy bonus by
its response tokens, so micro-batches and workers affect only memory, time and a selection of scope "micro_batch".
Axes: ``B`` sequences, ``T`` token positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from forkrl.errors import TrainingHalted
from forkrl.method.batches import (
    MicroBatch,
    assemble,
    count_tokens,
    cut_micro_batches,
    make_micro_batches,
    sample_positions,
)
from forkrl.method.correction import sampler_weights, weight_metrics
from forkrl.method.loss import Counts, TokenSums, loss_metrics, policy_loss_only, step_loss, total
from forkrl.method.selection import (
    Choice,
    choose,
    count_selected,
    entropy_threshold,
)
from forkrl.method.signals import Signals
from forkrl.methods import needs_pass_first, objective_of, reads_current_policy
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.parallel.processes import return_freed_memory
from forkrl.parallel.workers import Worker, Workers
from forkrl.rollout.logprob_gap import LogprobGap
from forkrl.training.forward import make_forward
from forkrl.types import TokenBatch, TokenStats

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import TrainConfig

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """Tokens ``[B, T]`` selected in a gradient step, and its metrics."""

    selected_BT: Tensor
    metrics: dict[str, float]
    log_ratio_N: Tensor
    """Log-probs before the step minus ``old_logprobs``, of the tokens that contribute."""


class MicroBatchResult(NamedTuple):
    """A micro-batch's contribution. ``threshold``: the lowest entropy it selected; NaN if none."""

    selected_BT: Tensor
    threshold: float
    sums: TokenSums
    log_ratio_N: Tensor


class SelectedFirst(NamedTuple):
    """A mini-batch with its selection. ``threshold``: the lowest entropy selected; NaN if none."""

    mini_batch: TokenBatch
    threshold: float
    cuts: list[Tensor]
    """The micro-batches of the gradient pass if workers keep parts of their entropy pass for it, else empty."""


def update_policy(
    workers: Workers,
    optimizer: torch.optim.Optimizer,
    mini_batch: TokenBatch,
    config: TrainConfig,
    generator: torch.Generator,
    *,
    on_policy: bool = False,
) -> Update:
    """Take one gradient step on a mini-batch, with ``selected`` set if the scope is the rollout batch.

    ``on_policy``: the weights have not changed since sampling, so the rollout's entropies are current. Raises
    TrainingHalted on a NaN or infinite entropy, loss or gradient; the weights are then unchanged.
    """
    workers.map(free_memory, range(workers.count))
    mask_BT, all_rows_B = mini_batch.response_mask, torch.arange(len(mini_batch))
    inside = selects_inside(mini_batch, config, on_policy=on_policy)
    if inside:
        cuts = _cut(workers, mini_batch, all_rows_B, config)
        num_selected = count_selected(mask_BT, config.selection, cuts)
    else:
        first = _select_first(workers, mini_batch, config, generator, on_policy=on_policy)
        mini_batch, num_selected = first.mini_batch, int(_selected(first.mini_batch).sum())
        if first.cuts:
            cuts = first.cuts
        else:
            rows_B = _contributing_rows(_selected(mini_batch), mini_batch, config)
            cuts = _cut(workers, mini_batch, rows_B, config)

    counts = Counts(int(mask_BT.sum()), num_selected, len(mini_batch))
    parts = make_micro_batches(mini_batch, cuts, sample_positions(mini_batch, config, generator))
    workers.zero_gradients()
    results = _map(workers, accumulate_gradient, parts, config, counts, inside)
    workers.sum_gradients()
    grad_norm = _take_step(workers.policy, optimizer, config.optimizer.max_grad_norm)

    if inside:
        selected_BT = assemble(mask_BT, cuts, [result.selected_BT for result in results])
        threshold = min((each.threshold for each in results if not math.isnan(each.threshold)), default=math.nan)
    else:
        selected_BT, threshold = _selected(mini_batch), first.threshold
    metrics = loss_metrics(total([result.sums for result in results]))
    log_ratio_N = torch.cat([result.log_ratio_N for result in results])
    return Update(selected_BT, metrics | {"grad/norm": grad_norm, "entropy/threshold": threshold}, log_ratio_N)


def selects_inside(mini_batch: TokenBatch, config: TrainConfig, *, on_policy: bool) -> bool:
    """Whether each micro-batch selects from its own forward pass, instead of all before the first loss."""
    if mini_batch.selected is not None or not reads_current_policy(config.selection, config.weights):
        return False
    if needs_pass_first(config.selection, config.weights):
        return False
    return config.training.backward == "dense" or not on_policy  # on-policy, forks-only saves part of a pass


def choose_in_rollout_batch(batch: TokenBatch, config: TrainConfig, generator: torch.Generator) -> TokenBatch:
    """The batch with its selection and weights over all its tokens."""
    choice = _choose(batch.to(generator.device), None, config, [], generator)
    return _with_choice(batch, choice.each(lambda values_BT: values_BT.to(batch.advantages.device)))


def recompute_logprobs(workers: Workers, batch: TokenBatch, config: TrainConfig) -> tuple[TokenBatch, dict[str, float]]:
    """The batch with the current policy's log-probs and ``sampler_weights``, and metrics of the difference.

    ``batch`` has the sampler's log-probs and entropies, on any device. The first gradient step selects by
    ``rollout_entropy`` as the current policy's, so with ``selection.entropy = "current"`` it becomes that.
    """
    workers.map(free_memory, range(workers.count))
    cuts = _cut(workers, batch, torch.arange(len(batch)), config)
    parts = _map(workers, measure_stats, make_micro_batches(batch, cuts, None), config)
    old_BT = assemble(batch.old_logprobs, cuts, [part.logprobs for part in parts])
    if config.selection.entropy == "current":
        entropy_BT = assemble(batch.rollout_entropy, cuts, [part.entropy for part in parts])
        batch = replace(batch, rollout_entropy=entropy_BT)
    log_ratio_BT, mask_BT = old_BT - batch.old_logprobs, batch.response_mask
    metrics = LogprobGap.of(log_ratio_BT[mask_BT]).metrics()
    weights_BT = sampler_weights(log_ratio_BT, mask_BT, config.loss)
    if weights_BT is not None:
        metrics |= weight_metrics(weights_BT[mask_BT], config.loss.sampler_cap)
    return replace(batch, old_logprobs=old_BT, weights=weights_BT), metrics


def accumulate_gradient(
    worker: Worker, micro: MicroBatch, config: TrainConfig, counts: Counts, inside: bool
) -> MicroBatchResult:
    """Statistics, loss and backward of one micro-batch, and its selection if made ``inside``."""
    batch, forward, threshold = micro.batch, make_forward(config), math.nan
    if inside:

        def choose_here(measured: TokenStats) -> Choice:
            all_rows, no_draws = [torch.arange(len(batch))], torch.Generator()
            return _choose(batch, measured, config, all_rows, no_draws)

        stats, entropy_BT, choice = forward.stats_and_choice(worker, micro, choose_here)
        batch, selected_BT = _with_choice(batch, choice), choice.selected_BT
        threshold = float(entropy_threshold(entropy_BT, selected_BT))
    else:
        selected_BT = _selected(batch)
        read_BT = batch.response_mask if objective_of(config.loss.objective).all_tokens else selected_BT
        at_BT = read_BT & (batch.advantages != 0)[:, None]
        stats = forward.stats(worker, micro, at_BT)
        _require_finite(stats.entropy.detach()[at_BT])
    ref_logprobs_BT = None
    if worker.reference is not None:
        with torch.no_grad():
            ref = compute_token_stats(worker.reference, batch, temperature=config.rollout.temperature)
        ref_logprobs_BT = ref.logprobs
    advantages_BT = batch.advantages[:, None].expand_as(selected_BT)
    log_ratio_N = (stats.logprobs.detach() - batch.old_logprobs)[selected_BT & (advantages_BT != 0)]
    if batch.weights is not None:  # the loss is homogeneous in the advantage
        advantages_BT = advantages_BT * batch.weights
    loss, sums = step_loss(
        stats,
        batch.old_logprobs,
        advantages_BT,
        batch.response_mask,
        selected_BT,
        counts,
        config.loss,
        ref_logprobs_BT,
    )
    if loss.requires_grad:  # forks-only without a selected token has no graph
        loss.backward()
    return MicroBatchResult(selected_BT, threshold, sums, log_ratio_N)


def free_memory(worker: Worker, _: int) -> None:
    """Return what sampling used, and drop what an update that failed kept."""
    worker.kept.clear()
    return_freed_memory()


def measure_first(worker: Worker, micro: MicroBatch, config: TrainConfig, keep: bool) -> TokenStats:
    """The current policy's statistics, detached; ``keep``: the gradient pass of this micro-batch follows."""
    return make_forward(config).measure(worker, micro, keep=keep)


@torch.no_grad()
def measure_stats(worker: Worker, micro: MicroBatch, config: TrainConfig) -> TokenStats:
    """The current policy's statistics of the response tokens, on the device of ``micro``."""
    there = micro.batch.to(worker.policy.device)
    stats = compute_token_stats(worker.policy, there, temperature=config.rollout.temperature)
    return TokenStats(*(each.to(micro.batch.input_ids.device) for each in stats))


def _select_first(
    workers: Workers,
    mini_batch: TokenBatch,
    config: TrainConfig,
    generator: torch.Generator,
    *,
    on_policy: bool,
) -> SelectedFirst:
    """Choose by the rollout's signals, or by the current policy's after a pass over all tokens."""
    mask_BT, kept_cuts = mini_batch.response_mask, list[Tensor]()
    measured: TokenStats | None = None
    if mini_batch.selected is None:
        if needs_pass_first(config.selection, config.weights) and not on_policy:
            rows_B = _contributing_rows(mask_BT, mini_batch, config)
            others_B = torch.tensor(sorted(set(range(len(mini_batch))) - set(rows_B.tolist())), dtype=torch.int64)
            kept_cuts, other_cuts = (_cut(workers, mini_batch, each_B, config) for each_B in (rows_B, others_B))
            parts = [
                stats
                for cuts, keep in ((kept_cuts, True), (other_cuts, False))
                for stats in _map(workers, measure_first, make_micro_batches(mini_batch, cuts, None), config, keep)
            ]
            like_BT, all_cuts = mini_batch.old_logprobs, kept_cuts + other_cuts
            measured = TokenStats(*(assemble(like_BT, all_cuts, list(each)) for each in zip(*parts, strict=True)))
        cuts = _cut(workers, mini_batch, torch.arange(len(mini_batch)), config)
        mini_batch = _with_choice(mini_batch, _choose(mini_batch, measured, config, cuts, generator))
    entropy_BT = mini_batch.rollout_entropy if measured is None else measured.entropy
    return SelectedFirst(mini_batch, float(entropy_threshold(entropy_BT, _selected(mini_batch))), kept_cuts)


def _cut(workers: Workers, mini_batch: TokenBatch, rows_B: Tensor, config: TrainConfig) -> list[Tensor]:
    """Micro-batches of some rows: within ``training.micro_batch_tokens``, and enough for all workers."""
    if not len(rows_B):
        return []
    rows, packed = mini_batch.rows(rows_B), _counts_packed(workers, config)
    max_tokens = config.training.micro_batch_tokens
    if config.selection.scope != "micro_batch":
        max_tokens = min(max_tokens, -(-count_tokens(rows, packed=packed) // workers.count))
    return [rows_B[cut_B] for cut_B in cut_micro_batches(rows, max_tokens, packed=packed)]


def _counts_packed(workers: Workers, config: TrainConfig) -> bool:
    """Whether memory goes by packed tokens: forks-only keeps keys and values of padded sequences."""
    return workers.policy.packs and config.training.backward == "dense"


def _map(
    workers: Workers,
    function: Callable[..., Result],
    parts: list[MicroBatch],
    config: TrainConfig,
    *arguments: Any,
) -> list[Result]:
    """``function(worker, micro, config, *arguments)``; a micro-batch goes to the worker that got it the last time."""
    sizes = [count_tokens(micro.batch, packed=_counts_packed(workers, config)) for micro in parts]
    return workers.map(function, parts, config, *arguments, sizes=sizes)


def _choose(
    batch: TokenBatch,
    measured: TokenStats | None,
    config: TrainConfig,
    cuts: list[Tensor],
    generator: torch.Generator,
) -> Choice:
    """Mask and weights of all rows; ``measured``: by the current policy, None: by the policy that sampled."""
    logprobs_BT, entropy_BT = measured or (batch.old_logprobs, batch.rollout_entropy)
    _require_finite(entropy_BT[batch.response_mask])
    unknown_B = torch.zeros_like(batch.advantages)
    signals = Signals(
        response_mask=batch.response_mask,
        entropy=entropy_BT,
        logprobs=logprobs_BT,
        old_logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        rewards=unknown_B if batch.rewards is None else batch.rewards,
        groups=unknown_B.long() if batch.groups is None else batch.groups,
        clip=(config.loss.clip_low, config.loss.clip_high),
        generator=generator,
    )
    return choose(signals, config.selection, config.weights, cuts)


def _with_choice(batch: TokenBatch, choice: Choice) -> TokenBatch:
    weights_BT = choice.weights_BT
    if weights_BT is not None and batch.weights is not None:
        weights_BT = weights_BT * batch.weights
    return replace(batch, selected=choice.selected_BT, weights=batch.weights if weights_BT is None else weights_BT)


def _selected(batch: TokenBatch) -> Tensor:
    assert batch.selected is not None, "selected before the first loss"
    return batch.selected


def _require_finite(entropy_N: Tensor) -> None:
    """Checked for every rule: one that does not read entropies would keep training a diverged model."""
    if num_bad := int((~entropy_N.isfinite()).sum()):
        raise TrainingHalted(
            f"entropy is NaN or infinite at {num_bad} of {len(entropy_N)} response tokens; "
            f"the model's weights have diverged"
        )


def _contributing_rows(token_BT: Tensor, mini_batch: TokenBatch, config: TrainConfig) -> Tensor:
    """Sequences of which a token contributes to the loss if only these tokens are selected.

    At least one, as a zero gradient changes the optimizer's state too.
    """
    if not policy_loss_only(config.loss):
        return torch.arange(len(mini_batch))
    rows_B = (token_BT & (mini_batch.advantages != 0)[:, None]).any(1).cpu().nonzero()[:, 0]
    return rows_B if len(rows_B) else torch.zeros(1, dtype=torch.int64)


def _take_step(policy: Policy, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Clip the gradient and update the weights; returns the gradient norm before clipping."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    if all(parameter.grad is None for parameter in trained):  # nothing ran with gradients
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, max_norm))
    if not math.isfinite(grad_norm):
        raise TrainingHalted(f"the gradient norm is {grad_norm}; the weights were left as they are")
    optimizer.step()
    torch.autograd.graph.increment_version(trained)  # fused AdamW does not; an engine with a copy looks at it
    # A sum is NaN or infinite if a weight is, and takes a tenth of the time of isfinite(). Checked before the step
    # counts as done, so that no checkpoint contains such weights.
    if not all(bool(parameter.detach().sum().isfinite()) for parameter in trained):
        raise TrainingHalted("the optimizer's step left weights that are NaN or infinite; lower optimizer.lr")
    return grad_norm
