"""Selection rules and scopes. Axes: ``B`` sequences, ``T`` token positions, ``N`` response tokens in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from forkrl.method.top_k import CHUNK, keep_highest
from forkrl.types import require_tensors

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import SelectionConfig


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    entropy: Tensor
    """``[N]`` nats, any floating dtype; finite for rules that read it."""
    num_kept: int
    threshold: float | None
    generator: torch.Generator | None
    """None: torch's default generator."""


class Rule(NamedTuple):
    """A function from candidates to a bool per token, and whether it reads entropy."""

    select: Callable[[Candidates], Tensor]
    reads_entropy: bool


def _random(candidates: Candidates) -> Tensor:
    generator, home = candidates.generator, candidates.entropy.device
    drawn_on = home if generator is None else generator.device
    order_N = torch.randperm(len(candidates.entropy), generator=generator, device=drawn_on)
    selected_N = torch.zeros(len(order_N), dtype=torch.bool, device=home)
    selected_N[order_N[: candidates.num_kept].to(home)] = True
    return selected_N


def _threshold(candidates: Candidates) -> Tensor:
    assert candidates.threshold is not None, "checked by select_tokens"
    return candidates.entropy >= candidates.threshold


RULES: dict[str, Rule] = {
    "all": Rule(lambda tokens: torch.ones_like(tokens.entropy, dtype=torch.bool), reads_entropy=False),
    "top_entropy": Rule(lambda tokens: keep_highest(tokens.entropy, tokens.num_kept), reads_entropy=True),
    "bottom_entropy": Rule(lambda tokens: keep_highest(-tokens.entropy, tokens.num_kept), reads_entropy=True),
    "random": Rule(_random, reads_entropy=False),
    "threshold": Rule(_threshold, reads_entropy=True),
}
"""all: plain DAPO. top_entropy: the forking tokens (arXiv 2506.01939v2, eq. 6). bottom_entropy: the paper's control
(fig. 7). random: the same number, uniformly (cf. arXiv 2605.07660). threshold: a fixed bound for the whole run (the
paper's 80th percentile is 0.672 nats)."""


def select_tokens(
    entropy: Tensor,
    response_mask: Tensor,
    rule: str = "top_entropy",
    ratio: float = 0.2,
    *,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Select response tokens, ``1[H >= tau]`` of eq. 6 (arXiv 2506.01939v2), with tau taken over all given tokens.

    "top_entropy", "bottom_entropy" and "random" keep exactly ``max(1, ceil(ratio * N))`` of the N response tokens; ties
    go to the earliest. "all" keeps every token, "threshold" those with entropy >= ``threshold``. Tokens outside the
    response are neither read nor selected.

    Args:
        entropy: nats, floating point, any shape.
        response_mask: bool, same shape.
        rule: a key of ``RULES``.
        ratio: fraction to keep, in (0, 1].
        threshold: nats; required by rule "threshold", forbidden otherwise.
        generator: for "random".

    Returns:
        bool, shape of ``response_mask``.

    Raises:
        ValueError: shapes or dtypes disagree, the rule is unknown, ratio or threshold is out of range, or the rule
            reads an entropy that is NaN or infinite.
        TypeError: ``entropy`` or ``response_mask`` is not a tensor.
    """
    _check_request(entropy, response_mask, rule, threshold)
    entropy_N = _of_response(entropy.detach(), response_mask)
    num_kept = num_selected(len(entropy_N), ratio)
    if len(entropy_N) == 0:
        return torch.zeros_like(response_mask)
    num_bad = sum(int((~part.isfinite()).sum()) for part in entropy_N.split(CHUNK)) if RULES[rule].reads_entropy else 0
    if num_bad:
        raise ValueError(f"entropy is NaN or infinite at {num_bad} of {len(entropy_N)} response tokens")
    selected_N = RULES[rule].select(Candidates(entropy_N, num_kept, threshold, generator))
    return torch.zeros_like(response_mask).masked_scatter_(response_mask, selected_N)


def select_tokens_per_sequence(
    entropy: Tensor,
    response_mask: Tensor,
    rule: str = "top_entropy",
    ratio: float = 0.2,
    *,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`select_tokens` within each sequence of ``[B, T]``."""
    _check_request(entropy, response_mask, rule, threshold)
    selected_BT = torch.zeros_like(response_mask)
    for row, (entropy_T, mask_T) in enumerate(zip(entropy, response_mask, strict=True)):
        selected_BT[row] = select_tokens(entropy_T, mask_T, rule, ratio, threshold=threshold, generator=generator)
    return selected_BT


def entropy_threshold(entropy: Tensor, selected_mask: Tensor) -> Tensor:
    """The lowest selected entropy (tau of eq. 6), a scalar; NaN if none is selected."""
    require_tensors(entropy=entropy, selected_mask=selected_mask)
    entropy_N = entropy.detach()[selected_mask]
    return entropy_N.min() if len(entropy_N) else entropy.new_full((), math.nan)


def _of_response(entropy: Tensor, response_mask: Tensor) -> Tensor:
    """Response entropies ``[N]`` in reading order, gathered in chunks because a full index needs more memory."""
    entropy_N, start = entropy.new_empty(int(response_mask.sum())), 0
    for part, mask in zip(entropy.flatten().split(CHUNK), response_mask.flatten().split(CHUNK), strict=True):
        chosen = part[mask]
        entropy_N[start : start + len(chosen)] = chosen
        start += len(chosen)
    return entropy_N


def _check_request(entropy: Tensor, response_mask: Tensor, rule: str, threshold: float | None) -> None:
    require_tensors(entropy=entropy, response_mask=response_mask)
    if entropy.shape != response_mask.shape:
        raise ValueError(f"entropy {tuple(entropy.shape)} and response_mask {tuple(response_mask.shape)} do not match")
    if response_mask.dtype != torch.bool or not entropy.is_floating_point():
        raise ValueError(f"entropy must be floating and response_mask bool; got {entropy.dtype}, {response_mask.dtype}")
    if rule not in RULES:
        raise ValueError(f"rule = {rule!r} is unknown; choose one of {list(RULES)}")
    if (threshold is None) == (rule == "threshold"):
        raise ValueError('threshold goes with rule "threshold", and only with it')
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold = {threshold} must be a finite entropy of at least 0 nats")


def num_selected(num_tokens: int, ratio: float) -> int:
    """``max(1, ceil(ratio * num_tokens))`` in exact decimals (0.1 x 30 is 3); 0 of no tokens."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio = {ratio} must lie in (0, 1]")
    if num_tokens == 0:
        return 0
    # Doubles give 0.1 * 30 > 3; twelve digits make 0.1 + 0.2 equal 0.3.
    return max(1, math.ceil(Fraction(f"{ratio:.12g}") * num_tokens))


def select_in_scope(
    entropy_BT: Tensor,
    response_mask_BT: Tensor,
    config: SelectionConfig,
    micro_batches: Sequence[Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Selected tokens of a mini-batch (or rollout batch), ``[B, T]`` bool; ``micro_batches`` are row indices."""

    def select(function: Callable[..., Tensor], rows: Tensor | slice) -> Tensor:
        inputs = (entropy_BT[rows], response_mask_BT[rows], config.rule, config.ratio)
        return function(*inputs, threshold=config.threshold, generator=generator)

    if config.scope == "sequence":
        return select(select_tokens_per_sequence, slice(None))
    if config.scope in ("mini_batch", "rollout_batch"):
        return select(select_tokens, slice(None))
    selected_BT = torch.zeros_like(response_mask_BT)
    for rows_B in micro_batches:
        selected_BT[rows_B] = select(select_tokens, rows_B)
    return selected_BT


def reads_current_entropy(config: SelectionConfig) -> bool:
    """Whether the rule reads the current policy's entropies instead of the rollout's."""
    return RULES[config.rule].reads_entropy and config.entropy == "current"


def needs_entropy_first(config: SelectionConfig) -> bool:
    """Whether current entropies of the whole mini-batch are needed before the first loss."""
    # Tokens of different micro-batches compete, or the number selected depends on the entropies.
    return reads_current_entropy(config) and (config.scope == "mini_batch" or config.rule == "threshold")


def count_selected(response_mask_BT: Tensor, config: SelectionConfig, micro_batches: Sequence[Tensor]) -> int:
    """The number of tokens a rule other than "threshold" will select."""
    if config.rule == "threshold":
        raise ValueError('rule "threshold" has no count before it has seen the entropies')
    lengths_B = response_mask_BT.sum(1)
    if config.rule == "all":
        return int(lengths_B.sum())
    if config.scope == "sequence":
        return sum(num_selected(length, config.ratio) for length in lengths_B.tolist())
    if config.scope in ("mini_batch", "rollout_batch"):
        return num_selected(int(lengths_B.sum()), config.ratio)
    return sum(num_selected(int(lengths_B[rows_B].sum()), config.ratio) for rows_B in micro_batches)
